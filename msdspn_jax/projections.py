"""Projections onto the sets in which elements may live."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


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
    # The projection is invariant to shifts along (1, …, 1); this one keeps the sums well scaled.
    points = points - lax.stop_gradient(jnp.max(points, -1, keepdims=True))

    def threshold(values, support):
        total = jnp.sum(jnp.where(support, values, 0), -1, keepdims=True)
        return (total - 1) / jnp.sum(support, -1, keepdims=True).astype(values.dtype)

    values = lax.stop_gradient(points)

    def shrink(carry):
        support, _, rounds = carry
        # "Not below" rather than "above": a NaN stays in the support, and so in the result.
        smaller = support & ~(values <= threshold(values, support))
        return smaller, jnp.any(smaller != support), rounds + 1

    # max(v) − 1 ≤ τ: whatever lies below is outside from the start.
    start = ~(values <= -1)
    support, _, _ = lax.while_loop(
        lambda carry: carry[1] & (carry[2] < d), shrink, (start, jnp.array(True), jnp.array(0))
    )
    return jnp.where(support, points - threshold(points, support), 0)
