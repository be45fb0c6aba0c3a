"""Procedural CLEVR: from keys to images and objects, drawn as needed or as a fixed data set."""

from __future__ import annotations

import functools
import hashlib
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Key, UInt8

from msdspn_jax import _check
from msdspn_jax.clevr.cache import ClevrCache, load_cache, prepare_cache
from msdspn_jax.clevr.files import Record, checked_index
from msdspn_jax.clevr.objects import MAX_OBJECTS
from msdspn_jax.clevr.render.trace import QUALITIES, checked_size, render
from msdspn_jax.clevr.sampling import (
    MIN_OBJECTS,
    checked_num_objects,
    sample_scenes_from_keys,
)
from msdspn_jax.clevr.scene import scene_objects

#: The procedural splits are disjoint streams of keys; test is what scores are reported on.
SPLIT_SEEDS = {"train": 0, "val": 1, "test": 2}

# Increased when the same key no longer gives the same image.
_VERSION = 2


def procedural_examples(
    keys: Key[Array, " batch"],
    size: int | tuple[int, int] = 128,
    *,
    quality: str = "default",
    group: int | None = None,
    num_objects: tuple[int, int] = (MIN_OBJECTS, MAX_OBJECTS),
) -> tuple[UInt8[Array, "batch height width 3"], Float[Array, "batch 10 19"]]:
    """Draw and render one fresh scene per key, so that an example depends on its own key alone.

    Args:
        keys: random keys.
        size, quality, group: as in :func:`render`.
        num_objects: as in :func:`sampling.sample_scenes_from_keys`.

    Returns:
        Images, and objects in the layout of :mod:`msdspn_jax.clevr.objects`.
    """
    _check.require_rank("keys", keys, 1, "batch")
    _check.require_choice("quality", quality, QUALITIES)
    with jax.enable_x64(False):
        return _examples(keys, checked_size(size), quality, group, checked_num_objects(num_objects))


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _examples(keys, size, quality, group, num_objects):
    scenes = sample_scenes_from_keys(keys, group=group, num_objects=num_objects)
    return render(scenes, size, quality=quality, group=group), scene_objects(scenes)


def procedural_batch(
    key: Key[Array, ""],
    batch: int,
    size: int | tuple[int, int] = 128,
    *,
    quality: str = "default",
    group: int | None = None,
) -> tuple[UInt8[Array, "batch height width 3"], Float[Array, "batch 10 19"]]:
    """Draw and render ``batch`` fresh scenes in one jitted call.

    Example i is that of ``jax.random.split(key, batch)[i]``; see :func:`procedural_examples`.
    """
    keys = jax.random.split(key, batch)
    return procedural_examples(keys, size, quality=quality, group=group)


class ProceduralScenes:
    """A source of records (as `ClevrFolder` is one) whose images are rendered when asked for.

    Record i depends on split, seed and i alone, so that a longer data set begins with a shorter.
    """

    def __init__(
        self,
        split: str,
        num: int,
        *,
        size: int = 128,
        quality: str = "default",
        num_objects: tuple[int, int] = (MIN_OBJECTS, MAX_OBJECTS),
        seed: int = 0,
    ):
        """Describe a data set; nothing is rendered yet.

        Args:
            split: "train", "val" or "test".
            num: number of scenes.
            size, quality, num_objects: see `procedural_examples`.
            seed: another seed, other scenes.
        """
        _check.require_choice("split", split, SPLIT_SEEDS)
        _check.require_integer("num", num, 1)
        _check.require_integer("size", size, 1)
        _check.require_choice("quality", quality, QUALITIES)
        self.split, self.num, self.size, self.seed = split, int(num), int(size), seed
        self._options: dict[str, Any] = {
            "quality": quality,
            "num_objects": checked_num_objects(num_objects),
        }
        self._key = jax.random.fold_in(jax.random.key(SPLIT_SEEDS[split]), seed)
        # On a CPU one scene at a time is fastest; an accelerator wants many, rendered together.
        self._block = 1 if jax.default_backend() == "cpu" else 256
        self._lock = threading.Lock()
        self._last: tuple[int, Any] = (-1, None)

    @property
    def fingerprint(self) -> str:
        """Equal for equal data."""
        options = sorted(self._options.items())
        what = (_VERSION, self.split, self.seed, self.size, self.num, options)
        return "procedural-" + hashlib.sha256(repr(what).encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return self.num

    def __getitem__(self, index: Any) -> Record:
        index = checked_index(index, self.num)
        block, place = divmod(index, self._block)
        if self._block == 1:
            images, objects = self._render(block)
        else:
            with self._lock:
                if self._last[0] != block:
                    self._last = block, self._render(block)
                images, objects = self._last[1]
        name = f"CLEVR_procedural_{self.split}_{index:06d}.png"
        return {"image": images[place], "objects": objects[place], "file_name": name}

    def _render(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        index = np.arange(block * self._block, (block + 1) * self._block)
        keys = jax.vmap(lambda i: jax.random.fold_in(self._key, i))(index)
        images, objects = procedural_examples(keys, self.size, **self._options)
        return np.asarray(images), np.asarray(objects)


def rendered_set(
    source: ProceduralScenes,
    cache_dir: str | Path,
    *,
    on_progress: Callable[[int, int], None] | None = None,
) -> ClevrCache:
    """The images of a source, rendered at the first call and read from ``cache_dir`` later.

    May be interrupted and called again, see `prepare_cache`.

    Raises:
        UserError: the folder cannot be written, or holds something else.
    """
    folder = Path(cache_dir) / source.fingerprint
    threads = os.cpu_count() or 1
    prepare_cache(source, folder, size=source.size, threads=threads, on_progress=on_progress)
    return load_cache(folder)
