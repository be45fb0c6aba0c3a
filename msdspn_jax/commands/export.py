"""``msdspn export``: a trained model as one file, with its code or as a program without."""

from __future__ import annotations

import dataclasses
import functools
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from msdspn_jax import trained
from msdspn_jax._options import parse
from msdspn_jax.commands.decoding import Decoding, DecodingFlags, check_new
from msdspn_jax.errors import UserError

if TYPE_CHECKING:
    from msdspn_jax.trained.weights import Model

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

    run: Path | None = None
    """A run folder of msdspn train clevr or sets. Without it: the CLEVR model in the box."""
    pytorch: Path | None = None
    """In place of a run: a checkpoint that the paper authors' train_exp3.py wrote (.ckpt). It is
    read without PyTorch, and no code in it is run."""
    checkpoint: str | None = None
    """With --run: best (by validation; the default), latest, or a step."""
    out: Path | None = None
    """The program to write, for example model.zip."""
    weights: Path | None = None
    """A safetensors file to write."""
    half: bool = False
    """Parameters in 16 bits: half the size. They are read as 32 bits."""
    platforms: tuple[Platform, ...] = ("cpu", "cuda", "rocm", "tpu")
    """What the program shall run on; none of them has to be here."""
    check: bool = True
    """Run the program beside the model, on this device, and compare."""
    overwrite: bool = False
    """Replace files that are already there."""
    decoding: DecodingFlags = dataclasses.field(default_factory=Decoding)

    def execute(self) -> int:
        """Check the flags, load, write."""
        how = self.decoding
        targets = [path for path in (self.out, self.weights) if path is not None]
        if not targets:
            raise UserError("give --out FILE for a program, --weights FILE, or both")
        if self.out is None:
            of_a_program = {
                "--inner.num-steps": how.inner_steps,
                "--threshold": how.threshold,
                "--seed": how.seed or None,
            }
            for flag, value in of_a_program.items():
                if value is not None:
                    raise UserError(f"{flag}: expected --out FILE with it, got none")
        if self.half and self.weights is None:
            raise UserError("--half: expected --weights FILE with it, got none")
        if len(targets) == 2 and targets[0].resolve() == targets[1].resolve():
            raise UserError(f"--out and --weights name the same file, {self.out}")
        how.check()
        for path in targets:
            # os.path says of names that no file can have that they do not exist; pathlib raises.
            if os.path.isdir(path):
                raise UserError(f"{path} is a folder; name a file")
            check_new(path, overwrite=self.overwrite)
        trained.check_one(run=self.run, pytorch=self.pytorch, checkpoint=self.checkpoint)
        model: Any
        if self.pytorch is not None:
            from msdspn_jax.trained.pytorch import clevr_model

            model = clevr_model(self.pytorch)
        else:
            model = trained.find(run=self.run, checkpoint=self.checkpoint, tasks=("clevr", "sets"))
        model = model.with_starts(how.num_starts)
        model.num_inner_steps(how.inner_steps)
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
        from msdspn_jax.trained import program, set_program
        from msdspn_jax.trained.calibration import NO_PROBABILITY, SCORE
        from msdspn_jax.trained.weights import sees

        how = self.decoding
        config: Any = model.config
        facts = {
            "source": Path(model.source).name,
            "step": model.step,
            "model": config.model,
            "inner_steps": model.num_inner_steps(how.inner_steps),
            "num_starts": config.at_evaluation.get("num_starts"),
            "seed": how.seed,
        }
        options: Any = {
            "threshold": model.threshold if how.threshold is None else how.threshold,
            "platforms": self.platforms,
            "facts": facts,
        }
        # Of models of one's own data: noise is put into the units of inputs, and errors are in
        # deviations of their features.
        shift, spread, scale = 0.0, 1.0, np.ones(())
        if model.task_name == "sets":
            form = config.form
            if form.kind != "images":
                shift, spread = np.array(form.input_shift), np.array(form.input_scale)
            settings, predict = set_program.save_set_program(
                path, model, inner_steps=how.inner_steps, seed=how.seed, **options
            )
            scale = np.array([*form.scale, 1.0][: form.width])
        else:
            predict = functools.partial(
                model.predict, model.variables, inner_steps=how.inner_steps, seed=how.seed
            )
            facts["score"] = SCORE if model.calibration else NO_PROBABILITY
            facts["sees"] = sees(config)
            settings = program.save_program(path, predict, size=config.size, **options)
        arguments = program.noise(settings)
        arguments[0] = (arguments[0] * spread + shift).astype(arguments[0].dtype)
        kind, shape = settings.get("kind", "images"), ", ".join(map(str, arguments[0].shape[1:]))
        print(
            f"{path}: program for {', '.join(settings['platforms'])}, {kind} [any batch, {shape}],"
            f" {_megabytes(path)}"
        )
        if self.check and program.platform_here() not in settings["platforms"]:
            print(f"not checked: this machine has {program.platform_here()}")
        elif self.check:
            made = program.load_program(path, task=model.task_name)
            gap = float((program.difference(made, predict, arguments) / scale).max())
            print(f"checked: differs from the model by at most {gap:.1e} on two inputs of noise")
            if not gap < 1e-3:
                raise UserError(
                    f"{path}: the program's predictions differ from the model's by {gap:.1e};"
                    " it was written, do not trust it"
                )


def _megabytes(path: Path) -> str:
    return f"{path.stat().st_size / 1e6:.3g} MB"


def main(argv: list[str]) -> int:
    """Run the verb; returns the exit code."""
    return parse(Export, argv, prog="msdspn export", description=Export.__doc__).execute()
