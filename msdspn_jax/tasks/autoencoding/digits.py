"""Handwritten digits as point sets, autoencoded: real input that needs no download.

Scikit-learn's 1,797 digits (8 by 8 pixels, 17 grey levels; UCI "Optical Recognition of Handwritten
Digits") stand in for the MNIST point sets of DSPN (arXiv 1906.06565).

msdspn train digits
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from msdspn_jax.tasks.autoencoding.config import AutoencoderConfig
from msdspn_jax.tasks.autoencoding.task import autoencoding_task
from msdspn_jax.training.config import Run, RunFlags
from msdspn_jax.training.task import Task, epoch_positions

PIXELS = 8
SPLITS = {"train": 1437, "val": 180, "test": 180}
SET_DIM = 4
SET_SIZES = (42, 39, 38, 36, 34, 32, 32, 30, 27, 26, 25, 24, 22, 20, 18, 17)
"""Elements of the largest set, by the least intensity from 1 to 16: n, known without the data."""


@dataclass(frozen=True, kw_only=True)
class Config(AutoencoderConfig):
    """Autoencode scikit-learn's 1,797 handwritten digits as sets of points.

    An element is (x, y, intensity, presence) of a bright pixel; sets vary in size, absent elements
    are zero.
    """

    experiment: ClassVar[str] = "digits"
    fixed: ClassVar[tuple[str, ...]] = ("split_seed",)

    steps: int = 5_000
    """Training steps (one step: one batch)."""
    batch_size: int = 64
    """Examples a step, over all devices together."""
    run: RunFlags = Run(evaluate_every=500)  # noqa: RUF009 (a value)
    """What is written while training, and how often; never changes the numbers."""
    hidden_dim: int = 256
    """Width of the set encoders' hidden layer."""
    latent_dim: int = 128
    """Width of the latent vector."""
    loss: Literal["chamfer", "hungarian"] = "hungarian"
    """Distance between sets: chamfer (cheap, blind to multiplicity) or hungarian (one to one)."""
    min_intensity: int = 5
    """Pixels at least this bright (of 16) are elements; 5 makes sets of 16 to 34."""
    split_seed: int = 0
    """Which images are for training (1,437), validation (180) and test (180)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_intensity(self.min_intensity)


def build(config: Config) -> Task:
    """The task of a configuration."""

    @lru_cache
    def sets_of(split):
        sets = load_point_sets(min_intensity=config.min_intensity).sets
        return sets[split_indices(config.split_seed)[split]]

    def sample(key, step, slots, data):
        indices = epoch_positions(
            key, step, slots, batch_size=config.batch_size, size=SPLITS["train"]
        )
        return data[indices]

    def draw(prediction, target):
        from msdspn_jax import plots

        return plots.digits({"target": target, "prediction": prediction})

    return autoencoding_task(
        "digits",
        config,
        set_size=SET_SIZES[config.min_intensity - 1],
        set_dim=SET_DIM,
        loss=config.loss,
        sample=sample,
        data=lambda: sets_of("train"),
        sets_at=lambda key, split, indices: jnp.asarray(sets_of(split))[indices],
        split_sizes={"val": SPLITS["val"], "test": SPLITS["test"]},
        draw=draw,
        describe=dict(SPLITS),
    )


# --- the data ---


class PointSets(NamedTuple):
    """Digits as padded point sets.

    Attributes:
        sets: [images, n, 4], float32: x and y of a pixel (−1.75 … 1.75 from the centre, y
            downwards: about unit variance), its intensity (0 … 1) and presence (1). Absent
            elements are all zero and come last.
        labels: which digit it is.
    """

    sets: Float[np.ndarray, "images n 4"]
    labels: Int[np.ndarray, " images"]


def load_point_sets(*, min_intensity: int = 5) -> PointSets:
    """All 1,797 digits, in scikit-learn's order; one element for every bright pixel.

    Args:
        min_intensity: pixels at least this bright are elements, 1 … 16. The largest set has as
            many as `SET_SIZES` says: 42 of them at 1, 34 at 5, 27 at 9; that is n.
    """
    _check_intensity(min_intensity)
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    images = digits.images
    bright = images >= min_intensity
    sets = np.zeros((len(images), SET_SIZES[min_intensity - 1], SET_DIM), np.float32)
    for target, image, mask in zip(sets, images, bright, strict=True):
        y, x = np.nonzero(mask)
        elements = (_coordinate(x), _coordinate(y), image[mask] / 16, np.ones(len(x)))
        target[: len(x)] = np.stack(elements, axis=-1)
    return PointSets(sets, digits.target.astype(np.int32))


def _check_intensity(value: int) -> None:
    if not 1 <= value <= 16:
        raise ValueError(f"min_intensity: expected an integer in 1 … 16, got {value}")


def _coordinate(pixel: np.ndarray) -> np.ndarray:
    return (pixel - (PIXELS - 1) / 2) / 2


def split_indices(seed: int) -> dict[str, Int[np.ndarray, " images"]]:
    """Which images are in "train" (1,437), "val" (180) and "test" (180), drawn by ``seed``."""
    order = np.random.default_rng(seed).permutation(sum(SPLITS.values()))
    ends = np.cumsum(list(SPLITS.values()))[:-1]
    return dict(zip(SPLITS, np.split(order, ends), strict=True))
