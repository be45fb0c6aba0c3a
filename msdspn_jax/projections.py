"""Projections onto the sets in which elements may live."""

import functools

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

_UNROLL_UP_TO = 128


def simplex(points: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
    """Euclidean projection of the last axis onto the probability simplex {p ≥ 0, Σ p = 1}.

    The projection is max(v − τ, 0) with the one threshold τ that makes it sum to 1, that is
    τ = (Σ_{S} v − 1) / |S| over the support S = {v > τ}. Starting from the full support, τ is
    recomputed over {v > τ} until the support no longer shrinks (Michelot, 1986). That ends after
    finitely many rounds (a handful for random points, d at most) at the exact answer, and needs no
    sort, which is what makes it fast on every backend and for any number of leading axes at once.

    Given the support the map is affine, so automatic differentiation is exact almost everywhere: a
    cotangent is centred over the support and zero outside it.
    """
    if jnp.ndim(points) < 1 or jnp.shape(points)[-1] == 0:
        raise ValueError(
            f"points: expected a last axis of length > 0, got shape {jnp.shape(points)}"
        )
    d = points.shape[-1]
    rows = lax.stop_gradient(points).reshape(-1, d)
    # Sums along the last axis do not vectorise on a CPU; over rows side by side they do. The
    # barriers keep the chains of 64 operations from being computed again for every entry.
    highest = lax.optimization_barrier(_over_axis_0(jnp.maximum, jnp.max, rows.T))
    threshold, size = lax.optimization_barrier(_threshold(rows.T - highest))
    # The projection is invariant to shifts along (1, …, 1); this one keeps the sums well scaled.
    leading = (*points.shape[:-1], 1)
    points = points - highest.reshape(leading)
    # "Not below" rather than "above": a NaN stays in the support, and so in the result.
    support = ~(points <= threshold.reshape(leading))
    total = jnp.sum(jnp.where(support, points, 0), -1, keepdims=True)
    return jnp.where(support, points - (total - 1) / size.reshape(leading), 0)


def _threshold(
    columns: Float[Array, "d rows"],
) -> tuple[Float[Array, " rows"], Float[Array, " rows"]]:
    """A number for every row that separates its support from the rest, and the support's size."""
    d = columns.shape[0]

    def shrink(carry):
        threshold, size, _, rounds = carry
        total = _over_axis_0(jnp.add, jnp.sum, columns, lambda v: jnp.where(v <= threshold, 0, v))
        outside = _over_axis_0(
            jnp.add, jnp.sum, columns, lambda v: (v <= threshold).astype(columns.dtype)
        )
        smaller = d - outside
        moved = smaller != size
        # Never back down, whatever the rounding, so that supports are nested.
        higher = jnp.maximum(threshold, (total - 1) / smaller)
        return jnp.where(moved, higher, threshold), smaller, jnp.any(moved), rounds + 1

    # The highest entry is 0, so −1 ≤ τ: whatever lies below is outside from the start.
    start = jnp.full_like(columns[0], -1)
    threshold, size, *_ = lax.while_loop(
        lambda carry: carry[2] & (carry[3] <= d),
        shrink,
        (start, jnp.zeros_like(start), jnp.array(True), jnp.array(0)),
    )
    return threshold, size


def _over_axis_0(combine, reduce, columns: Float[Array, "d rows"], function=lambda v: v):
    """Combine `function` of all columns; unrolled, so that it becomes one elementwise kernel."""
    if columns.shape[0] <= _UNROLL_UP_TO:
        return functools.reduce(combine, [function(column) for column in columns])
    return reduce(function(columns), axis=0)
