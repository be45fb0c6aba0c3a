"""Projections onto the sets in which elements may live."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from msdspn_jax.ranks import computed_once

_UNROLL_UP_TO = 128


def simplex(points: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
    """Euclidean projection of the last axis onto the probability simplex {p ≥ 0, Σ p = 1}.

    The projection is max(v − τ, 0) with the one threshold τ that makes it sum to 1, that is
    τ = (Σ_{S} v − 1) / |S| over the support S = {v > τ}. Starting from the full support, τ is
    recomputed over {v > τ} until the support no longer shrinks (Michelot, 1986). That ends after
    finitely many rounds (a handful for random points, d at most) at the exact answer, and needs no
    sort, which is what makes it fast on every backend and for any number of leading axes at once.

    Given the support the map is affine, with a derivative that is exact almost everywhere: a
    tangent is centred over the support and zero outside it.
    """
    if jnp.ndim(points) < 1 or jnp.shape(points)[-1] == 0:
        raise ValueError(
            f"points: expected a last axis of length > 0, got shape {jnp.shape(points)}"
        )
    return _simplex(points)


@jax.custom_jvp
def _simplex(points):
    rows = points.reshape(-1, points.shape[-1])
    # Maxima and sums along the last axis do not vectorise on a CPU; over rows side by side they do.
    highest = _over_axis_0(jnp.maximum, jnp.max, rows.T)
    highest = computed_once(highest, lambda value: value > jnp.inf)
    # The projection is invariant to shifts along (1, …, 1); this one keeps the sums well scaled.
    threshold = lax.optimization_barrier(_threshold(rows.T - highest))
    # The maximum with a NaN is NaN, so that a row with one becomes NaN.
    return jnp.maximum((rows - highest[:, None]) - threshold[:, None], 0).reshape(points.shape)


@_simplex.defjvp
def _simplex_jvp(primals, tangents):
    (points,), (tangent,) = primals, tangents
    projected = _simplex(points)
    support = projected > 0
    size = jnp.maximum(jnp.sum(support, -1, keepdims=True), 1).astype(tangent.dtype)
    mean = jnp.sum(jnp.where(support, tangent, 0), -1, keepdims=True) / size
    return projected, jnp.where(support, tangent - mean, 0)


def _threshold(columns: Float[Array, "d rows"]) -> Float[Array, " rows"]:
    """τ for every row, given with its entries in a column and its highest entry at 0."""

    def shrink(carry):
        threshold, _, rounds = carry
        total = _over_axis_0(jnp.add, jnp.sum, columns, lambda v: jnp.where(v <= threshold, 0, v))
        size = _over_axis_0(
            jnp.add, jnp.sum, columns, lambda v: jnp.where(v <= threshold, 0, 1).astype(v.dtype)
        )
        # Never back down, whatever the rounding, so that supports are nested; and below 0, the
        # highest entry, so that none is ever empty.
        higher = jnp.maximum(threshold, (total - 1) / size)
        return higher, jnp.any(higher > threshold), rounds + 1

    # The highest entry is 0, so −1 ≤ τ: whatever lies below is outside from the start.
    start = jnp.full_like(columns[0], -1)
    rounds = columns.shape[0] + 1
    return lax.while_loop(
        lambda carry: carry[1] & (carry[2] <= rounds),
        shrink,
        (start, jnp.array(True), jnp.array(0)),
    )[0]


def _over_axis_0(combine, reduce, columns: Float[Array, "d rows"], function=lambda v: v):
    """Combine `function` of all columns; unrolled, so that it becomes one elementwise kernel."""
    if columns.shape[0] <= _UNROLL_UP_TO:
        return functools.reduce(combine, [function(column) for column in columns])
    return reduce(function(columns), axis=0)
