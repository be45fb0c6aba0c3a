"""Handwritten digits as sets of points: real input that needs no download.

Scikit-learn's 1,797 digits (8 by 8 pixels, 17 grey levels; UCI "Optical Recognition of Handwritten
Digits") stand in for the MNIST point sets of DSPN (arXiv 1906.06565).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

PIXELS = 8
SPLITS = {"train": 1437, "val": 180, "test": 180}


class PointSets(NamedTuple):
    """Digits as padded point sets.

    Attributes:
      sets: [images, n, 4], float32: x and y of a pixel (−1.75 … 1.75 from the centre, y downwards:
        about unit variance), its intensity (0 … 1) and presence (1). Absent elements are all zero
        and come last.
      labels: which digit it is.
    """

    sets: Float[np.ndarray, "images n 4"]
    labels: Int[np.ndarray, " images"]


def load_point_sets(*, min_intensity: int = 5) -> PointSets:
    """All 1,797 digits, in scikit-learn's order; one element for every bright pixel.

    Args:
      min_intensity: pixels at least this bright are elements, 1 … 16. The largest set has
        42 of them at 1, 34 at 5, 27 at 9; that is n.
    """
    if not 1 <= min_intensity <= 16:
        raise ValueError(f"min_intensity must lie in 1 … 16, got {min_intensity}")
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    images = digits.images
    bright = images >= min_intensity
    n = int(bright.sum((1, 2)).max())
    sets = np.zeros((len(images), n, 4), np.float32)
    for target, image, mask in zip(sets, images, bright, strict=True):
        y, x = np.nonzero(mask)
        elements = (_coordinate(x), _coordinate(y), image[mask] / 16, np.ones(len(x)))
        target[: len(x)] = np.stack(elements, axis=-1)
    return PointSets(sets, digits.target.astype(np.int32))


def _coordinate(pixel: np.ndarray) -> np.ndarray:
    return (pixel - (PIXELS - 1) / 2) / 2


def split_indices(seed: int) -> dict[str, Int[np.ndarray, " images"]]:
    """Which images are in "train" (1,437), "val" (180) and "test" (180), drawn by ``seed``."""
    order = np.random.default_rng(seed).permutation(sum(SPLITS.values()))
    ends = np.cumsum(list(SPLITS.values()))[:-1]
    return dict(zip(SPLITS, np.split(order, ends), strict=True))
