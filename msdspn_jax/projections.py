"""Projections onto the sets in which elements may live."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from msdspn_jax import _check
from msdspn_jax._check import AnyArray
from msdspn_jax.ranks import by_columns, computed_once


def simplex(points: Float[AnyArray, "*batch d"]) -> Float[Array, "*batch d"]:
    """Euclidean projection of the last axis onto the probability simplex {p ≥ 0, Σ p = 1}.

    The projection is max(v − τ, 0) with the one threshold τ that makes it sum to 1, that is
    τ = (Σ_{S} v − 1) / |S| over the support S = {v > τ}. Starting from the full support, τ is
    recomputed over {v > τ} until the support no longer shrinks (Michelot, 1986). That ends after
    finitely many rounds (a handful for random points, d at most) at the exact answer, and needs no
    sort, which is what makes it fast on every backend and for any number of leading axes at once.

    Given the support the map is affine. It is written that way, so that its derivatives of every
    order are those of automatic differentiation, exact almost everywhere: a tangent is centred over
    the support and zero outside it.

    Example:
        >>> simplex(jnp.array([0.5, 1.5, -1.0])).tolist()
        [0.0, 1.0, 0.0]
    """
    if jnp.ndim(points) < 1 or jnp.shape(points)[-1] == 0:
        raise ValueError(
            f"points: expected a last axis of length > 0, got shape {jnp.shape(points)}"
        )
    _check.require_floating("points", points)
    return _simplex(jnp.asarray(points))


# Compiled as one piece outside of `jax.jit` too.
@functools.partial(jax.jit, inline=True)
def _simplex(points):
    # Sums of 16 bits would miss 1 by tenths, and take other entries for zero.
    wide = points.astype(jnp.promote_types(points.dtype, jnp.float32))
    rows = wide.reshape(-1, points.shape[-1])
    highest, threshold = lax.platform_dependent(
        lax.stop_gradient(rows), cpu=_threshold_on_cpu, default=_threshold
    )
    shifted = rows - highest[:, None]
    # Not "> threshold": a row with a NaN has it everywhere, and shall become NaN.
    outside = shifted <= threshold[:, None]
    size = jnp.sum(~outside, -1, keepdims=True).astype(rows.dtype)
    total = jnp.sum(jnp.where(outside, 0, shifted), -1, keepdims=True)
    inside = shifted - (total - 1) / size
    return jnp.where(outside, 0, inside).reshape(points.shape).astype(points.dtype)


def _threshold(rows: Float[Array, "rows d"]) -> tuple[Float[Array, " rows"], ...]:
    """The highest entry of every row, and its τ after that entry is taken off the row.

    The projection is invariant to shifts along (1, …, 1); this one keeps the sums well scaled.
    """
    highest = jnp.max(rows, -1)
    shifted = rows - highest[:, None]

    def sum_and_size(threshold):
        outside = shifted <= threshold[:, None]
        size = jnp.sum(jnp.where(outside, 0, 1), -1, dtype=rows.dtype)
        return jnp.sum(jnp.where(outside, 0, shifted), -1), size

    return highest, _shrink_support(sum_and_size, highest)


def _threshold_on_cpu(rows: Float[Array, "rows d"]) -> tuple[Float[Array, " rows"], ...]:
    """`_threshold`, with the tricks of `msdspn_jax.ranks`."""
    highest = computed_once(by_columns(jnp.maximum, rows.T), lambda value: value > jnp.inf)
    shifted = rows.T - highest

    def sum_and_size(threshold):
        total = by_columns(jnp.add, shifted, lambda v: jnp.where(v <= threshold, 0, v))
        size = by_columns(
            jnp.add, shifted, lambda v: jnp.where(v <= threshold, 0, 1).astype(v.dtype)
        )
        return total, size

    return highest, lax.optimization_barrier(_shrink_support(sum_and_size, highest))


def _shrink_support(
    sum_and_size: Callable[[jax.Array], tuple[jax.Array, jax.Array]], like: Float[Array, " rows"]
) -> Float[Array, " rows"]:
    """Michelot's iteration: τ ← (Σ_S v − 1) / |S| over the support S = {v > τ}, until it stays.

    Args:
        sum_and_size: ``τ -> (Σ_S v, |S|)`` for every row, its highest entry being 0.
        like: an array of the shape of τ.
    """

    def shrink(carry):
        threshold, _ = carry
        total, size = sum_and_size(threshold)
        # Never back down, whatever the rounding, so that supports are nested; and below 0, the
        # highest entry, so that none is ever empty.
        return jnp.maximum(threshold, (total - 1) / size), threshold

    # The highest entry is 0, so −1 ≤ τ: whatever lies below is outside from the start.
    start = jnp.full_like(like, -1)
    higher = lax.while_loop(lambda carry: jnp.any(carry[0] > carry[1]), shrink, (start, start - 1))
    return higher[0]
