"""The inner minimisation: from an energy and a start to the set that minimises it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float, Int

from msdspn_jax import _check
from msdspn_jax.adjoints import FixedPoint, Gradient, Implicit, Projection, Unrolled, identity
from msdspn_jax.energy import Energy, Params

DEFAULT_OPTIMIZER = optax.sgd(1.0, momentum=0.9, nesterov=True)
"""The paper's inner optimiser: step size 1, Nesterov momentum 0.9."""


class Trajectory(NamedTuple):
    """Every iterate of a minimisation, the start first; carries no derivative."""

    sets: Float[Array, "steps_plus_1 batch n d"]
    energy: Float[Array, "steps_plus_1 batch"]
    gradient_norm: Float[Array, "steps_plus_1 batch"]


class Minimum(NamedTuple):
    """What `minimise` returns. `sets` can be differentiated; the rest is for watching.

    Attributes:
        sets: Y*, the final iterates.
        energy: E(Y*), without derivative.
        gradient_norm: l2 norm over (n, d) of the fixed-point residual proj(Y* − ∇E(Y*)) − Y*, which
            is that of ∇E without a projection. Large or not finite: the loop has not converged.
        num_steps: steps that each set took; fewer than asked for only with a tolerance.
        trajectory: all iterates, if asked for.

    Under `jax.jit`, energy and gradient norm cost one more evaluation of the gradient if used, and
    nothing if not.
    """

    sets: Float[Array, "batch n d"]
    energy: Float[Array, " batch"]
    gradient_norm: Float[Array, " batch"]
    num_steps: Int[Array, " batch"]
    trajectory: Trajectory | None = None


def minimise(
    energy: Energy,
    params: Params,
    context: Any,
    initial_sets: Float[Array, "batch n d"],
    *,
    optimizer: optax.GradientTransformation = DEFAULT_OPTIMIZER,
    num_steps: int,
    projection: Projection | None = None,
    max_grad_norm: float | None = None,
    gradient: Gradient | None = None,
    tolerance: float | None = None,
    return_trajectory: bool = False,
    unroll: int = 1,
) -> Minimum:
    """Minimise E(Y; context, θ) over the sets Y, differentiably in `params` and `context`.

    A step evaluates ∇_Y E, clips it per set, lets the optimiser move the set, and projects (paper,
    section 3 and appendix; the reference semantics are fixed by golden files). The derivative is
    taken as `gradient` says: through the steps, or implicitly at the minimum. Implicit ways
    linearise where the last gradient was evaluated, the iterate before the last step, and ignore
    momentum, clipping and step size; memory then does not depend on `num_steps`.

    Args:
        energy: ``(params, sets [batch, n, d], context) -> [batch]``, see `latent_energy`.
        params: pytree θ. Differentiable.
        context: pytree, batch first, usually `Context`. Differentiable. Whatever shall receive a
            gradient must be in `params` or `context`, not closed over by `energy`.
        initial_sets: the start. Carries a gradient with `unrolled` only.
        optimizer: any optax transformation; it sees the whole batch as one array, so it should act
            elementwise (sgd, adam, …) or per leading index (`anderson`).
        num_steps: upper bound on the steps, ≥ 1.
        projection: maps [batch, n, d] to the nearest feasible sets, e.g. `projections.simplex`.
            Implicit ways project the initial sets too, before the first step.
        max_grad_norm: clip the gradient of every set to this l2 norm over (n, d).
        gradient: `identity()` (the paper's, and the default), `neumann(k)`,
            `conjugate_gradient(k)`, `exact()` or `unrolled()`.
        tolerance: a set stops where its gradient norm, as defined in `Minimum`, is at most this;
            the loop ends when all have.
        return_trajectory: keep every iterate, with energies and gradient norms.
        unroll: steps per iteration of the compiled loop, see `jax.lax.scan`.

    Raises:
        ValueError, TypeError: an argument of the wrong rank, shape, type or range, an energy that
            does not return [batch], NaN or infinity in concrete inputs.
    """
    gradient = identity() if gradient is None else gradient
    _check_arguments(energy, params, context, initial_sets, num_steps, max_grad_norm, gradient)
    if tolerance is not None:
        _check.require_positive("tolerance", tolerance)
    fixed_point = FixedPoint(energy, projection)
    descend = partial(
        _descend,
        fixed_point,
        optimizer,
        num_steps,
        max_grad_norm,
        tolerance,
        return_trajectory,
        unroll,
    )

    if isinstance(gradient, Unrolled):
        descent = descend(gradient, params, context, initial_sets)
    else:
        descent = _implicitly(descend, fixed_point, gradient)(params, context, initial_sets)

    watched = lax.stop_gradient((params, context, descent.sets))
    final_energy, grads = fixed_point.energies_and_gradient(*watched)
    norm = _residual_norm(fixed_point, watched[2], grads)
    trajectory = None
    if return_trajectory:
        history = Trajectory(*lax.stop_gradient(descent.history))
        last = Trajectory(watched[2], final_energy, norm)
        trajectory = jax.tree.map(lambda h, x: jnp.concatenate([h, x[None]]), history, last)
    return Minimum(descent.sets, final_energy, norm, descent.num_steps, trajectory)


class _Descent(NamedTuple):
    sets: jax.Array
    last_evaluated: jax.Array
    num_steps: jax.Array
    history: tuple[jax.Array, ...]


def _implicitly(
    descend: Callable[..., _Descent], fixed_point: FixedPoint, gradient: Implicit
) -> Callable[..., _Descent]:
    """The descent with its derivative replaced by that of the fixed point it has reached."""

    @jax.custom_vjp
    def solve(params, context, initial_sets):
        return descend(gradient, params, context, fixed_point.project(initial_sets))

    def forward(params, context, initial_sets):
        descent = solve(params, context, initial_sets)
        return descent, (params, context, descent.last_evaluated)

    def backward(residuals, cotangent):
        params, context, sets = residuals
        grads = gradient.vjp(fixed_point, params, context, sets, cotangent.sets)
        return *grads, jnp.zeros_like(sets)

    solve.defvjp(forward, backward)
    return solve


def _descend(
    fixed_point: FixedPoint,
    optimizer: optax.GradientTransformation,
    num_steps: int,
    max_grad_norm: float | None,
    tolerance: float | None,
    keep_history: bool,
    unroll: int,
    gradient: Gradient,
    params: Params,
    context: Any,
    initial_sets: jax.Array,
) -> _Descent:
    """`num_steps` steps of projected, clipped descent; the loop itself."""
    batch = initial_sets.shape[0]

    watching = keep_history or tolerance is not None

    def step(carry, _):
        sets, state, _, taken = carry
        energies, grads = fixed_point.energies_and_gradient(params, context, sets)
        clipped = grads if max_grad_norm is None else clip_per_set(grads, max_grad_norm)
        updates, state = optimizer.update(clipped, state, sets)
        moved = fixed_point.project(jnp.asarray(optax.apply_updates(sets, updates)))
        history: tuple[jax.Array, ...] = ()
        going = jnp.ones(batch, bool)
        if watching:
            norm = _residual_norm(fixed_point, sets, grads)
            history = (sets, energies, norm)
            if tolerance is not None:
                going = norm > tolerance
                # A set that has arrived stays for good: its gradient no longer changes.
                moved = jnp.where(going[:, None, None], moved, sets)
        return (moved, state, sets, taken + going), history

    taken = jnp.zeros(batch, jnp.int32)
    start = (initial_sets, optimizer.init(initial_sets), initial_sets, taken)
    differentiated = isinstance(gradient, Unrolled)
    if tolerance is None or keep_history or differentiated:
        if isinstance(gradient, Unrolled) and gradient.rematerialise:
            step = jax.checkpoint(step)
        # The last step stands outside the loop. Implicit ways evaluate the same gradient again, as
        # the first half of their backward pass, and there XLA finds it computed already.
        looped = num_steps if watching or differentiated else num_steps - 1
        end, history = lax.scan(step, start, None, length=looped, unroll=unroll)
        if looped < num_steps:
            end, _ = step(end, None)
    else:

        def unfinished(carry):
            steps, going, _ = carry
            return (steps < num_steps) & going

        def advance(carry):
            steps, _, inner = carry
            taken = inner[3]
            inner, _ = step(inner, None)
            return steps + 1, jnp.any(inner[3] > taken), inner

        # A while loop ends early, but has no reverse derivative: implicit ways need none.
        *_, end = lax.while_loop(unfinished, advance, (jnp.int32(0), jnp.array(True), start))
        history = ()
    sets, _, last_evaluated, taken = end
    return _Descent(sets, last_evaluated, taken, history if keep_history else ())


def _residual_norm(fixed_point, sets, grads):
    """Norm of proj(Y − ∇E) − Y: zero at a minimum, on the border of the feasible sets too."""
    if fixed_point.projection is None:
        return per_set_norm(grads)
    return per_set_norm(fixed_point.project(sets - grads) - sets)


def per_set_norm(sets: Float[Array, "batch n d"]) -> Float[Array, " batch"]:
    """l2 norm over (n, d), with derivative zero rather than NaN at zero."""
    squared = jnp.sum(jnp.square(sets), axis=(1, 2))
    positive = squared > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, squared, 1)), squared)


def clip_per_set(grads: Float[Array, "batch n d"], max_norm: float) -> Float[Array, "batch n d"]:
    """Scale every set's gradient by min(1, max_norm / (norm + 1e-6)), norm over (n, d)."""
    norm = per_set_norm(grads)[:, None, None]
    return grads * jnp.minimum(1, max_norm / (norm + 1e-6))


def _check_arguments(energy, params, context, initial_sets, num_steps, max_grad_norm, gradient):
    _check.require_rank("initial_sets", initial_sets, 3, "batch n d")
    _check.require_nonempty("initial_sets", initial_sets, "batch n d")
    _check.require_floating("initial_sets", initial_sets)
    _check.require_finite("initial_sets", initial_sets)
    _check.require_finite("context", context)
    _check.require_finite("params", params)
    if not isinstance(num_steps, int) or num_steps < 1:
        raise ValueError(f"num_steps: expected an integer >= 1, got {num_steps!r}")
    if max_grad_norm is not None:
        _check.require_positive("max_grad_norm", max_grad_norm)
    if not isinstance(gradient, Implicit | Unrolled):
        raise TypeError(
            "gradient: expected identity(), neumann(k), conjugate_gradient(k), exact() or "
            f"unrolled(), got {gradient!r}"
        )
    shape = jax.eval_shape(energy, params, initial_sets, context)
    batch = initial_sets.shape[:1]
    if getattr(shape, "shape", None) != batch:
        raise ValueError(
            f"energy: expected one number per set, shape {batch}, got "
            f"{getattr(shape, 'shape', shape)}; do not average over the batch"
        )
