"""CLEVR object property prediction (paper, section 4.3): ``msdspn train clevr``."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from msdspn_jax._cache import user_cache_folder
from msdspn_jax._progress import ProgressBar
from msdspn_jax.errors import UserError
from msdspn_jax.tasks.clevr.model import (
    ENERGY_MODELS,
    MONITOR,
    Config,
    Prediction,
    build_predictor,
    outer_optimizer,
)
from msdspn_jax.tasks.clevr.scores import draw_figures, predict_all, score
from msdspn_jax.training.task import Task, epoch_positions

__all__ = ["MONITOR", "Config", "build", "build_predictor", "load_split", "outer_optimizer"]


def _drawn_per_step(config: Config) -> bool:
    return config.data == "procedural" and config.train_size == 0


def _render_options(config: Config) -> dict[str, Any]:
    return {
        "quality": config.render_quality,
        "num_objects": (config.min_objects, config.max_objects),
    }


def load_split(config: Config, split: Literal["train", "val", "test"]):
    """Images and objects of a fixed split, prepared where that has not been done before.

    Returns arrays images [num, size, size, 3] and objects [num, set_size, 19], memory-mapped.

    Raises:
      UserError: the data is missing or damaged, or has fewer images than asked for.
    """
    from msdspn_jax.clevr.cache import cache_folder, load_cache, prepare_cache
    from msdspn_jax.clevr.procedural import ProceduralScenes, rendered_set
    from msdspn_jax.clevr.tfds import open_source

    cache_dir = Path(config.cache_dir) if config.cache_dir else user_cache_folder() / "clevr"
    number = {"train": config.train_size, "val": config.val_size, "test": config.test_size}[split]
    with ProgressBar(f"clevr {split} images") as report:
        if config.data == "procedural":
            source = ProceduralScenes(
                split, number, size=config.size, seed=config.data_seed, **_render_options(config)
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
    if split == "test":
        number = min(number, available)
    number = number or available
    if not 0 < number <= available:
        raise UserError(
            f"{prepared}: {len(cache)} images are too few for {number} of the {split} split"
            f" (val_size {config.val_size} are held out of the training split)"
        )
    chosen = slice(first, first + number)
    return cache.images[chosen], cache.objects[chosen, : config.set_size]


def _sampling(config: Config) -> dict[str, Any]:
    """The `Task` fields that say where training batches come from."""
    if _drawn_per_step(config):
        from msdspn_jax.clevr.procedural import procedural_examples

        def draw(key, step, slots):
            step_key = jax.random.fold_in(key, step)
            keys = jax.vmap(lambda slot: jax.random.fold_in(step_key, slot))(slots)
            images, objects = procedural_examples(keys, config.size, **_render_options(config))
            return {"images": images, "objects": objects[:, : config.set_size]}

        return {"sample": draw}
    images, objects = load_split(config, "train")

    def positions(key, step, slots):
        return epoch_positions(key, step, slots, batch_size=config.batch_size, size=len(images))

    if config.images_on == "host":

        def copy(key, step, slots):
            index = np.asarray(positions(key, step, slots))
            return {"images": images[index], "objects": objects[index]}

        return {"sample": copy, "host_data": True}

    def select(key, step, slots, data):
        index = positions(key, step, slots)
        return {name: array[index] for name, array in data.items()}

    arrays = {"images": np.asarray(images), "objects": np.asarray(objects)}
    return {"sample": select, "data": arrays}


def build(config: Config) -> Task:
    """The task that a configuration describes."""
    predictor = build_predictor(config)

    def stage(step: int) -> int | None:
        if config.model not in ENERGY_MODELS:
            return None
        return config.inner_steps if 2 * step < config.steps else config.late_inner_steps

    def loss(variables, batch, keys, *, stage, axis_name):
        losses, prediction, state = predictor.loss(
            variables, batch["images"], batch["objects"], keys, inner_steps=stage,
            axis_name=axis_name,
        )  # fmt: skip
        return jnp.mean(losses), (_inner_metrics(prediction), state)

    def evaluate(variables, split, key):
        images, objects = load_split(config, split)
        found, inner = predict_all(predictor, variables, images, objects, key)
        return inner | score(found, objects)

    def figures(variables, folder):
        draw_figures(predictor, variables, *load_split(config, "val"), Path(folder))

    return Task(
        name="clevr",
        init=predictor.init,
        loss=loss,
        evaluate=evaluate,
        optimizer=outer_optimizer(config),
        monitor=MONITOR,
        stage=stage,
        stepwise=jax.default_backend() == "cpu",
        figures=figures,
        describe={
            "train_size": config.train_size or "fresh scenes, or all there are",
            "val_size": config.val_size,
            "test_size": config.test_size,
        },
        **_sampling(config),
    )


def _inner_metrics(prediction: Prediction) -> dict[str, Any]:
    if prediction.minimum is None:
        return {}
    return {
        "inner_energy": jnp.mean(prediction.minimum.energy),
        "inner_gradient_norm": jnp.mean(prediction.minimum.gradient_norm),
    }
