"""Trained models, found again: as a run folder, a weights file, or a program."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from msdspn_jax.errors import UserError

if TYPE_CHECKING:
    from msdspn_jax.trained.program import Program
    from msdspn_jax.trained.weights import Model


def find(
    *,
    run: str | Path | None = None,
    weights: str | Path | None = None,
    program: str | Path | None = None,
    checkpoint: str | None = None,
    tasks: tuple[str, ...] = ("clevr",),
) -> Model | Program:
    """A trained model, from where it is kept; no data is read.

    Without any of the three, the small CLEVR model that comes with the package.

    Args:
        run: a run folder of ``msdspn train clevr`` or ``sets``.
        weights: a safetensors file of ``msdspn export --weights``.
        program: a zip file of ``msdspn export --out``; it runs without the code of the model. It is
            native code, which runs in this process: only for files that you trust.
        checkpoint: with a run: best (by validation; the default), latest, or a step.
        tasks: of which task the model may be.

    Raises:
        UserError: more than one of them, or a checkpoint without a run; or it is not there, cannot
            be read, or is a model of another task.
    """
    check_one(run=run, weights=weights, program=program, checkpoint=checkpoint)
    # What is not asked for is not imported: a program runs without any model's code.
    if program is not None:
        from msdspn_jax.trained.program import load_program

        return load_program(program)
    if run is not None:
        from msdspn_jax.trained.run import checkpoint_named, load_predictor

        model = load_predictor(run, checkpoint=checkpoint_named(checkpoint or "best"))
    else:
        from msdspn_jax.trained.weights import box_model_path, load_model

        path = weights or box_model_path()
        model = load_model(path)
        if weights is None:
            model = model._replace(source=Path(path).name)
    if model.task_name not in tasks:
        hint = " (for data: msdspn predict --data FILE)" if model.task_name == "sets" else ""
        raise UserError(
            f"{model.source}: a model of the task {model.task_name}, expected"
            f" {' or '.join(tasks)}{hint}"
        )
    return model


def check_one(*, checkpoint: str | None = None, **given: str | Path | None) -> None:
    """Refuse more than one place to find a model, and a checkpoint of what is no run.

    Raises:
        UserError: names the flags that are given.
    """
    named = [f"--{name}" for name, path in given.items() if path is not None]
    if len(named) > 1:
        raise UserError(f"give only one of {', '.join(named)}")
    if checkpoint is not None and named != ["--run"]:
        got = f"got {named[0]}" if named else "got none"
        raise UserError(f"--checkpoint {checkpoint}: expected --run FOLDER with it, {got}")
