"""``msdspn export``: a trained CLEVR model as one file, with its code or as a program without."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from msdspn_jax.errors import UserError

if TYPE_CHECKING:
    from msdspn_jax.trained.weights import Model

OptionalPath = Annotated[Path | None, tyro.conf.arg(metavar="PATH")]
Platform = Literal["cpu", "cuda", "rocm", "tpu"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export:
    """Write a trained CLEVR model as a program that needs no model code.

    The artefact (--out) is a zip file: the compiled program with the weights inside (StableHLO, by
    jax.export; any batch size), settings.json, and predict.py, ten lines that run it:

        unzip -p ARTEFACT predict.py > predict.py && python predict.py ARTEFACT IMAGE

    `msdspn predict --artefact ARTEFACT IMAGE... --out DIR` runs it as well. --weights writes the
    model as a safetensors file, for `msdspn predict --weights` and msdspn_jax.trained.weights.
    """

    run: OptionalPath = None
    """A run folder of msdspn train clevr. Without it: the model in the box."""
    checkpoint: str = "best"
    """With --run: best (by validation), latest, or a step."""
    out: OptionalPath = None
    """The artefact to write, for example model.zip."""
    weights: OptionalPath = None
    """A safetensors file to write."""
    inner_steps: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    """Inner steps of the program. Default: those that the model is evaluated with."""
    threshold: float = 0.5
    """Presence above which an element is an object: a setting of the artefact."""
    seed: int = 0
    """Of random initial sets and slots, where the model has them: the same for every image."""
    platforms: tuple[Platform, ...] = ("cpu", "cuda", "rocm", "tpu")
    """What the program shall run on; none of them has to be here."""
    check: bool = True
    """Run the program beside the model, on this device, and compare."""
    overwrite: bool = False
    """Replace files that are already there."""

    def execute(self) -> int:
        """Check the flags, load, write."""
        targets = [path for path in (self.out, self.weights) if path is not None]
        if not targets:
            raise UserError("give --out FILE for an artefact, --weights FILE, or both")
        if len(targets) == 2 and targets[0].resolve() == targets[1].resolve():
            raise UserError(f"--out and --weights name the same file, {self.out}")
        if self.inner_steps is not None and self.inner_steps < 1:
            raise UserError(f"--inner-steps must be at least 1, got {self.inner_steps}")
        for path in targets:
            if path.is_dir():
                raise UserError(f"{path} is a folder; name a file")
            if path.exists() and not self.overwrite:
                raise UserError(f"{path} exists; give --overwrite to replace it")
        model, source = load(self.run, None, self.checkpoint)
        if self.weights is not None:
            self._write_weights(self.weights, model)
        if self.out is not None:
            self._write_artefact(self.out, model, source)
        return 0

    def _write_weights(self, path: Path, model: Model) -> None:
        from msdspn_jax.trained.weights import save_model

        try:
            save_model(path, model.config, model.variables, step=model.step)
        except ValueError as error:
            raise UserError(f"the run cannot be exported: {error}") from error
        print(f"{path}: weights, {_megabytes(path)}")

    def _write_artefact(self, path: Path, model: Model, source: str) -> None:
        from msdspn_jax.trained import program as artefact

        predict = functools.partial(
            predict_function(model, inner_steps=self.inner_steps, seed=self.seed), model.variables
        )
        config: Any = model.config
        facts = {
            "source": Path(source).name,
            "step": model.step,
            "model": config.model,
            "inner_steps": steps_of(model, self.inner_steps),
            "seed": self.seed,
        }
        settings = artefact.save_artefact(
            path,
            predict,
            size=config.size,
            threshold=self.threshold,
            platforms=self.platforms,
            facts=facts,
        )
        print(
            f"{path}: program for {', '.join(settings['platforms'])}, images of {config.size} x"
            f" {config.size}, any batch, {_megabytes(path)}"
        )
        if self.check:
            gap = artefact.difference(artefact.load_artefact(path), predict)
            print(f"checked: differs from the model by at most {gap:.1e} on two images of noise")
            if not gap < 1e-3:
                raise UserError(
                    f"{path}: the program's predictions differ from the model's by {gap:.1e};"
                    " it was written, do not trust it"
                )


def load(run: Path | None, weights: Path | None, checkpoint: str) -> tuple[Model, str]:
    """The model of a run folder, of a weights file, or the one in the box; and where it is from.

    Raises:
      UserError: it is not there, cannot be read, or is a model of another task.
    """
    from msdspn_jax.trained.weights import Model, box_model_path, load_model

    if run is None:
        path = weights or box_model_path()
        model = load_model(path)
        if model.task_name != "clevr":
            raise UserError(f"{path}: a model of the task {model.task_name}, expected clevr")
        return model, path.name if weights is None else str(path)
    from msdspn_jax import tasks
    from msdspn_jax.trained.run import load_run, package_versions, read_record

    task = read_record(run).get("task")
    if task != "clevr":
        raise UserError(f"{run}: a run of the task {task}, expected clevr")
    which: Any = checkpoint
    if checkpoint not in ("best", "latest"):
        if not checkpoint.isdigit():
            raise UserError(f"--checkpoint must be best, latest or a step, got {checkpoint!r}")
        which = int(checkpoint)
    found = load_run(run, checkpoint=which)
    predictor = tasks.load("clevr").build_predictor(found.config)
    versions = package_versions()
    model = Model(found.config, found.variables[0], found.step, predictor, versions)
    return model, str(run)


def predict_function(model: Model, *, inner_steps: int | None, seed: int) -> Any:
    """``(variables, images) -> objects``, jittable.

    Every image starts from the same key: what is predicted for it then depends neither on its
    place in the batch nor on the others.
    """
    import jax
    import jax.numpy as jnp

    def predict(variables, images):
        keys = jnp.broadcast_to(jax.random.key(seed), images.shape[:1])
        return model.predictor.predict(variables, images, keys, inner_steps=inner_steps).objects

    return predict


def steps_of(model: Model, asked: int | None) -> int | None:
    """Inner steps that a prediction takes; None for models without an inner loop."""
    config: Any = model.config
    if config.model not in ("idspn", "dspn"):
        if asked is not None:
            raise UserError(f"--inner-steps: the model {config.model} has no inner loop")
        return None
    return asked or config.steps_at_evaluation


def _megabytes(path: Path) -> str:
    return f"{path.stat().st_size / 1e6:.3g} MB"


def main(argv: list[str]) -> int:
    """Run the verb; returns the exit code."""
    options = tyro.cli(
        Export, args=argv, prog="msdspn export", description=inspect.cleandoc(Export.__doc__ or "")
    )
    return options.execute()
