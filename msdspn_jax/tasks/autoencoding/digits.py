"""Handwritten digits as point sets, autoencoded: real input, no download.

msdspn train digits
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp

from msdspn_jax.tasks.autoencoding.digits_data import SPLITS, load_point_sets, split_indices
from msdspn_jax.tasks.autoencoding.task import AutoencoderConfig, autoencoding_task
from msdspn_jax.training.task import Task, epoch_positions


@dataclass(frozen=True, kw_only=True)
class Config(AutoencoderConfig):
    """Autoencode scikit-learn's 1,797 handwritten digits as sets of points.

    An element is (x, y, intensity, presence) of a bright pixel; sets vary in size, absent elements
    are zero.
    """

    steps: int = 5_000
    """Training steps (one step: one batch)."""
    batch_size: int = 64
    """Examples a step, over all devices together."""
    evaluate_every: int = 500
    """Steps between evaluations on the validation split (and one at the end)."""
    hidden_dim: int = 256
    """Width of the set encoders' hidden layer."""
    latent_dim: int = 128
    """Width of the latent vector."""
    inner_learning_rate: float = 3.0
    """Step size of the inner minimisation; at 1 the sets of 34 elements move slowly."""
    loss: Literal["chamfer", "hungarian"] = "hungarian"
    """Distance between sets: chamfer (cheap, blind to multiplicity) or hungarian (one to one)."""
    min_intensity: int = 5
    """Pixels at least this bright (of 16) are elements; 5 makes sets of 16 to 34."""
    split_seed: int = 0
    """Which images are for training (1,437), validation (180) and test (180)."""


def build(config: Config) -> Task:
    """The task of a configuration."""
    sets = load_point_sets(min_intensity=config.min_intensity).sets
    parts = {k: sets[v] for k, v in split_indices(config.split_seed).items()}
    _, n, d = sets.shape

    def sample(key, step, slots):
        indices = epoch_positions(
            key, step, slots, batch_size=config.batch_size, size=SPLITS["train"]
        )
        return jnp.asarray(parts["train"])[indices]

    def sets_at(key, split, indices):
        del key
        return jnp.asarray(parts[split])[indices]

    def draw(prediction, target):
        from msdspn_jax import plots

        return plots.digits({"target": target, "prediction": prediction})

    return autoencoding_task(
        "digits",
        config,
        set_size=n,
        set_dim=d,
        loss=config.loss,
        sample=sample,
        sets_at=sets_at,
        split_sizes={"val": SPLITS["val"], "test": SPLITS["test"]},
        draw=draw,
        describe=dict(SPLITS),
    )
