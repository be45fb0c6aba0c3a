"""``msdspn predict --data``: from a data set to predicted sets, for models of one's own data."""

from __future__ import annotations

import dataclasses
import io
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from msdspn_jax import trained
from msdspn_jax._files import as_user_error, write_bytes
from msdspn_jax._options import parse
from msdspn_jax._progress import ProgressBar
from msdspn_jax.commands.decoding import Decoding, DecodingFlags, check_new
from msdspn_jax.commands.pictures import printable
from msdspn_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class PredictSets:
    """Predict the sets of a data set, with a model of msdspn train sets.

    Writes an .npz file: sets [num, n, d], in the units of the training data; mask [num, n], True
    where an element is predicted; presence [num, n], the number of which mask is made, where sets
    vary in size (trained towards 1 for elements and 0 for none; no probability); energy and
    gradient_norm [num] of the inner minimisation, large where it failed; names [d]. For a folder of
    images also files [num]. The predicted elements of example i: sets[i][mask[i]].

    Where the data has targets, the scores are shown, or why there are none. An image of a folder
    that cannot be read is named and left out, and the exit code is then 1. A program (--program)
    gives sets, mask and presence alone, and no scores. It is native code and runs with your rights:
    use only those you trust.
    """

    data: str
    """An .npz file or a folder of .npy files with inputs, and input_mask if need be, as for
    training; a .json file in COCO's format; or, where inputs are images, a folder of images."""
    out: Path
    """The .npz file to write."""
    run: Path | None = None
    """A run folder of msdspn train sets."""
    checkpoint: str | None = None
    """With --run: best (by validation; the default), latest, or a step."""
    weights: Path | None = None
    """A safetensors file of msdspn export --weights."""
    program: Path | None = None
    """A program of msdspn export --out; its inner steps and seed are fixed. It is native code: run
    only what you trust. It gets a process of its own, with limits of time and memory."""
    image_dir: Annotated[str | None, tyro.conf.arg(metavar="PATH")] = None
    """With a .json file: the folder of its images."""
    batch_size: int = 64
    """Inputs predicted at once."""
    overwrite: bool = False
    """Replace a file that is already there."""
    decoding: DecodingFlags = dataclasses.field(default_factory=Decoding)

    def execute(self) -> int:
        """Check the flags, read, predict, write; 1 if a file was left out."""
        self._check()
        if self.program is None:
            found, made_by, unread = self._by_model()
        else:
            found, made_by, unread = self._by_program(self.program)
        with as_user_error(self.out):
            content = io.BytesIO()
            np.savez(content, allow_pickle=False, **found)
            write_bytes(self.out, content.getvalue())
        number = int(found["mask"].sum())
        print(f"{number} elements in {len(found['sets'])} sets, {made_by}: {self.out}")
        for reason in unread:
            print(f"msdspn predict: left out: {printable(reason)}", file=sys.stderr)
        bad = int((~np.isfinite(found["sets"]).all((1, 2))).sum())
        if bad:
            print(
                f"msdspn predict: {bad} predictions are not finite: the inner minimisation diverged"
                " there; they hold no element",
                file=sys.stderr,
            )
        return 1 if unread or bad else 0

    def _by_model(self) -> tuple[dict[str, np.ndarray], str, tuple[str, ...]]:
        import jax

        from msdspn_jax._cache import enable_compilation_cache
        from msdspn_jax.tasks.sets.scores import PRESENCE_THRESHOLD, averages, predict_all
        from msdspn_jax.tasks.sets.source import load_for_prediction

        how = self.decoding
        enable_compilation_cache()
        model: Any = trained.find(
            run=self.run, weights=self.weights, checkpoint=self.checkpoint, tasks=("sets",)
        )
        model = model.with_starts(how.num_starts)
        form = model.config.form
        arrays, files, unread, no_scores = load_for_prediction(
            self.data, form, images=self.image_dir
        )
        found, scores = predict_all(
            model.predictor, model.variables, arrays, jax.random.key(how.seed),
            inner_steps=how.inner_steps, batch_size=self.batch_size, key_each=False,
        )  # fmt: skip
        if no_scores is not None:
            print(f"msdspn predict: no scores: {printable(no_scores)}", file=sys.stderr)
        if "targets" in arrays:
            _show(averages(scores))
            if model.config.data == str(Path(self.data).absolute()):
                print(
                    "The model was trained on most of this data, so these scores flatter it. Of"
                    f" what was held out: msdspn evaluate {self.run or 'RUN'}"
                )
        found["energy"] = scores["inner_energy"]
        found["gradient_norm"] = scores["inner_gradient_norm"]
        found = self._completed(found, form.names, files, PRESENCE_THRESHOLD)
        return found, f"step {model.step}", unread

    def _by_program(self, path: Path) -> tuple[dict[str, np.ndarray], str, tuple[str, ...]]:
        from msdspn_jax.tasks.sets.format import Format
        from msdspn_jax.tasks.sets.source import load_for_prediction
        from msdspn_jax.trained.isolated import IsolatedProgram

        with IsolatedProgram(path, task="sets") as program:
            settings = program.settings
            names, shape = tuple(settings["names"]), tuple(settings["input_shape"])
            features = 0 if settings["kind"] == "images" else shape[-1]
            form = Format(  # The program has the scales inside.
                kind=settings["kind"], input_shape=shape, set_size=settings["set_size"],
                names=names, presence=settings["presence"],
                shift=(0.0,) * len(names), scale=(1.0,) * len(names),
                input_shift=(0.0,) * features, input_scale=(1.0,) * features,
            )  # fmt: skip
            arrays, files, unread, _ = load_for_prediction(self.data, form, images=self.image_dir)
            inputs = [arrays[name] for name in ("inputs", "input_mask") if name in arrays]
            num = len(inputs[0])
            width = min(self.batch_size, num)
            batches = []
            with ProgressBar("predicting") as report:
                for start in range(0, num, width):
                    # Filled up, so that one compiled program serves all.
                    rows = np.minimum(np.arange(start, start + width), num - 1)
                    batches.append(program.predict(*(x[rows] for x in inputs)).result())
                    report(min(start + width, num), num)
        sets = np.concatenate(batches)[:num]
        found = {"sets": sets}
        if form.presence:
            found = {"sets": sets[..., :-1], "presence": sets[..., -1]}
        found = self._completed(found, names, files, settings["threshold"])
        return found, f"by {path}", unread

    def _completed(
        self,
        found: dict[str, np.ndarray],
        names: tuple[str, ...],
        files: list[str] | None,
        threshold: float,
    ) -> dict[str, np.ndarray]:
        """With the mask, and the names of features and files."""
        how = self.decoding
        sets = found["sets"]
        # Where one number of a set is not finite, none of its elements is taken to be there.
        found["mask"] = np.tile(np.all(np.isfinite(sets), (1, 2))[:, None], sets.shape[1])
        if "presence" in found:
            chosen = threshold if how.threshold is None else how.threshold
            found["mask"] &= found["presence"] > chosen
        elif how.threshold is not None:
            raise UserError(
                "--threshold: expected none, as all sets of this model are of one size, got"
                f" {how.threshold}"
            )
        found["names"] = np.array(names)
        if files is not None:
            found["files"] = np.array(files)
        return found

    def _check(self) -> None:
        how = self.decoding
        given = {"run": self.run, "weights": self.weights, "program": self.program}
        trained.check_one(**given, checkpoint=self.checkpoint)
        if not any(given.values()):
            raise UserError(
                "--run: expected a run folder of msdspn train sets, or --weights or --program"
            )
        how.check(program=self.program, batch_size=self.batch_size)
        if self.out.suffix != ".npz" or os.path.isdir(self.out):
            raise UserError(f"--out: expected the name of an .npz file, got {self.out}")
        check_new(self.out, overwrite=self.overwrite)


def _show(scores: dict[str, float]) -> None:
    from rich.console import Console

    from msdspn_jax.commands.show import metrics_table

    Console().print(metrics_table({"mean": scores}, title="scores"))


def main(argv: list[str]) -> int:
    """Run the verb; returns the exit code."""
    if "--help" in argv or "-h" in argv:
        argv = ["--help"]
    return parse(
        PredictSets, argv, prog="msdspn predict", description=PredictSets.__doc__
    ).execute()
