"""Accuracies of predicted sets. Average precision is in `msdspn_jax.clevr.metrics`."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from msdspn_jax._check import AnyArray


class NumberingAccuracy(NamedTuple):
    """Of every set: the share of its elements numbered right, and whether all are (0 or 1)."""

    micro: Float[Array, " batch"]
    macro: Float[Array, " batch"]


def numbering_accuracy(
    prediction: Float[AnyArray, "batch n d"],
    target: Float[AnyArray, "batch n d"],
    assignment: Int[AnyArray, "batch n"],
) -> NumberingAccuracy:
    """Accuracy of class-specific numbering (paper, section 4.1), by argmax of matched elements.

    It can be jitted and returns one number per set.

    Args:
        prediction: points or logits; the largest entry of an element is its number.
        target: one-hot numbers.
        assignment: from `losses.numbering_assignment`, by the cost that the model is trained with.

    Example:
        >>> numbers = jnp.eye(2)[None]
        >>> numbering_accuracy(numbers, numbers, jnp.array([[0, 1]])).macro.tolist()
        [1.0]
    """
    expected = jnp.take_along_axis(jnp.argmax(target, -1), assignment, axis=1)
    right = jnp.argmax(prediction, -1) == expected
    return NumberingAccuracy(micro=jnp.mean(right, -1), macro=jnp.all(right, -1).astype(float))
