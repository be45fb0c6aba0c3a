"""optax's Hungarian algorithm, mapped over the batch: to compare with."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from msdspn_jax.matching.augmenting_paths import UNMATCHED


def hungarian(cost: Float[Array, "batch n m"]) -> Int[Array, "batch n"]:
    """The column of every row, or -1, for finite costs and no empty axis."""
    rows, columns = jax.vmap(optax.assignment.hungarian_algorithm)(cost)
    # optax returns the pairs in no particular order.
    index = jnp.arange(cost.shape[0])[:, None]
    assignment = jnp.full(cost.shape[:2], UNMATCHED, jnp.int32)
    return assignment.at[index, rows].set(columns.astype(jnp.int32))
