"""How large should the inner step be? Measured from the energy itself."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key

from msdspn_jax import _check
from msdspn_jax.adjoints import FixedPoint
from msdspn_jax.descent import minimise, per_set_norm
from msdspn_jax.energy import Energy, Params


class StepSize(NamedTuple):
    """What `suggest_step_size` measures.

    Attributes:
        step_size: the suggestion: stable on all the given sets, and no smaller than need be.
        stable_below: from here on, gradient descent with this momentum diverges on the set with the
            largest curvature.
        curvature: largest |eigenvalue| of ∂²E/∂Y² at every set.
        movement: root-mean-square change of the entries of every set over `num_steps` steps of the
            suggested size. Near zero: the decoder would return its initial set; raise the step.
    """

    step_size: float
    stable_below: float
    curvature: Float[Array, " batch"]
    movement: Float[Array, " batch"]


def suggest_step_size(
    energy: Energy,
    params: Params,
    context: Any,
    sets: Float[Array, "batch n d"],
    *,
    key: Key[Array, ""],
    num_steps: int = 20,
    momentum: float = 0.9,
    num_iterations: int = 30,
    safety: float = 0.5,
) -> StepSize:
    """Measure the curvature of the energy around given sets and suggest an inner step size.

    On a quadratic with largest curvature λ, gradient descent with Nesterov momentum μ is stable for
    step sizes below (2 + 2μ) / ((1 + 2μ) λ), which is 2/λ without momentum. λ is found by power
    iteration on Hessian-vector products, n · d numbers a set in memory. Energies of this library
    are means over features and entries, so curvatures are small and the paper's step size of 1 is
    usually far below the limit at initialisation; what goes wrong in practice is a step so small
    that the set hardly moves, which `movement` shows.

    Call it on typical sets: targets, or initial sets (the energy is piecewise quadratic in the
    features, so the two differ). Concrete arrays only; jit is applied inside.

    Args:
        energy: as in `minimise`.
        params: as in `minimise`.
        context: as in `minimise`.
        sets: where to measure.
        key: for the random start of the power iteration.
        num_steps: steps over which to measure the movement.
        momentum: Nesterov momentum to be used, in [0, 1).
        num_iterations: power iterations.
        safety: suggested fraction of the stability limit, in (0, 1].
    """
    _check.require_rank("sets", sets, 3, "batch n d")
    _check.require_finite("sets", sets)
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum: expected a number in [0, 1), got {momentum!r}")
    if not 0 < safety <= 1:
        raise ValueError(f"safety: expected a number in (0, 1], got {safety!r}")
    fixed_point = FixedPoint(energy)

    @jax.jit
    def largest_curvature(params, context, sets):
        _, hessian = jax.linearize(lambda Y: fixed_point.gradient(params, context, Y), sets)

        def iterate(_, carry):
            direction, _ = carry
            image = hessian(direction)
            norm = per_set_norm(image)[:, None, None]
            # A set without curvature keeps its direction rather than becoming 0/0.
            return jnp.where(norm > 0, image / jnp.where(norm > 0, norm, 1), direction), norm

        start = jax.random.normal(key, sets.shape, sets.dtype)
        start = start / per_set_norm(start)[:, None, None]
        norm = jnp.zeros((sets.shape[0], 1, 1), sets.dtype)
        return jax.lax.fori_loop(0, num_iterations, iterate, (start, norm))[1][:, 0, 0]

    curvature = largest_curvature(params, context, sets)
    largest = float(jnp.max(curvature))
    if not largest > 0 or not jnp.isfinite(largest):
        raise ValueError(
            f"energy: expected a finite positive curvature at the given sets, got {largest}; the "
            "energy does not depend on them (all features inactive?) or is not finite"
        )
    stable_below = (2 + 2 * momentum) / ((1 + 2 * momentum) * largest)
    step_size = safety * stable_below

    @jax.jit
    def move(params, context, sets):
        optimizer = optax.sgd(step_size, momentum=momentum or None, nesterov=momentum > 0)
        return minimise(
            energy, params, context, sets, optimizer=optimizer, num_steps=num_steps
        ).sets

    change = move(params, context, sets) - sets
    return StepSize(
        step_size, stable_below, curvature, jnp.sqrt(jnp.mean(jnp.square(change), (1, 2)))
    )
