"""The bottleneck assignment problem: the matching whose dearest pair is the cheapest."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from msdspn_jax import _check
from msdspn_jax._check import AnyArray
from msdspn_jax._varying import vary_like
from msdspn_jax.matching.assignment import (
    Mask,
    Method,
    _checked_masks,
    as_floats,
    assign,
    matched_cost,
)


def assign_bottleneck(
    cost: Float[AnyArray, "batch n m"],
    *,
    mask: Mask | None = None,
    method: Method = "auto",
) -> Int[Array, "batch n"]:
    """Match so that the largest cost of a pair is minimal, and then the total.

    As many pairs as in `assign`, which is called about log₂(n · m) times: the least cost is sought
    by bisection below which there is a matching, then the cheapest matching below it is returned.

    Args:
        cost: as for `assign`.
        mask: as for `assign`.
        method: as for `assign`.

    Returns:
        int32 column indices in row order, as `assign` gives them.

    Raises:
        ValueError: as `assign`.

    Example:
        >>> cost = jnp.array([[[0.0, 4.0], [4.0, 7.0]]])  # 0 + 7 is less than 4 + 4
        >>> assign(cost).tolist(), assign_bottleneck(cost).tolist()
        ([[0, 1]], [[1, 0]])
    """
    _check.require_rank("cost", cost, 3, "batch n m")
    if not isinstance(cost, jax.Array):
        cost = np.asarray(cost)
    cost = lax.stop_gradient(as_floats(cost))
    batch, n, m = cost.shape
    masks = _checked_masks(mask, (batch,), n, m)
    if 0 in cost.shape:
        return assign(cost, mask=masks, method=method)
    # Outside of `jit` the search is one program; what is not finite goes to assign, which says so.
    within = _within_bottleneck if method == "host" else _compiled_within_bottleneck
    return assign(within(cost, masks, method), mask=masks, method=method)


def _within_bottleneck(cost, masks, method) -> Float[Array, "batch n m"]:
    """Costs that keep out all pairs dearer than the bottleneck; as they are where not finite."""
    batch, n, m = cost.shape
    taking_part = jnp.ones(cost.shape, bool)
    if masks is not None:
        taking_part = masks[0][:, :, None] & masks[1][:, None, :]
    values = jnp.sort(jnp.where(taking_part, cost, jnp.inf).reshape(batch, n * m), axis=1)

    def threshold(index):
        return jnp.take_along_axis(values, index[:, None], axis=1)[:, :, None]

    def halve(bounds):
        """Bounds of the index of the least threshold that allows a matching."""
        low, high = bounds
        middle = (low + high) // 2
        forbidden = (taking_part & (cost > threshold(middle))).astype(cost.dtype)
        needed = matched_cost(forbidden, assign(forbidden, mask=masks, method=method))
        return jnp.where(needed > 0, middle + 1, low), jnp.where(needed > 0, high, middle)

    steps = (n * m - 1).bit_length()
    bounds = jnp.zeros(batch, jnp.int32), jnp.full(batch, n * m - 1, jnp.int32)
    if method == "host":
        for _ in range(steps):
            bounds = halve(bounds)
    else:
        bounds = vary_like(bounds, cost, masks)
        bounds = lax.fori_loop(0, steps, lambda _, bounds: halve(bounds), bounds)
    allowed = taking_part & (cost <= threshold(bounds[1]))
    # The allowed costs in [0, 1], so that one number keeps all others out; see `assign`.
    above = jnp.where(allowed, cost / 2 - values[:, :1, None] / 2, 0)
    top = jnp.max(above, axis=(1, 2), keepdims=True)
    left = jnp.where(allowed, above / jnp.where(top > 0, top, 1), 32.0 * max(n, m))
    bad = jnp.any(taking_part & ~jnp.isfinite(cost), axis=(1, 2), keepdims=True)
    return jnp.where(bad, cost, left)


_compiled_within_bottleneck = jax.jit(_within_bottleneck, static_argnums=2, inline=True)
