"""Anderson acceleration of the inner minimisation, as an optax transformation."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from msdspn_jax import _check
from msdspn_jax._varying import vary_like


class AndersonState(NamedTuple):
    """The last `history` iterates of every set and their residuals, newest anywhere in the ring."""

    iterates: Float[Array, "history batch nd"]
    residuals: Float[Array, "history batch nd"]
    num_updates: Int[Array, ""]


def anderson(
    learning_rate: float = 1.0, *, history: int = 5, ridge: float = 1e-6
) -> optax.GradientTransformation:
    """Gradient descent with step size η, extrapolated from the last iterates (Anderson, 1965).

    With residuals f_i = −η ∇E(Y_i), the next iterate is Σ α_i (Y_i + f_i), where α minimises
    ‖Σ α_i f_i‖² + λ‖α‖² subject to Σ α_i = 1. Near a minimum, where E is almost quadratic, this
    acts like a Krylov method and needs far fewer steps than momentum; far from one it can
    overshoot, so start from a step size that is stable by itself (`suggest_step_size`).

    For `minimise(optimizer=anderson(...))`: the leading axis is the batch, and every set has its
    own coefficients, found in float32 for sets of 16 bits. ``update`` needs the third argument of
    optax, the current sets. Equal arguments give the same object, so that compiled programs are
    found again. As every optax transformation it holds functions and cannot be pickled: keep the
    arguments.

    Args:
        learning_rate: η > 0.
        history: iterates kept, ≥ 2; memory is twice that many sets.
        ridge: λ relative to the mean squared residual; larger is safer and slower.

    Raises:
        ValueError: an argument out of range, or ``update`` called without the current sets.

    Example:
        >>> optimizer, curvature = anderson(), jnp.array([[[0.1], [1.0]]])
        >>> sets = jnp.ones((1, 2, 1))
        >>> state = optimizer.init(sets)
        >>> for _ in range(4):
        ...     updates, state = optimizer.update(curvature * sets, state, sets)
        ...     sets = optax.apply_updates(sets, updates)
        >>> bool(jnp.abs(sets).max() < 1e-3)  # gradient descent: 0.9 ** 4 = 0.66
        True
    """
    _check.require_positive("learning_rate", learning_rate)
    _check.require_positive("ridge", ridge)
    _check.require_integer("history", history, 2)
    return _anderson(float(learning_rate), int(history), float(ridge))


@functools.cache
def _anderson(learning_rate: float, history: int, ridge: float) -> optax.GradientTransformation:
    def init(params):
        empty = jnp.zeros((history, params.shape[0], params[0].size), params.dtype)
        iterates, residuals = vary_like((empty, empty), params)
        return AndersonState(iterates, residuals, jnp.zeros((), jnp.int32))

    def update(updates, state, params=None):
        if params is None:
            raise ValueError("params: expected the current sets in anderson's update(), got None")
        grads, sets = updates, params
        slot = state.num_updates % history
        iterate = sets.reshape(sets.shape[0], -1)
        residual = -learning_rate * grads.reshape(iterate.shape)
        iterates = state.iterates.at[slot].set(iterate)
        residuals = state.residuals.at[slot].set(residual)
        filled = jnp.arange(history) <= state.num_updates

        # LAPACK has no 16-bit types, and float16 has no room for squares.
        wide = jnp.promote_types(sets.dtype, jnp.float32)
        wide_iterates, wide_residuals = iterates.astype(wide), residuals.astype(wide)
        gram = jnp.einsum("ibk,jbk->bij", wide_residuals, wide_residuals)
        scale = jnp.trace(gram, axis1=-2, axis2=-1)[:, None, None] / history
        damping = ridge * scale + jnp.finfo(wide).tiny
        # Empty slots have residual zero; a large diagonal keeps their coefficients at zero.
        diagonal = jnp.where(filled, damping, damping + scale / ridge + 1)
        system = gram + diagonal * jnp.eye(history, dtype=wide)
        weights = jnp.linalg.solve(system, filled.astype(wide)[None, :, None] * scale)[..., 0]
        total = jnp.sum(weights, -1, keepdims=True)
        # All residuals zero: the set has arrived and stays.
        alpha = jnp.where(total > 0, weights / jnp.where(total > 0, total, 1), 0)
        moved = jnp.einsum("bi,ibk->bk", alpha, wide_iterates + wide_residuals)
        # At rest the plain step: zero, or NaN where a gradient is not finite, and its derivative.
        step = residual.astype(wide)
        change = jnp.where(total > 0, moved - iterate.astype(wide), step)
        return change.astype(sets.dtype).reshape(sets.shape), AndersonState(
            iterates, residuals, state.num_updates + 1
        )

    return optax.GradientTransformation(init, jax.named_call(update, name="anderson"))
