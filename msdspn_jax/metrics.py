"""Accuracies of predicted sets. Average precision is in `msdspn_jax.clevr.metrics`."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class NumberingAccuracy(NamedTuple):
    """Of every set: the share of its elements numbered right, and whether all are (0 or 1)."""

    micro: Float[Array, " batch"]
    macro: Float[Array, " batch"]


def numbering_accuracy(
    prediction: Float[Array, "batch n d"],
    target: Float[Array, "batch n d"],
    assignment: Int[Array, "batch n"],
) -> NumberingAccuracy:
    """Accuracy of class-specific numbering (paper, section 4.1), by argmax of matched elements.

    It can be jitted and returns one number a set.

    Args:
        prediction: points or logits; the largest entry of an element is its number.
        target: one-hot numbers.
        assignment: from `losses.numbering_assignment`, by the cost that the model is trained with.
    """
    expected = jnp.take_along_axis(jnp.argmax(target, -1), assignment, axis=1)
    right = jnp.argmax(prediction, -1) == expected
    return NumberingAccuracy(micro=jnp.mean(right, -1), macro=jnp.all(right, -1).astype(float))
