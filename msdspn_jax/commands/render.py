"""``msdspn render``: CLEVR-like scenes as PNG files and a scenes file."""

import dataclasses
import io
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from msdspn_jax._files import as_user_error, write_bytes, write_text
from msdspn_jax._options import parse
from msdspn_jax._progress import ProgressBar
from msdspn_jax.clevr.objects import MAX_OBJECTS
from msdspn_jax.errors import UserError

_BATCH, _SIZE = 16, 128


@dataclasses.dataclass(frozen=True)
class Render:
    """Render scenes of a file, or fresh ones drawn by the generator's rules.

    Writes OUT/images/SPLIT/*.png and OUT/scenes/CLEVR_SPLIT_scenes.json, the layout of CLEVR_v1.0,
    which `msdspn data clevr --source OUT` reads.
    """

    out: Path
    """Folder to write to."""
    scenes: Path | None = None
    """A scenes file to render. Camera and lamps are those it records, or else the mean ones."""
    seed: int | None = None
    """Draw fresh scenes from this seed; scene i does not depend on how many are drawn."""
    num: int | None = None
    """How many fresh scenes; of a scenes file, only the first so many."""
    min_objects: int = 3
    """Fewest objects of a fresh scene."""
    max_objects: int = MAX_OBJECTS
    """Most objects of a fresh scene."""
    size: int | None = None
    """Side of the square images, pixels. Default: 128."""
    full: bool = False
    """Render the unsquashed 480x320 image instead; --size does not go with it."""
    quality: str = "default"
    """fast, default or high: 1, 4 or 16 samples a pixel."""
    split: str = "train"
    """Name of the split in folder and file names."""
    overwrite: bool = False
    """Replace a scenes file that is already there."""

    def run(self) -> int:
        """Check the flags, render, write."""
        from msdspn_jax.clevr.render.trace import QUALITIES

        if (self.scenes is None) == (self.seed is None):
            raise UserError("give either --scenes FILE or --seed S (with --num N)")
        if self.seed is not None and self.num is None:
            raise UserError("--seed needs --num, the number of scenes")
        if self.num is not None and self.num < 1:
            raise UserError(f"--num: expected at least 1, got {self.num}")
        if not 1 <= self.min_objects <= self.max_objects <= MAX_OBJECTS:
            raise UserError(
                f"--min-objects, --max-objects: expected 1 <= min <= max <= {MAX_OBJECTS}, got"
                f" {self.min_objects} and {self.max_objects}"
            )
        if self.full and self.size is not None:
            raise UserError(f"--size: expected none with --full, which is 480x320, got {self.size}")
        if self.size is not None and not 1 <= self.size <= 4096:
            raise UserError(f"--size: expected 1 to 4096, got {self.size}")
        if self.quality not in QUALITIES:
            raise UserError(
                f"--quality: expected one of {', '.join(QUALITIES)}, got {self.quality!r}"
            )
        if not self.split.isidentifier():
            raise UserError(f"--split: expected a plain word, got {self.split!r}")
        scenes_file = self.out / "scenes" / f"CLEVR_{self.split}_scenes.json"
        if scenes_file.exists() and not self.overwrite:
            raise UserError(f"{scenes_file} exists; give --overwrite to replace it")
        batches = self._from_file() if self.scenes is not None else self._drawn()
        # The first batch before anything is written: a bad file leaves no folder behind.
        batches = itertools.chain([next(batches)], batches)
        image_folder = self.out / "images" / self.split
        with as_user_error(self.out):
            # Before the first image is rendered: whether there can be any.
            scenes_file.parent.mkdir(parents=True, exist_ok=True)
            # Else, if stopped before the end, new images would have the old scenes.
            scenes_file.unlink(missing_ok=True)
            entries = self._write(batches, image_folder)
            info = {"split": self.split, "license": "", "version": "msdspn_jax", "date": ""}
            write_text(scenes_file, json.dumps({"info": info, "scenes": entries}))
        print(f"{len(entries)} images in {image_folder}, scenes in {scenes_file}")
        return 0

    def _write(self, batches: "Iterator[tuple[int, Any, list]]", folder: Path) -> list:
        import jax
        import numpy as np
        from PIL import Image

        from msdspn_jax._cache import compiled_once
        from msdspn_jax.clevr.render.trace import render
        from msdspn_jax.clevr.scene import Scene

        size = (320, 480) if self.full else self.size or _SIZE
        rendered = compiled_once(
            lambda *scenes: render(Scene(*scenes), size, quality=self.quality),
            "render",
            size,
            self.quality,
        )
        entries = []
        with ProgressBar("rendering") as report:
            for total, scenes, batch in batches:
                report(len(entries), total)
                # The last batch is filled up, so that one compiled program serves all.
                rows = np.minimum(np.arange(min(_BATCH, total)), len(batch) - 1)
                padded = jax.tree.map(lambda x, rows=rows: np.asarray(x)[rows], scenes)
                images = np.asarray(rendered(*padded))
                for image, entry in zip(images, batch, strict=False):
                    png = io.BytesIO()
                    Image.fromarray(image).save(png, format="png")
                    write_bytes(folder / entry["image_filename"], png.getvalue())
                    entries.append(entry)
                    report(len(entries), total)
        return entries

    def _from_file(self) -> Iterator[tuple[int, Any, list]]:
        from msdspn_jax.clevr.entries import scene_to_json
        from msdspn_jax.clevr.files import read_scenes
        from msdspn_jax.clevr.scene import scene_arrays, setting_entry, stack_scenes

        parsed = read_scenes(self.scenes)[: self.num]  # type: ignore[arg-type]
        if not parsed:
            raise UserError(f"{self.scenes}: no scenes to render")
        # All of them, before the first image is written: a bad entry is told at once.
        arrays = [scene_arrays(p, f"{self.scenes}: scenes[{i}]") for i, p in enumerate(parsed)]
        for p in parsed:
            if not p.image_filename.endswith(".png"):
                raise UserError(f"{self.scenes}: expected *.png names, got {p.image_filename!r}")
        for start in range(0, len(parsed), _BATCH):
            group = arrays[start : start + _BATCH]
            entries = [
                {"split": self.split, **setting_entry(array), **scene_to_json(p)}
                for p, array in zip(parsed[start : start + _BATCH], group, strict=True)
            ]
            yield len(parsed), stack_scenes(group), entries

    def _drawn(self) -> Iterator[tuple[int, Any, list]]:
        import jax
        import numpy as np

        from msdspn_jax._cache import compiled_once
        from msdspn_jax.clevr.sampling import sample_scenes_from_keys
        from msdspn_jax.clevr.scene import Scene, scene_entry

        assert self.num is not None
        assert self.seed is not None
        width = min(_BATCH, self.num)
        objects = (self.min_objects, self.max_objects)

        root = jax.random.key_data(jax.random.key(self.seed))

        def draw(root, numbers):
            keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.wrap_key_data(root), numbers)
            return tuple(sample_scenes_from_keys(keys, num_objects=objects))

        drawn = compiled_once(draw, "scenes", objects)
        for start in range(0, self.num, width):
            scenes = Scene(*jax.device_get(drawn(root, start + np.arange(width))))
            count = min(width, self.num - start)
            entries = [
                scene_entry(jax.tree.map(lambda x, i=i: x[i], scenes), start + i, self.split)
                for i in range(count)
            ]
            yield self.num, scenes, entries


def main(argv: list[str]) -> int:
    """Run the verb; returns the exit code."""
    return parse(Render, argv, prog="msdspn render", description=Render.__doc__).run()
