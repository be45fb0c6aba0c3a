"""Where the images of CLEVR come from: fixed splits, and scenes drawn at every step."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from msdspn_jax import _check
from msdspn_jax._cache import user_cache_folder
from msdspn_jax._progress import ProgressBar
from msdspn_jax.clevr.cache import cache_folder, load_cache, prepare_cache
from msdspn_jax.clevr.procedural import ProceduralScenes, procedural_examples, rendered_set
from msdspn_jax.clevr.tfds import open_source
from msdspn_jax.errors import UserError
from msdspn_jax.tasks.clevr.config import PUBLISHED_TRAIN_SIZE, Config
from msdspn_jax.training.task import epoch_positions


def load_split(config: Config, split: Literal["train", "val", "test"]):
    """Images and objects of a fixed split, prepared where that has not been done before.

    Returns arrays images [num, size, size, 3] and objects [num, set_size, 19], memory-mapped.

    Raises:
        UserError: the data is missing or damaged, or has fewer images than asked for.
    """
    cache_dir = Path(config.cache_dir) if config.cache_dir else user_cache_folder() / "clevr"
    sizes = {"train": config.train_size, "val": config.val_size, "test": config.test_size}
    _check.require_choice("split", split, sizes)
    if split == "train" and config.fresh:
        raise ValueError("split: expected val or test, as scenes for training are fresh, got train")
    number = sizes[split]
    with ProgressBar(f"clevr {split} images") as report:
        if config.data == "procedural":
            source = ProceduralScenes(
                split,
                number or PUBLISHED_TRAIN_SIZE,
                size=config.size,
                seed=config.data_seed,
                **config.render_options(),
            )
            cache = rendered_set(source, cache_dir, on_progress=report)
            return cache.images, cache.objects[:, : config.set_size]
        assert config.data_dir is not None
        published = "val" if split == "test" else "train"
        prepared = cache_folder(config.data_dir, published, config.size)
        if not (prepared / "manifest.json").exists():
            recorded = open_source(config.data_dir, published)
            prepared = cache_folder(cache_dir / recorded.fingerprint[:16], published, config.size)
            prepare_cache(recorded, prepared, size=config.size, on_progress=report)
    cache = load_cache(prepared)
    # Validation images are held out of the training split: the published one is for the scores.
    limit = len(cache) if split == "test" else len(cache) - config.val_size
    first, available = (limit, config.val_size) if split == "val" else (0, limit)
    if number is None or split == "test":
        number = min(number or available, available)
    if first < 0 or not 0 < number <= available:
        raise UserError(
            f"{prepared}: expected at least {max(number, 1)} images for the {split} split, got "
            f"{max(first if split == 'val' else available, 0)} of {len(cache)} (val_size ="
            f" {config.val_size} are held out of the training split)"
        )
    chosen = slice(first, first + number)
    return cache.images[chosen], cache.objects[chosen, : config.set_size]


def sampling(config: Config) -> dict[str, Any]:
    """The fields of `Task` that say where training batches come from; touches no data yet."""
    if config.fresh:
        return {"sample": _drawn(config)}

    def positions(key, step, slots, size):
        return epoch_positions(key, step, slots, batch_size=config.batch_size, size=size)

    if config.images_on == "host":

        @functools.cache
        def train():
            return load_split(config, "train")

        def copy(key, step, slots):
            images, objects = train()
            index = np.asarray(positions(key, step, slots, len(images)))
            return {"images": images[index], "objects": objects[index]}

        return {"sample": copy, "host_data": True}

    def select(key, step, slots, data):
        index = positions(key, step, slots, len(data["images"]))
        return {name: array[index] for name, array in data.items()}

    def data():
        images, objects = load_split(config, "train")
        return {"images": np.asarray(images), "objects": np.asarray(objects)}

    return {"sample": select, "data": data}


def _drawn(config: Config):
    def draw(key, step, slots):
        step_key = jax.random.fold_in(key, step)
        keys = jax.vmap(lambda slot: jax.random.fold_in(step_key, slot))(slots)
        images, objects = procedural_examples(keys, config.size, **config.render_options())
        return {"images": images, "objects": objects[:, : config.set_size]}

    return draw
