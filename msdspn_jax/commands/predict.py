"""``msdspn predict``: from image files to objects, in pictures and as a scenes file."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import inspect
import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import numpy as np
import tyro

from msdspn_jax import trained
from msdspn_jax._files import as_user_error, write_text
from msdspn_jax._options import parse
from msdspn_jax.commands.decoding import Decoding, DecodingFlags, check_new
from msdspn_jax.commands.pictures import (
    Notes,
    Picture,
    Reading,
    collect,
    in_utf8,
    printable,
    read_picture,
    unique_names,
)
from msdspn_jax.errors import UserError

if TYPE_CHECKING:
    from msdspn_jax.clevr.objects import ClevrScene

_LARGEST = 1e6
_THREADS = 4
_LISTED = 8


class Predictor(NamedTuple):
    """Whatever predicts: a run, a weights file or a program."""

    predict: Callable[[Any], Callable[[], np.ndarray]]
    """Begins with uint8 [batch, size, size, 3]; what it returns waits for the float32 [batch, n,
    19]."""
    size: int
    threshold: float
    facts: dict[str, Any]
    """For the file's header."""
    close: Callable[[], None] = lambda: None
    """Call it when there is nothing more to predict."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Predict:
    r"""Find the objects in images: annotated pictures and predictions.json in the CLEVR format.

    Without --run, --weights or --program, the model that comes with the package predicts: "the
    model in the box", whose card is msdspn_jax/assets/clevr_small.md.

    PNG, JPEG, WebP and BMP files are read, of at most 33 million pixels and 64 MiB, of any size:
    they are squashed to the square that the model was trained on, as CLEVR's 480x320 pictures are.
    Of an animation the first picture counts; EXIF orientation is followed; of 16 bits the high
    eight are used; grey, palette and CMYK become RGB without colour profiles; what is transparent
    is laid over mid-grey, close to CLEVR's background.

    IMAGE may be a file, a folder, a pattern such as 'scenes/*.png' (** goes into folders) that the
    shell has left as it is, or - for an image by standard input. --json writes what is in
    predictions.json to standard output, and everything else to standard error; it needs no --out.

    A file that cannot be read is named and skipped, and the exit code is then 1. There is a scene
    for every image that was read; each of its objects has a score, best first. The model in the box
    is calibrated: its score is the share of objects of such a score that were right, all four
    attributes and within one unit, on procedural scenes that it was not trained on. On images
    unlike those it means less. Other models (--run) give the presence as it is: trained towards 1
    for objects and 0 for none, it ranks objects and is no probability; values below 0 and above 1
    happen. "score" in the file says which it is.

    Where as many objects are found as the model has elements, there may be more: that is said, and
    the scene has "full": true.

    An image whose name another one has already gets a number (image-2.png). What a name cannot have
    everywhere becomes _ in image_filename (a backslash, control characters, bytes that are not
    UTF-8); "source" is the path as it was given, with such bytes as \xff.

    A program (--program) is native code and runs with your rights: use only those you trust.

    For a run of msdspn train sets: msdspn predict --run RUN --data FILE.npz --out predictions.npz
    (msdspn predict --data --help).
    """

    images: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE...")]
    """Image files, patterns, - (standard input), or folders: then all *.png, *.jpg, *.jpeg, *.webp
    and *.bmp in them (not deeper)."""
    out: Path | None = None
    """Folder to write to: predictions.json and pictures/. Needed without --json."""
    json: bool = False
    """Write the predictions to standard output as JSON, and nothing else there."""
    run: Path | None = None
    """A run folder of msdspn train clevr."""
    checkpoint: str | None = None
    """With --run: best (by validation; the default), latest, or a step."""
    weights: Path | None = None
    """A safetensors file of msdspn export --weights."""
    program: Path | None = None
    """A program of msdspn export --out; its inner steps and seed are fixed. It is native code: run
    only what you trust. It gets a process of its own, with limits of time and memory."""
    time_limit: float = 600.0
    """With --program: seconds that a batch may take, compilation included."""
    batch_size: int = 32
    """Images predicted at once."""
    pictures: bool = True
    """Draw every image with its objects (about half a second each)."""
    scenes: Path | None = None
    """A scenes file with the true objects of images of these names: average precision by both
    protocols, into scores.json as well, and the truth drawn into the pictures."""
    overwrite: bool = False
    """Replace predictions that are already in the folder."""
    decoding: DecodingFlags = dataclasses.field(default_factory=Decoding)

    def execute(self) -> int:
        """Check the flags, read, predict, write; 1 if a file was skipped."""
        import msdspn_jax

        self._check()
        notes = Notes()
        pictures = collect(self.images, notes)
        truth = None if self.scenes is None else _truth(self.scenes, pictures)
        if not pictures:
            print("msdspn predict: nothing to predict", file=sys.stderr)
            return 1
        predictor = self._predictor()
        try:
            found = self._predict(predictor, pictures, notes)
        finally:
            predictor.close()
        if not found:
            print("msdspn predict: no image could be read; nothing was written", file=sys.stderr)
            return 1
        entries = [scene_entry(p, objects, predictor.threshold) for p, objects in found]
        notes.show(entries)
        info = {
            "version": f"msdspn_jax {msdspn_jax.__version__}",
            "threshold": predictor.threshold,
            **predictor.facts,
        }
        content: dict[str, Any] = {"info": info, "scenes": entries}
        if self.out is not None:
            with as_user_error(self.out):
                (self.out / "scores.json").unlink(missing_ok=True)  # Of what is replaced now.
        self._write("predictions.json", content)
        _list(entries, self._say)
        if truth is not None:
            content["scores"] = self._score(found, truth)
            self._write("scores.json", content["scores"])
        if self.pictures and self.out is not None:
            self._draw(found, truth or {}, predictor.threshold, notes)
        number = sum(len(entry["objects"]) for entry in entries)
        where = ""
        if self.out is not None:
            where = f": {printable(str(self.out / 'predictions.json'))}"
            if self.pictures:
                where += f", pictures in {printable(str(self.out / 'pictures'))}"
        self._say(f"{number} objects in {len(entries)} images{where}")
        if self.json:
            print(json.dumps(content, indent=1))
        if notes.wrong:
            print(f"msdspn predict: {notes.wrong} skipped, named above", file=sys.stderr)
        return 1 if notes.wrong else 0

    def _say(self, text: str) -> None:
        """A line for people."""
        print(text, file=sys.stderr if self.json else sys.stdout)

    def _check(self) -> None:
        how = self.decoding
        if not self.images:
            raise UserError("no images given; see msdspn predict --help, and predict --data --help")
        if self.out is None and not self.json:
            raise UserError("give --out FOLDER, --json, or both")
        how.check(program=self.program, batch_size=self.batch_size)
        if not 0 < self.time_limit < float("inf"):
            raise UserError(f"--time-limit: expected a number > 0, got {self.time_limit}")
        if self.out is None:
            return
        # os.path says of names that no file can have that they do not exist; pathlib raises.
        if os.path.exists(self.out) and not os.path.isdir(self.out):
            raise UserError(f"{self.out} is a file; --out needs a folder")
        check_new(self.out / "predictions.json", overwrite=self.overwrite)

    def _predictor(self) -> Predictor:
        how = self.decoding
        if self.program is not None:
            return self._isolated(self.program)
        from msdspn_jax._cache import compiled_once
        from msdspn_jax.trained.calibration import NO_PROBABILITY, SCORE
        from msdspn_jax.trained.weights import sees

        found: Any = trained.find(run=self.run, weights=self.weights, checkpoint=self.checkpoint)
        found = found.with_starts(how.num_starts)
        config: Any = found.config
        score = SCORE if found.calibration else NO_PROBABILITY
        if found.calibration and (how.inner_steps or how.num_starts):
            score += "; fitted with the inner steps and initial sets of the model, not with these"
        facts = {
            "source": in_utf8(found.source),
            "model": config.model,
            "step": found.step,
            "inner_steps": found.num_inner_steps(how.inner_steps),
            "num_starts": config.at_evaluation.get("num_starts"),
            "seed": how.seed,
            "size": config.size,
            "sees": sees(config),
            "score": score,
        }
        run = compiled_once(
            functools.partial(found.predict, inner_steps=how.inner_steps, seed=how.seed),
            "predict",
            found.task_name,
            config.to_dict(),
            found.calibration,
            how.inner_steps,
            how.seed,
        )

        def predict(images: Any) -> Callable[[], np.ndarray]:
            return functools.partial(np.asarray, run(found.variables, images))

        threshold = found.threshold if how.threshold is None else how.threshold
        return Predictor(predict, config.size, threshold, facts)

    def _isolated(self, path: Path) -> Predictor:
        from msdspn_jax.trained.calibration import NO_PROBABILITY
        from msdspn_jax.trained.isolated import IsolatedProgram

        how = self.decoding
        trained.check_one(
            run=self.run, weights=self.weights, program=path, checkpoint=self.checkpoint
        )
        program = IsolatedProgram(path, time_limit=self.time_limit)
        settings = program.settings
        names = ("model", "step", "inner_steps", "num_starts", "seed", "size", "sees")
        facts = {"source": in_utf8(program.source)} | {k: settings.get(k) for k in names}
        facts["score"] = settings.get("score", NO_PROBABILITY)
        threshold = settings["threshold"] if how.threshold is None else how.threshold
        return Predictor(
            lambda images: program.predict(images).result,
            settings["size"],
            threshold,
            facts,
            program.close,
        )

    def _predict(
        self, predictor: Predictor, pictures: list[Picture], notes: Notes
    ) -> list[tuple[Picture, np.ndarray]]:
        """Every image that could be read, with its elements, the most confident first."""
        from msdspn_jax._progress import ProgressBar
        from msdspn_jax.clevr.objects import CLEVR_LAYOUT

        width = min(self.batch_size, len(pictures))
        read = functools.partial(read_picture, size=predictor.size)
        found: list[tuple[Picture, np.ndarray]] = []

        def receive(readings: list[Reading], wait: Callable[[], np.ndarray]) -> None:
            for reading, array in zip(readings, wait(), strict=False):
                if not np.abs(array).max() <= _LARGEST:  # So it is where there is a NaN.
                    notes.skip(
                        f"{reading.picture.path}: the prediction is not finite, or beyond"
                        f" {_LARGEST:g}"
                    )
                    continue
                notes.count(reading, predictor.size)
                order = np.argsort(-array[:, CLEVR_LAYOUT.presence], kind="stable")
                found.append((reading.picture, array[order]))

        with ProgressBar("predicting") as report, _pool() as pool:
            # While the device works on a batch, the next one is read.
            waiting = None
            for start in range(0, len(pictures), width):
                readings = []
                for result in pool.map(read, pictures[start : start + width]):
                    if isinstance(result, UserError):
                        notes.skip(str(result))
                    else:
                        readings.append(result)
                if waiting is not None:
                    receive(*waiting)
                    report(start, len(pictures))
                waiting = None
                if readings:
                    # Filled up, so that one compiled program serves all.
                    rows = np.minimum(np.arange(width), len(readings) - 1)
                    batch = np.stack([reading.image for reading in readings])[rows]
                    waiting = readings, predictor.predict(batch)
            if waiting is not None:
                receive(*waiting)
        return found

    def _score(
        self, found: list[tuple[Picture, np.ndarray]], truth: dict[str, ClevrScene]
    ) -> dict[str, Any]:
        """Average precision, printed as a table."""
        from rich.console import Console
        from rich.table import Table

        from msdspn_jax.clevr.metrics import AP_THRESHOLDS, average_precision
        from msdspn_jax.clevr.objects import encode

        known = [(truth[p.path.name], array) for p, array in found if p.path.name in truth]
        if not any(scene.objects for scene, _ in known):
            raise UserError(f"{self.scenes}: no objects in any image that was read")
        predictions = np.stack([array for _, array in known])
        targets = np.stack([encode(scene.objects) for scene, _ in known])
        rows = {
            "per image": average_precision(predictions, targets, protocol="per_image"),
            "data set": average_precision(predictions, targets, protocol="dataset"),
        }
        names = ["∞" if np.isinf(t) else f"{t:g}" for t in AP_THRESHOLDS]
        table = Table(title=f"average precision, %, {len(known)} images", title_justify="left")
        table.add_column("protocol")
        for name in names:
            table.add_column(f"AP{name}", justify="right")
        for name, scores in rows.items():
            table.add_row(name, *(f"{100 * x:.1f}" for x in scores))
        Console(stderr=self.json).print(table)
        if len(known) < len(found):
            self._say(f"not in {self.scenes}, not scored: {len(found) - len(known)}")
        # Named as in the metrics of msdspn evaluate.
        scores = {
            f"{prefix}_{threshold:g}": float(value)
            for prefix, values in zip(("ap", "dataset_ap"), rows.values(), strict=True)
            for threshold, value in zip(AP_THRESHOLDS, values, strict=True)
        }
        return {"images": len(known), **scores}

    def _draw(
        self,
        found: list[tuple[Picture, np.ndarray]],
        truth: dict[str, ClevrScene],
        threshold: float,
        notes: Notes,
    ) -> None:
        from msdspn_jax import plots
        from msdspn_jax._progress import ProgressBar
        from msdspn_jax.clevr.entries import scene_camera
        from msdspn_jax.clevr.objects import encode
        from msdspn_jax.clevr.plots import scene as draw_scene

        assert self.out is not None
        folder = self.out / "pictures"
        names = unique_names([f"{Path(p.name).stem}.png" for p, _ in found])
        with as_user_error(folder), ProgressBar("drawing") as report:
            for i, ((picture, array), name) in enumerate(zip(found, names, strict=True)):
                report(i, len(found))
                known = truth.get(picture.path.name)
                try:
                    image = picture.read()
                except UserError as error:
                    notes.skip(f"{error}; it could be read before")
                    continue
                figure = draw_scene(
                    image,
                    array,
                    None if known is None else encode(known.objects),
                    camera=None if known is None else scene_camera(known),
                    threshold=threshold,
                    title=picture.name,
                )
                plots.save(figure, folder / name)

    def _write(self, name: str, content: Any) -> None:
        if self.out is None:
            return
        with as_user_error(self.out / name):
            write_text(self.out / name, json.dumps(content, indent=1) + "\n")


def scene_entry(picture: Picture, elements: np.ndarray, threshold: float) -> dict[str, Any]:
    """An entry of a scenes file, every object with its score."""
    from msdspn_jax.clevr.entries import scene_to_json
    from msdspn_jax.clevr.objects import ClevrScene, decode

    objects = decode(elements, threshold=threshold)
    entry = scene_to_json(ClevrScene(picture.name, tuple(objects)))
    entry["source"] = in_utf8(str(picture.path))
    if len(objects) == len(elements):
        entry["full"] = True
    for written, o in zip(entry["objects"], objects, strict=True):
        written["score"] = o.score
    return entry


def _truth(path: Path, pictures: list[Picture]) -> dict[str, ClevrScene]:
    """True scenes by file name."""
    from msdspn_jax.clevr.entries import scene_camera
    from msdspn_jax.clevr.files import read_scenes

    scenes = {scene.image_filename: scene for scene in read_scenes(path)}
    counts = Counter(p.path.name for p in pictures if p.path.name in scenes)
    if not counts:
        raise UserError(f"{path}: has no scene of any of these images (names are compared)")
    name, number = counts.most_common(1)[0]
    if number > 1:
        raise UserError(f"{path}: {number} of the images are called {name}; which one is meant?")
    for name in counts:
        # Before any work, if it is damaged.
        scene_camera(scenes[name], f"{path}: {name}")
        for i, o in enumerate(scenes[name].objects):
            if max(map(abs, (*o.position, o.score))) > _LARGEST:
                raise UserError(
                    f"{path}: {name}.objects[{i}]: expected coordinates and a score up to"
                    f" {_LARGEST:g}, got {o.position} and {o.score}"
                )
    return {name: scenes[name] for name in counts}


def _list(entries: list[dict[str, Any]], say: Callable[[str], None]) -> None:
    """The objects of the first images, in words."""
    from msdspn_jax.clevr.entries import parse_scene

    for entry in entries[:_LISTED]:
        number = len(entry["objects"])
        more = ", all that the model can say" if entry.get("full") else ""
        say(f"{entry['image_filename']}: {number} object{'' if number == 1 else 's'}{more}")
        for o in parse_scene(entry).objects:
            say(f"  {o.score:.2f}  {o}")
    if len(entries) > _LISTED:
        say(f"and {len(entries) - _LISTED} more images")


def _pool() -> concurrent.futures.ThreadPoolExecutor:
    return concurrent.futures.ThreadPoolExecutor(_THREADS)


def _description(argv: list[str]) -> str:
    """The text of --help; what the model in the box sees is read from its file, if asked for."""
    text = inspect.cleandoc(Predict.__doc__ or "")
    if not {"-h", "--help"} & {*argv}:
        return text
    from msdspn_jax.trained.weights import box_model_sees

    found = box_model_sees()
    return text if found is None else f"{text}\n\nThe model in the box sees {found}."


def main(argv: list[str]) -> int:
    """Run the verb; returns the exit code."""
    for word in argv:
        if word.split("=")[0] == "--artefact":
            raise UserError("--artefact is now called --program")
        if word.split("=")[0] == "--data":
            from msdspn_jax.commands import predict_sets

            return predict_sets.main(argv)
    options = parse(Predict, argv, prog="msdspn predict", description=_description(argv))
    # Names may have letters that the terminal's encoding does not.
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="backslashreplace")
    return options.execute()
