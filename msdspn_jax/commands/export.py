"""``msdspn export``: a trained model as one file, with its code or as a program without."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from msdspn_jax import trained
from msdspn_jax.errors import UserError

if TYPE_CHECKING:
    from msdspn_jax.trained.weights import Model

OptionalPath = Annotated[Path | None, tyro.conf.arg(metavar="PATH")]
Platform = Literal["cpu", "cuda", "rocm", "tpu"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export:
    """Write a trained model, of CLEVR or of your own data, as a program that needs no model code.

    The program (--out) is a zip file: the compiled code with the weights inside (StableHLO, by
    jax.export; any batch size), settings.json, and predict.py, a few lines that run it:

        unzip -p PROGRAM predict.py > predict.py && python predict.py PROGRAM IMAGE

    `msdspn predict --program PROGRAM IMAGE... --out DIR` runs it as well. For a run of msdspn train
    sets, predict.py takes DATA.npz and PREDICTIONS.npz in place of IMAGE, and the verb is `msdspn
    predict --program PROGRAM --data DATA.npz --out PREDICTIONS.npz`. --weights writes the model as
    a safetensors file, for `msdspn predict --weights` and msdspn_jax.trained.weights.

    A program is native code: it runs with the rights of whoever runs it, so run only those you
    trust. To share a model with strangers, --weights is the safer file: it holds numbers alone.
    """

    run: OptionalPath = None
    """A run folder of msdspn train clevr or sets. Without it: the CLEVR model in the box."""
    checkpoint: str = "best"
    """With --run: best (by validation), latest, or a step."""
    out: OptionalPath = None
    """The program to write, for example model.zip."""
    weights: OptionalPath = None
    """A safetensors file to write."""
    half: bool = False
    """Weights in 16 bits: half the size. They are read as 32 bits."""
    inner_steps: Annotated[int | None, tyro.conf.arg(name="inner.num-steps", metavar="INT")] = None
    """Inner steps of the program. Default: those that the model is evaluated with."""
    num_starts: Annotated[int | None, tyro.conf.arg(name="inner.num-starts", metavar="INT")] = None
    """Initial sets to descend from, of which the lowest energy counts; in the program, and kept in
    the weights. Default: as the model is evaluated."""
    threshold: Annotated[float | None, tyro.conf.arg(metavar="FLOAT")] = None
    """Score above which an element is an object, 0 to 1: a setting of the program. Default: the
    model's own; 0.5 where it was not calibrated."""
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
            raise UserError("give --out FILE for a program, --weights FILE, or both")
        if self.out is None:
            of_a_program = {
                "--inner.num-steps": self.inner_steps,
                "--threshold": self.threshold,
                "--seed": self.seed or None,
            }
            for flag, value in of_a_program.items():
                if value is not None:
                    raise UserError(f"{flag}: expected --out FILE with it, got none")
        if self.half and self.weights is None:
            raise UserError("--half: expected --weights FILE with it, got none")
        if len(targets) == 2 and targets[0].resolve() == targets[1].resolve():
            raise UserError(f"--out and --weights name the same file, {self.out}")
        for flag, value in (
            ("--inner.num-steps", self.inner_steps),
            ("--inner.num-starts", self.num_starts),
        ):
            if value is not None and value < 1:
                raise UserError(f"{flag}: expected at least 1, got {value}")
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise UserError(f"--threshold: expected a number from 0 to 1, got {self.threshold}")
        for path in targets:
            # os.path says of names that no file can have that they do not exist; pathlib raises.
            if os.path.isdir(path):
                raise UserError(f"{path} is a folder; name a file")
            if os.path.exists(path) and not self.overwrite:
                raise UserError(f"{path} exists; give --overwrite to replace it")
        model: Any = trained.find(run=self.run, checkpoint=self.checkpoint, tasks=("clevr", "sets"))
        model = model.with_starts(self.num_starts)
        model.num_inner_steps(self.inner_steps)
        if self.weights is not None:
            self._write_weights(self.weights, model)
        if self.out is not None:
            self._write_program(self.out, model)
        return 0

    def _write_weights(self, path: Path, model: Model) -> None:
        from msdspn_jax.trained.weights import save_model

        try:
            save_model(
                path,
                model.config,
                model.variables,
                step=model.step,
                task_name=model.task_name,
                half=self.half,
                calibration=model.calibration,
            )
        except ValueError as error:
            raise UserError(f"the run cannot be exported: {error}") from error
        print(f"{path}: weights, {_megabytes(path)}")

    def _write_program(self, path: Path, model: Model) -> None:
        from msdspn_jax.trained import program
        from msdspn_jax.trained.calibration import NO_PROBABILITY, SCORE
        from msdspn_jax.trained.weights import sees

        steps = model.num_inner_steps(self.inner_steps)
        if model.task_name == "sets":
            return self._write_set_program(path, model, steps)
        predict = functools.partial(
            model.predict, model.variables, inner_steps=self.inner_steps, seed=self.seed
        )
        config: Any = model.config
        facts = {
            "source": Path(model.source).name,
            "step": model.step,
            "model": config.model,
            "inner_steps": steps,
            "num_starts": config.at_evaluation.get("num_starts"),
            "seed": self.seed,
            "score": SCORE if model.calibration else NO_PROBABILITY,
            "sees": sees(config),
        }
        settings = program.save_program(
            path,
            predict,
            size=config.size,
            threshold=model.threshold if self.threshold is None else self.threshold,
            platforms=self.platforms,
            facts=facts,
        )
        print(
            f"{path}: program for {', '.join(settings['platforms'])}, images of {config.size} x"
            f" {config.size}, any batch, {_megabytes(path)}"
        )
        if self.check:
            gap = program.difference(program.load_program(path), predict)
            print(f"checked: differs from the model by at most {gap:.1e} on two images of noise")
            if not gap < 1e-3:
                raise UserError(
                    f"{path}: the program's predictions differ from the model's by {gap:.1e};"
                    " it was written, do not trust it"
                )

    def _write_set_program(self, path: Path, model: Model, steps: int | None) -> None:
        from msdspn_jax.trained import set_program

        config: Any = model.config
        threshold = model.threshold if self.threshold is None else self.threshold
        facts = {
            "source": Path(model.source).name,
            "step": model.step,
            "model": config.model,
            "inner_steps": steps,
            "num_starts": config.at_evaluation.get("num_starts"),
            "seed": self.seed,
        }
        settings, predict = set_program.save_set_program(
            path, model, inner_steps=self.inner_steps, seed=self.seed, threshold=threshold,
            platforms=self.platforms, facts=facts,
        )  # fmt: skip
        shape = ", ".join(map(str, settings["input_shape"]))
        print(
            f"{path}: program for {', '.join(settings['platforms'])}, {settings['kind']}"
            f" [any batch, {shape}], {_megabytes(path)}"
        )
        if self.check:
            gap = set_program.largest_difference(path, model, predict)
            print(f"checked: differs from the model by at most {gap:.1e} on two random inputs")
            if not gap < 1e-3:
                raise UserError(
                    f"{path}: the program's predictions differ from the model's by {gap:.1e};"
                    " it was written, do not trust it"
                )


def _megabytes(path: Path) -> str:
    return f"{path.stat().st_size / 1e6:.3g} MB"


def main(argv: list[str]) -> int:
    """Run the verb; returns the exit code."""
    options = tyro.cli(
        Export, args=argv, prog="msdspn export", description=inspect.cleandoc(Export.__doc__ or "")
    )
    return options.execute()
