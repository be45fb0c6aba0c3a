"""How large should the inner step be? Measured from the energy itself."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Key

from msdspn_jax import _check
from msdspn_jax._check import AnyArray
from msdspn_jax._closures import is_fixed, spelled
from msdspn_jax.adjoints import FixedPoint
from msdspn_jax.descent import minimise, nesterov, per_set_norm
from msdspn_jax.energy import Energy, Params

MAX_HALVINGS = 20
"""Down to a millionth of what the curvature promises."""


class StepSize(NamedTuple):
    """What `suggest_step_size` measures.

    Attributes:
        step_size: the suggestion: descends on all the given sets, and no smaller than need be.
        momentum: the Nesterov momentum that it is for.
        stable_below: near the given sets, gradient descent with larger steps and this momentum
            diverges on the set with the largest curvature.
        curvature: the eigenvalue of ∂²E/∂Y² with the largest magnitude, at every set. Negative:
            the energy curves down there, and may have no minimum (is its sign right?).
        movement: root-mean-square change of the entries of every set over `num_steps` steps of the
            suggested size. Near zero: the decoder would return its initial set; raise the step.
        energy_before: at the given sets.
        energy_after: after `num_steps` steps of the suggested size.
        tried: the step sizes that were tried, the suggestion last. More than one: the curvature at
            the given sets alone promised too much.

    Example:
        >>> energy = lambda params, sets, context: 0.5 * jnp.sum((sets - context) ** 2, (1, 2))
        >>> problem = energy, {}, jnp.ones((1, 3, 2)), jnp.zeros((1, 3, 2))
        >>> found = suggest_step_size(*problem, key=jax.random.key(0), momentum=0.0)
        >>> round(found.stable_below, 3), round(found.step_size, 3), len(found.tried)
        (2.0, 1.0, 1)
        >>> minimise(*problem, optimizer=found.optimizer(), num_steps=1).sets.ravel().tolist()
        [1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    """

    step_size: float
    momentum: float
    stable_below: float
    curvature: Float[Array, " batch"]
    movement: Float[Array, " batch"]
    energy_before: Float[Array, " batch"]
    energy_after: Float[Array, " batch"]
    tried: tuple[float, ...]

    def optimizer(self) -> optax.GradientTransformation:
        """What `minimise` takes: `nesterov` with the suggestion and its momentum."""
        return nesterov(self.step_size, self.momentum)


def suggest_step_size(
    energy: Energy,
    params: Params,
    context: Any,
    sets: Float[AnyArray, "batch n d"],
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
    iteration on Hessian-vector products, n · d numbers per set in memory. Energies of this library
    are means over features and entries, so curvatures are small and the paper's step size of 1 is
    usually far below the limit at initialisation; what goes wrong in practice is a step so small
    that the set hardly moves, which `StepSize.movement` shows.

    The energy is no quadratic, and its curvature away from the given sets may be larger. So the
    descent is run, and the step size halved until no set's energy is higher at the end than at the
    start, and some set's is lower (unless no set moves at all).

    Call it on typical sets: targets, or initial sets (the energy is piecewise quadratic in the
    features, so the two differ), with the latents that belong to them. Concrete arrays only; jit is
    applied inside, and compiled programs are kept for energies that compute the same.

    Args:
        energy: as in `minimise`.
        params: as in `minimise`.
        context: as in `minimise`.
        sets: where to measure.
        key: for the random start of the power iteration.
        num_steps: steps of the descent that is tried.
        momentum: Nesterov momentum to be used, in [0, 1).
        num_iterations: power iterations.
        safety: fraction of the stability limit that is tried first, in (0, 1].

    Raises:
        ValueError: an argument out of range or traced; no curvature; no descent with any of the
            step sizes tried.

    Example:
        >>> energy = lambda params, sets, context: 0.5 * jnp.sum((sets - context) ** 2, (1, 2))
        >>> start, target = jnp.zeros((1, 3, 2)), jnp.ones((1, 3, 2))
        >>> round(suggest_step_size(energy, {}, target, start, key=jax.random.key(0)).step_size, 3)
        0.679
    """
    _check.require_rank("sets", sets, 3, "batch n d")
    _check.require_nonempty("sets", sets, "batch n d")
    _check.require_floating("sets", sets)
    if any(map(_check.is_traced, jax.tree.leaves((params, context, sets, key)))):
        raise ValueError(
            "params, context, sets, key: expected concrete arrays, got traced ones; call "
            "suggest_step_size outside of jit"
        )
    for name, tree in (("params", params), ("context", context), ("sets", sets)):
        _check.require_finite(name, tree)
    _check.require_momentum(momentum)
    _check.require_number("safety", safety, lambda x: 0 < x <= 1, "a number in (0, 1]")
    _check.require_integer("num_steps", num_steps, 1)
    _check.require_integer("num_iterations", num_iterations, 1)

    problem = (*_comparable(energy, params, context, sets), params, context, sets)
    curvature = _largest_curvature(*problem, key, num_iterations)
    largest = float(jnp.max(jnp.abs(curvature)))
    if not largest > 0 or not np.isfinite(largest):
        raise ValueError(
            f"energy: expected a finite curvature other than zero at the sets, got {largest}; the "
            "energy does not depend on them (all features inactive?) or is not finite"
        )
    stable_below = (2 + 2 * momentum) / ((1 + 2 * momentum) * largest)
    tried = tuple(safety * stable_below * 0.5**halvings for halvings in range(MAX_HALVINGS + 1))
    risen = np.ones(sets.shape[0], bool)
    for count, step_size in enumerate(tried, 1):
        before, after, movement = _descend(*problem, step_size, momentum, jnp.asarray(num_steps))
        risen = _risen(before, after)
        fell = _risen(after, before).any() or not np.asarray(movement).any()
        if fell and not risen.any():
            return StepSize(
                step_size=step_size,
                momentum=momentum,
                stable_below=stable_below,
                curvature=curvature,
                movement=movement,
                energy_before=before,
                energy_after=after,
                tried=tried[:count],
            )
    end = f"{int(risen.sum())} of {len(risen)} sets whose energy rose with the smallest"
    raise ValueError(
        f"energy: expected one that {num_steps} steps with momentum {momentum} lower, for a step "
        f"size from {tried[0]:.3g} down to {tried[-1]:.3g}, got "
        f"{end if risen.any() else 'no set whose energy fell with the smallest'}; are the sets at "
        "a minimum already, or is the gradient not that of the energy?"
    )


def _risen(before: Float[Array, " batch"], after: Float[Array, " batch"]) -> np.ndarray:
    """Which energies rose, by more than rounding; NaN counts as risen."""
    slack = 8 * float(jnp.finfo(before.dtype).eps)
    start, end = (np.asarray(energy).astype(np.float64) for energy in (before, after))
    return ~(end <= start + slack * np.abs(start))


def _comparable(energy: Energy, params, context, sets) -> tuple[Any, Any]:
    """The energy as something that compiled programs can be kept for, and what it closes over."""
    if is_fixed(energy):
        return energy, None
    # What cannot be compared is compiled anew at each call: a partial equals itself only.
    return spelled(energy, params, sets, context) or (functools.partial(energy), None)


def _complete(energy: Any, hidden: Any) -> Energy:
    return energy if hidden is None else functools.partial(energy, hidden)


@functools.partial(jax.jit, static_argnums=0)
def _largest_curvature(energy, hidden, params, context, sets, key, num_iterations):
    energy = _complete(energy, hidden)
    gradient = FixedPoint(energy).gradient
    _, hessian = jax.linearize(lambda sets: gradient(params, context, sets), sets)

    def iterate(_, carry):
        direction, _ = carry
        image = hessian(direction)
        norm = per_set_norm(image)[:, None, None]
        # A set without curvature keeps its direction rather than becoming 0/0.
        unit = (image / jnp.where(norm > 0, norm, 1)).astype(direction.dtype)
        return jnp.where(norm > 0, unit, direction), norm

    start = jax.random.normal(key, sets.shape, sets.dtype)
    norm = per_set_norm(start)[:, None, None]
    start = (start / norm).astype(sets.dtype)
    norm = jnp.zeros_like(norm)
    last, norm = jax.lax.fori_loop(0, num_iterations, iterate, (start, norm))
    along = jnp.sum((last * hessian(last)).astype(norm.dtype), (1, 2))
    return jnp.sign(along) * norm[:, 0, 0]


@functools.partial(jax.jit, static_argnums=0)
def _descend(energy, hidden, params, context, sets, step_size, momentum, num_steps):
    energy = _complete(energy, hidden)
    # With a momentum of 0, Nesterov's step is the plain one; traced, it cannot be told.
    optimizer = optax.sgd(step_size, momentum=momentum, nesterov=True)
    minimum = minimise(energy, params, context, sets, optimizer=optimizer, num_steps=num_steps)
    movement = jnp.sqrt(jnp.mean(jnp.square(minimum.sets - sets), (1, 2)))
    return energy(params, sets, context), minimum.energy, movement
