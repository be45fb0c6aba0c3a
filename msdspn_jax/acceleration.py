"""Anderson acceleration of the inner minimisation, as an optax transformation."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from msdspn_jax import _check


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
    own coefficients. ``update`` needs the third argument of optax, the current sets.

    Args:
        learning_rate: η > 0.
        history: iterates kept, ≥ 2; memory is twice that many sets.
        ridge: λ relative to the mean squared residual; larger is safer and slower.

    Raises:
        ValueError: an argument out of range, or ``update`` called without the current sets.
    """
    _check.require_positive("learning_rate", learning_rate)
    _check.require_positive("ridge", ridge)
    if history < 2:
        raise ValueError(f"history: expected an integer >= 2, got {history!r}")

    def init(params):
        empty = jnp.zeros((history, params.shape[0], params[0].size), params.dtype)
        return AndersonState(empty, empty, jnp.zeros((), jnp.int32))

    def update(updates, state, params=None):
        if params is None:
            raise ValueError("params: anderson needs the current sets in update(), got None")
        grads, sets = updates, params
        slot = state.num_updates % history
        iterate = sets.reshape(sets.shape[0], -1)
        residual = -learning_rate * grads.reshape(iterate.shape)
        iterates = state.iterates.at[slot].set(iterate)
        residuals = state.residuals.at[slot].set(residual)
        filled = jnp.arange(history) <= state.num_updates

        gram = jnp.einsum("ibk,jbk->bij", residuals, residuals)
        scale = jnp.trace(gram, axis1=-2, axis2=-1)[:, None, None] / history
        damping = ridge * scale + jnp.finfo(gram.dtype).tiny
        # Empty slots have residual zero; a large diagonal keeps their coefficients at zero.
        diagonal = jnp.where(filled, damping, damping + scale / ridge + 1)
        system = gram + diagonal * jnp.eye(history, dtype=gram.dtype)
        weights = jnp.linalg.solve(system, filled.astype(gram.dtype)[None, :, None] * scale)[..., 0]
        total = jnp.sum(weights, -1, keepdims=True)
        # All residuals zero: the set has arrived and stays.
        alpha = jnp.where(total > 0, weights / jnp.where(total > 0, total, 1), 0)
        accelerated = jnp.einsum("bi,ibk->bk", alpha, iterates + residuals)
        moved = jnp.where(total > 0, accelerated, iterate)
        return (moved - iterate).reshape(sets.shape), AndersonState(
            iterates, residuals, state.num_updates + 1
        )

    return optax.GradientTransformation(init, jax.named_call(update, name="anderson"))
