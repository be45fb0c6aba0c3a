"""``msdspn predict --data``: from a data set to predicted sets, for models of one's own data."""

from __future__ import annotations

import dataclasses
import inspect
import io
import os
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from msdspn_jax import trained
from msdspn_jax._files import as_user_error, write_bytes
from msdspn_jax.errors import UserError

OptionalPath = Annotated[Path | None, tyro.conf.arg(metavar="PATH")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PredictSets:
    """Predict the sets of a data set, with a model of msdspn train sets.

    Writes an .npz file: sets [num, n, d], in the units of the training data; mask [num, n], True
    where an element is predicted; presence [num, n], the number of which mask is made, where sets
    vary in size (trained towards 1 for elements and 0 for none; no probability); energy and
    gradient_norm [num] of the inner minimisation, large where it failed; names [d]. For a folder of
    images also files [num]. The predicted elements of example i: sets[i][mask[i]].

    Where the data has targets, the scores are shown.
    """

    data: str
    """An .npz file or a folder of .npy files with inputs, and input_mask if need be, as for
    training; a .json file in COCO's format; or, where inputs are images, a folder of images."""
    out: Path
    """The .npz file to write."""
    run: OptionalPath = None
    """A run folder of msdspn train sets."""
    weights: OptionalPath = None
    """A safetensors file of msdspn export --weights."""
    checkpoint: str = "best"
    """With --run: best (by validation), latest, or a step."""
    image_dir: Annotated[str | None, tyro.conf.arg(metavar="PATH")] = None
    """With a .json file: the folder of its images."""
    threshold: float = 0.5
    """Presence above which an element is predicted, 0 to 1."""
    inner_steps: Annotated[int | None, tyro.conf.arg(name="inner.num-steps", metavar="INT")] = None
    """Inner steps, also more than in training. Default: those the model is evaluated with."""
    seed: int = 0
    """Of random initial sets, where the model has them: the same for every input."""
    batch_size: int = 64
    """Inputs predicted at once."""
    overwrite: bool = False
    """Replace a file that is already there."""

    def execute(self) -> int:
        """Check the flags, read, predict, write."""
        self._check()
        import jax

        from msdspn_jax._cache import enable_compilation_cache
        from msdspn_jax.tasks.evaluation import means
        from msdspn_jax.tasks.sets.scores import predict_all
        from msdspn_jax.tasks.sets.source import load_for_prediction

        enable_compilation_cache()
        model: Any = trained.find(
            run=self.run, weights=self.weights, checkpoint=self.checkpoint, tasks=("sets",)
        )
        form = model.config.form
        arrays, files = load_for_prediction(self.data, form, images=self.image_dir)
        found, scores = predict_all(
            model.predictor, model.variables, arrays, jax.random.key(self.seed),
            inner_steps=self.inner_steps, batch_size=self.batch_size, key_each=False,
        )  # fmt: skip
        found["mask"] = np.ones(found["sets"].shape[:2], bool)
        if "presence" in found:
            found["mask"] = found["presence"] > self.threshold
        found["energy"] = scores["inner_energy"]
        found["gradient_norm"] = scores["inner_gradient_norm"]
        found["names"] = np.array(form.names)
        if files is not None:
            found["files"] = np.array(files)
        with as_user_error(self.out):
            content = io.BytesIO()
            np.savez(content, **found)
            write_bytes(self.out, content.getvalue())
        if "targets" in arrays:
            _show(means(scores))
        bad = int((~np.isfinite(found["sets"]).all((1, 2))).sum())
        if bad:
            print(f"{bad} predictions are not finite: the inner minimisation diverged there")
        print(
            f"{int(found['mask'].sum())} elements in {len(found['sets'])} sets, step {model.step}:"
            f" {self.out}"
        )
        return 0

    def _check(self) -> None:
        if self.run is None and self.weights is None:
            raise UserError("--run: expected a run folder of msdspn train sets, or --weights")
        for flag, value in (
            ("--batch-size", self.batch_size),
            ("--inner.num-steps", self.inner_steps),
        ):
            if value is not None and value < 1:
                raise UserError(f"{flag}: expected at least 1, got {value}")
        if not 0 <= self.threshold <= 1:
            raise UserError(f"--threshold: expected a number from 0 to 1, got {self.threshold}")
        if self.out.suffix != ".npz" or os.path.isdir(self.out):
            raise UserError(f"--out: expected the name of an .npz file, got {self.out}")
        if os.path.exists(self.out) and not self.overwrite:
            raise UserError(f"{self.out} exists; give --overwrite to replace it")


def _show(scores: dict[str, float]) -> None:
    from rich.console import Console

    from msdspn_jax.commands.show import metrics_table

    Console().print(metrics_table({"mean": scores}, title="scores"))


def main(argv: list[str]) -> int:
    """Run the verb; returns the exit code."""
    if "--help" in argv or "-h" in argv:
        argv = ["--help"]
    options = tyro.cli(
        PredictSets,
        args=argv,
        prog="msdspn predict",
        description=inspect.cleandoc(PredictSets.__doc__ or ""),
    )
    return options.execute()
