"""Data of one's own: ``msdspn train sets --data FILE.npz``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from msdspn_jax import _check
from msdspn_jax.errors import EmptySplit, UserError
from msdspn_jax.tasks.evaluation import inner_scores
from msdspn_jax.tasks.sets import scores
from msdspn_jax.tasks.sets.config import Config
from msdspn_jax.tasks.sets.data import fitted, split_indices
from msdspn_jax.tasks.sets.model import MONITOR, build_predictor
from msdspn_jax.training.outer import outer_optimizer
from msdspn_jax.training.task import Task, epoch_positions

__all__ = ["Config", "build", "build_predictor"]


def build(config: Config) -> Task:
    """The task that a configuration describes.

    Reads the data only where the configuration does not say its format yet.
    """
    predictor = build_predictor(config)
    config = predictor.config

    @functools.cache
    def everything() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        data = config.load()
        if config.form.fingerprint not in ("", data.fingerprint):
            raise UserError(
                f"{config.data}: expected the data that the run began with, got others, of which"
                " nobody knows what was trained on; to go on with them, begin another run with"
                " --init-from"
            )
        return fitted(data, config.form), split_indices(data, config.split_seed)

    def split_of(split: str) -> dict[str, np.ndarray]:
        arrays, index = everything()
        return {name: array[index[split]] for name, array in arrays.items()}

    def loss(variables, batch, keys, *, stage, axis_name):
        losses, prediction, state = predictor.loss(
            variables, batch, keys, inner_steps=stage, axis_name=axis_name
        )
        inner = {name: jnp.mean(x) for name, x in inner_scores(prediction.minimum).items()}
        return jnp.mean(losses), (inner, state)

    def evaluate(variables, split, key):
        _check.require_choice("split", split, ("train", "val", "test"))
        arrays = split_of(split)
        if not len(arrays["inputs"]):
            raise EmptySplit(f"split: expected examples for {split} in {config.data}, got none")
        return scores.evaluate(predictor, variables, arrays, key)

    def figures(variables, folder):
        scores.draw_figures(predictor, variables, split_of("val"), Path(folder))

    form = config.form
    return Task(
        name="sets",
        init=predictor.init,
        loss=loss,
        evaluate=evaluate,
        optimizer=outer_optimizer(config),
        monitor=MONITOR,
        stage=config.stages(),
        figures=figures,
        describe={"inputs": form.kind, "set_size": form.set_size, "set_dim": form.set_dim},
        **_sampling(config, split_of),
    )


def _sampling(config: Config, split_of: Callable[[str], dict[str, np.ndarray]]) -> dict[str, Any]:
    """The fields of `Task` that say where training batches come from."""
    train = functools.cache(lambda: split_of("train"))

    def positions(key, step, slots, size):
        return epoch_positions(key, step, slots, batch_size=config.batch_size, size=size)

    def select(key, step, slots, data):
        index = positions(key, step, slots, len(data["inputs"]))
        return {name: array[index] for name, array in data.items()}

    if config.data_on == "device":
        return {"sample": select, "data": train}

    def copy(key, step, slots):
        index = np.asarray(positions(key, step, slots, len(train()["inputs"])))
        return {name: array[index] for name, array in train().items()}

    return {"sample": copy, "host_data": True}
