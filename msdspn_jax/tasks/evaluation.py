"""The evaluation loop of all tasks: a split, batch by batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np

Tree = TypeVar("Tree")


def over_split(scores_of: Callable[[np.ndarray], Tree], size: int, *, batch_size: int) -> Tree:
    """The scores of every example of a split, or whatever else there is one of for each.

    Args:
        scores_of: ``indices [batch] -> tree`` of arrays, batch first. It is called with batches of
            one size, so that one compiled program serves all: the last is filled up with the
            split's last example, and what is too much is cut off.
        size: examples of the split.
        batch_size: examples a batch.

    Returns:
        The tree, with NumPy arrays [size, ...].
    """
    batch = min(size, batch_size)
    parts = []
    for first in range(0, size, batch):
        scores = scores_of(np.minimum(np.arange(first, first + batch), size - 1))
        parts.append(jax.tree.map(lambda x, n=size - first: np.asarray(x)[:n], scores))
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)


def means(scores: dict[str, np.ndarray]) -> dict[str, float]:
    """The mean of every score over the split."""
    return {name: float(np.mean(values, dtype=np.float64)) for name, values in scores.items()}


def inner_scores(minimum) -> dict[str, jax.Array]:
    """How the inner minimisation of every set went, by the names that training watches."""
    if minimum is None:
        return {}
    return {"inner_energy": minimum.energy, "inner_gradient_norm": minimum.gradient_norm}
