"""The inner minimisation: from an energy and a start to the set that minimises it.

`minimise` is the whole loop, and can be differentiated. `Descent` has its single step, for loops of
your own.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from msdspn_jax import _check
from msdspn_jax._check import AnyArray
from msdspn_jax._closures import holds_tracer, is_fixed, opened, spelled
from msdspn_jax._varying import vary_like
from msdspn_jax.adjoints import (
    Adjoint,
    FixedPoint,
    Implicit,
    Projection,
    Sets,
    Unrolled,
    identity,
)
from msdspn_jax.energy import Energy, Params


def nesterov(step_size: float = 1.0, momentum: float = 0.9) -> optax.GradientTransformation:
    """Gradient descent, with Nesterov momentum where that is not zero: the paper's inner optimiser.

    This is ``optax.sgd``, but equal arguments give the same object. So a program that was compiled
    for it is not compiled again.

    Args:
        step_size: > 0.
        momentum: in [0, 1).

    Raises:
        ValueError, TypeError: an argument out of range, or traced: for a step size that is
            computed under ``jit``, use ``optax.sgd``.

    Example:
        >>> nesterov(0.5, 0.0) is nesterov(0.5, 0.0)
        True
    """
    _check.require_positive("step_size", step_size)
    _check.require_momentum(momentum)
    return _nesterov(float(step_size), float(momentum))


@functools.cache
def _nesterov(step_size: float, momentum: float) -> optax.GradientTransformation:
    return optax.sgd(step_size, momentum=momentum or None, nesterov=momentum > 0)


DEFAULT_OPTIMIZER = nesterov()
"""The paper's inner optimiser: step size 1, Nesterov momentum 0.9."""


class Status(enum.IntEnum):
    """How the descent of a set ended."""

    CONVERGED = 0
    """Its gradient norm is at most the tolerance."""
    OUT_OF_STEPS = 1
    """All steps were taken. Without a tolerance every set that stays finite ends so."""
    NOT_FINITE = 2
    """Its energy or its gradient is NaN or infinite: the descent diverged.

    The gradient of shared parameters is NaN then, also that of a loss which leaves the set out.
    """


class Trajectory(NamedTuple):
    """Every iterate of a minimisation, the start first; carries no derivative."""

    sets: Float[Array, "steps_plus_1 batch n d"]
    energy: Float[Array, "steps_plus_1 batch"]
    gradient_norm: Float[Array, "steps_plus_1 batch"]


class Minimum(NamedTuple):
    """What `minimise` returns. `sets` can be differentiated; the rest is for inspection.

    Attributes:
        sets: Y*, the final iterates.
        energy: E(Y*), without derivative; for one, call the energy at `sets`.
        gradient_norm: l2 norm over (n, d) of proj(Y* − ∇E(Y*)) − Y*; without a projection that is
            the norm of ∇E. It has the scale of the energy: compare it within one problem. With a
            projection, what is below the spacing of the numbers near Y is lost: in 16 bits a
            tolerance of less means that sets have stopped moving.
        num_steps: steps that each set took; fewer than asked for only with a tolerance.
        status: a `Status` for every set.
        trajectory: all iterates, if asked for.

    Under `jax.jit`, energy, gradient norm and status together cost one more evaluation of the
    gradient if they are used, and nothing if not.
    """

    sets: Float[Array, "batch n d"]
    energy: Float[Array, " batch"]
    gradient_norm: Float[Array, " batch"]
    num_steps: Int[Array, " batch"]
    status: Int[Array, " batch"]
    trajectory: Trajectory | None = None


class State(NamedTuple):
    """Where a descent is.

    Attributes:
        sets: Y_t, the current iterates.
        evaluated: Y_{t−1}, where the last gradient was evaluated.
        optimizer: the state of the optimiser.
        num_steps: steps that each set has taken.
        going: which sets still move: not yet within the tolerance, and finite.
        step: t, the number of steps of the loop.
        trajectory: room for every iterate, filled up to t; None unless asked for.
    """

    sets: Float[Array, "batch n d"]
    evaluated: Float[Array, "batch n d"]
    optimizer: Any
    num_steps: Int[Array, " batch"]
    going: Bool[Array, " batch"]
    step: Int[Array, ""]
    trajectory: Trajectory | None = None


class Info(NamedTuple):
    """Energy and gradient norm of every set, where the step started."""

    energy: Float[Array, " batch"]
    gradient_norm: Float[Array, " batch"]


@dataclass(frozen=True)
class Descent:
    """Projected, clipped gradient descent on an energy, one step at a time.

    A step, equation (2), evaluates ∇_Y E, clips it per set, lets the optimiser move the set, and
    projects:

        g = ∇_Y E(Y_t; z, θ)
        Y_{t+1} = proj(Y_t + opt(g · min(1, max_norm / (‖g‖ + 1e-6))))

    (paper, section 3 and appendix). The files in tests/golden hold what the authors' code computes.

    Attributes:
        energy: ``(params, sets [batch, n, d], context) -> [batch]``.
        num_steps: steps that `run` takes, at most.
        optimizer: an optax transformation; it sees the whole batch as one array.
        projection: maps every set to the nearest feasible one; None if all sets are feasible.
        max_grad_norm: clip the gradient of every set to this l2 norm over (n, d).
        tolerance: a set stops where its gradient norm is at most this, and becomes NaN where its
            energy or its gradient is not finite.
        return_trajectory: keep every iterate in the state.

    Example:
        >>> energy = lambda params, sets, context: jnp.sum((sets - context) ** 2, (1, 2)) / 4
        >>> descent = Descent(energy, optimizer=nesterov(1.0, 0.0))
        >>> state = descent.init({}, jnp.ones((1, 2, 1)), jnp.zeros((1, 2, 1)))
        >>> state, info = descent.step({}, jnp.ones((1, 2, 1)), state)
        >>> state.sets.ravel().tolist(), info.energy.tolist()
        ([0.5, 0.5], [0.5])
    """

    energy: Energy
    num_steps: int | Int[Array, ""] = 1
    optimizer: optax.GradientTransformation = DEFAULT_OPTIMIZER
    projection: Projection | None = None
    max_grad_norm: float | None = None
    tolerance: float | None = None
    return_trajectory: bool = False

    @property
    def fixed_point(self) -> FixedPoint:
        """The equation Y = proj(Y − ∇_Y E) that the minimum solves."""
        return FixedPoint(self.energy, self.projection)

    def init(self, params: Params, context: Any, initial_sets: Sets) -> State:
        """The state before the first step. Does not project."""
        batch = initial_sets.shape[0]
        trajectory = None
        if self.return_trajectory:
            rows = self.num_steps + 1
            energy = jax.eval_shape(self.energy, params, initial_sets, context)
            wide = jnp.promote_types(initial_sets.dtype, jnp.float32)
            trajectory = Trajectory(
                jnp.zeros((rows, *initial_sets.shape), initial_sets.dtype),
                jnp.zeros((rows, batch), energy.dtype),
                jnp.zeros((rows, batch), wide),
            )
        state = State(
            sets=initial_sets,
            evaluated=initial_sets,
            optimizer=self.optimizer.init(initial_sets),
            num_steps=jnp.zeros(batch, jnp.int32),
            going=jnp.ones(batch, bool),
            step=jnp.zeros((), jnp.int32),
            trajectory=trajectory,
        )
        varying = vary_like(state, params, context, initial_sets)
        return varying._replace(step=state.step)

    def step(self, params: Params, context: Any, state: State) -> tuple[State, Info]:
        """One step for every set that still moves."""
        sets = state.sets
        energy, grads = self.fixed_point.energies_and_gradient(params, context, sets)
        info = Info(energy, self.residual_norm(sets, grads))
        clipped = grads if self.max_grad_norm is None else clip_per_set(grads, self.max_grad_norm)
        updates, optimizer = optax.with_extra_args_support(self.optimizer).update(
            clipped,
            state.optimizer,
            sets,
            value=jnp.sum(energy),
            grad=clipped,
            value_fn=lambda sets: jnp.sum(self.energy(params, sets, context)),
        )
        moved = self.fixed_point.project(jnp.asarray(optax.apply_updates(sets, updates)))
        going = state.going
        if self.tolerance is not None:
            finite = jnp.isfinite(energy) & jnp.isfinite(info.gradient_norm)
            going = finite & (info.gradient_norm > self.tolerance)
            # A set that has converged stays where it is: its gradient no longer changes. One that
            # has diverged shall not look as if it had.
            moved = jnp.where(going[:, None, None], moved, sets)
            moved = jnp.where(finite[:, None, None], moved, jnp.nan)
        trajectory = state.trajectory
        if trajectory is not None:
            seen = lax.stop_gradient((sets, *info))
            trajectory = Trajectory(
                *(kept.at[state.step].set(x) for kept, x in zip(trajectory, seen, strict=True))
            )
        after = State(
            moved, sets, optimizer, state.num_steps + going, going, state.step + 1, trajectory
        )
        return after, info

    def run(
        self,
        params: Params,
        context: Any,
        state: State,
        num_steps: int | Int[Array, ""] | None = None,
    ) -> State:
        """`num_steps` steps, or fewer if all sets converge before. Has no reverse derivative.

        The last step is outside the loop. Implicit adjoints need the gradient that it evaluates,
        and outside the loop XLA sees that it has been computed already.
        """
        count = self.num_steps if num_steps is None else num_steps
        if not _check.is_traced(count) and count < 1:
            return state
        looped = count - 1

        def advance(state):
            return self.step(params, context, state)[0]

        if self.tolerance is None:
            state = lax.fori_loop(0, looped, lambda _, state: advance(state), state)
        else:
            end = state.step + looped
            # Sets that had come to rest may move again: parameters and context may be others.
            state = state._replace(going=jnp.ones_like(state.going))
            state = lax.while_loop(
                lambda state: (state.step < end) & jnp.any(state.going),
                advance,
                state,
            )
        if _check.is_traced(count):
            return lax.cond(count > 0, advance, lambda state: state, state)
        return advance(state)

    def run_differentiably(
        self, params: Params, context: Any, state: State, *, rematerialise: bool = False
    ) -> State:
        """`num_steps` steps as a scan, which has a derivative in both modes.

        Raises:
            ValueError: the number of steps is traced.
        """
        if _check.is_traced(self.num_steps):
            raise ValueError(
                "num_steps: expected a Python integer, because unrolling keeps every step, got a"
                " traced one; an implicit adjoint such as identity() takes it"
            )

        def advance(state, _):
            return self.step(params, context, state)[0], None

        if rematerialise:
            advance = jax.checkpoint(advance)
        return lax.scan(advance, state, None, length=int(self.num_steps))[0]

    def residual_norm(self, sets: Sets, grads: Sets) -> Float[Array, " batch"]:
        """Norm of proj(Y − ∇E) − Y. Zero at a minimum, also at one on the border."""
        if self.projection is None:
            return per_set_norm(grads)
        return per_set_norm(self.fixed_point.project(sets - grads) - sets)


def minimise(
    energy: Energy,
    params: Params,
    context: Any,
    initial_sets: Float[AnyArray, "batch n d"],
    *,
    optimizer: optax.GradientTransformation = DEFAULT_OPTIMIZER,
    num_steps: int | Int[Array, ""],
    projection: Projection | None = None,
    max_grad_norm: float | None = None,
    adjoint: Adjoint = identity(),  # noqa: B008 (a value)
    tolerance: float | None = None,
    return_trajectory: bool = False,
    **unknown: Any,
) -> Minimum:
    """Minimise E(Y; context, θ) over the sets Y, differentiably in `params` and `context`.

    The steps are those of `Descent`. The derivative is taken as `adjoint` says: through the steps,
    or implicitly at the minimum. Implicit adjoints linearise at the iterate before the last step,
    where the last gradient was evaluated. They ignore momentum, clipping and step size, and their
    memory does not depend on `num_steps`.

    Args:
        energy: ``(params, sets [batch, n, d], context) -> [batch]``, see `latent_energy`. Arrays
            that it closes over are differentiated like those in `params`. Outside of `jax.jit` it
            is traced at every call, and compiled for each other program that it is (with a custom
            derivative in it, as `jax.nn.relu` has one: for each other function).
        params: pytree θ. Differentiable.
        context: pytree, usually a `Context`; the first axis of each array is the batch.
            Differentiable. Mind the order: an energy takes the sets before the context.
        initial_sets: where the descent starts. Gets a gradient with `unrolled` only: a minimum does
            not depend on where the descent started.
        optimizer: any optax transformation. The default suits `latent_energy`; for another energy
            the step must be below about 1.36 / (largest curvature), see `suggest_step_size`. It
            sees the whole batch as one array, so it should act elementwise (sgd, adam, …) or on
            every set by itself (`anderson`). Optimisers that ask for value, gradient and value
            function (``optax.lbfgs``, ``optax.polyak_sgd``) get the energy summed over the batch;
            with a line search under an implicit adjoint only, since its loop has no reverse
            derivative.
        num_steps: upper bound on the steps, ≥ 1. May be a traced integer if the adjoint is
            implicit.
        projection: maps [batch, n, d] to the nearest feasible sets, e.g. `simplex`. Implicit
            adjoints project the initial sets too, before the first step.
        max_grad_norm: clip the gradient of every set to this l2 norm over (n, d).
        adjoint: `identity()` (the paper's), `neumann(k)`, `conjugate_gradient(k)`, `exact()`,
            `unrolled()`, or one of your own (see `Adjoint`).
        tolerance: a set stops where its gradient norm, as defined in `Minimum`, is at most this;
            the loop ends when all have.
        return_trajectory: keep every iterate, with energies and gradient norms, for inspection:
            as all of `Minimum` but its sets, they have no derivative. For a loss on them, take the
            steps yourself (`Descent.step`).

    Raises:
        ValueError, TypeError: an argument of the wrong rank, shape, type or range, an energy that
            does not return [batch], NaN or infinity in concrete inputs.

    Example:
        >>> energy = lambda params, sets, context: jnp.sum((sets - context) ** 2, (1, 2)) / 4
        >>> minimum = minimise(
        ...     energy, {}, jnp.ones((1, 2, 1)), jnp.zeros((1, 2, 1)), num_steps=50, tolerance=1e-4
        ... )
        >>> minimum.sets.round(3).ravel().tolist(), Status(int(minimum.status[0])).name
        ([1.0, 1.0], 'CONVERGED')
    """
    _refuse_unknown(unknown)
    _check_arguments(
        energy,
        params,
        context,
        initial_sets,
        optimizer,
        num_steps,
        projection,
        max_grad_norm,
        adjoint,
    )
    if tolerance is not None:
        _check.require_positive("tolerance", tolerance)
    if return_trajectory and _check.is_traced(num_steps):
        raise ValueError(
            "num_steps: expected a Python integer because return_trajectory=True, got a traced one"
        )
    if not _check.is_traced(num_steps):
        num_steps = int(num_steps)
    initial_sets, context = jax.tree.map(jnp.asarray, (initial_sets, context))
    descent = Descent(
        energy, num_steps, optimizer, projection, max_grad_norm, tolerance, return_trajectory
    )
    traced = any(map(_check.is_traced, jax.tree.leaves((num_steps, params, context, initial_sets))))
    # A learning rate that is traced: a program that is kept must not hold it.
    # So must it not hold what an optimiser of the user's uses, which may be changed.
    if not traced and not holds_tracer(tuple(optimizer)) and is_fixed(tuple(optimizer)):
        found = _without_closures(descent, params, context, initial_sets)
        if found is not None and _hashable((found[0], adjoint)):
            # Outside of any transformation: one compiled program, found again for equal settings.
            return _program(found[0], adjoint)(found[1], params, context, initial_sets)
    if not isinstance(adjoint, Implicit | Unrolled):
        # Perhaps with a custom derivative, which sees the arguments of a function only.
        descent, params = _with_explicit_tracers(descent, params, context, initial_sets)
    return _minimise(descent, adjoint, params, context, initial_sets)


def lowest(minima: Minimum) -> Minimum:
    """Of several descents on the same energies, for every set the one that ended lowest.

    A descent can end in a minimum that is not the lowest. Its energy tells: begin at several
    initial sets and keep the best. Where the energy is a model's match to what it has seen, that
    needs no knowledge of the true set.

    For evaluation. To train through it, choose first and differentiate one descent: the gradient of
    a start that is not finite is NaN, chosen or not, and all starts are differentiated.

    Args:
        minima: with an axis of starts before all others, as `jax.vmap` over initial sets gives it.

    Returns:
        The minimum [batch, ...] of every set; one that is not finite only where all are.

    Raises:
        ValueError: ``minima.sets`` without that axis, or with none in it.

    Example:
        >>> two_wells = lambda params, y, context: jnp.sum((y**2 - 1) ** 2 + 0.3 * y, (1, 2))
        >>> gentle = nesterov(0.1)
        >>> descend = lambda y: minimise(two_wells, {}, None, y, optimizer=gentle, num_steps=99)
        >>> starts = jnp.array([1.0, -1.0]).reshape(2, 1, 1, 1)
        >>> round(lowest(jax.vmap(descend)(starts)).sets.item(), 2)
        -1.04
    """
    _check.require_rank("minima.sets", minima.sets, 4, "starts batch n d")
    _check.require_nonempty("minima.sets", minima.sets, "starts batch n d")
    bad = (minima.status == Status.NOT_FINITE) | ~jnp.isfinite(minima.energy)
    best = jnp.argmin(jnp.where(bad, jnp.inf, minima.energy), axis=0)

    def chosen(tree, batch_axis):
        pick = jax.vmap(lambda x, i: x[i], in_axes=(batch_axis, 0), out_axes=batch_axis - 1)
        return jax.tree.map(lambda x: pick(x, best), tree)

    trajectory = chosen(minima.trajectory, 2)
    return chosen(minima._replace(trajectory=None), 1)._replace(trajectory=trajectory)


def _minimise(descent: Descent, adjoint: Adjoint, params, context, initial_sets) -> Minimum:
    end = adjoint.wrap(descent)(params, context, initial_sets)

    # What is for watching: at the last iterate, without derivative.
    params, context, sets = lax.stop_gradient((params, context, end.sets))
    energy, grads = descent.fixed_point.energies_and_gradient(params, context, sets)
    norm = descent.residual_norm(sets, grads)
    status = jnp.full_like(end.num_steps, Status.OUT_OF_STEPS)
    if descent.tolerance is not None:
        status = jnp.where(norm <= descent.tolerance, Status.CONVERGED, status)
    finite = jnp.isfinite(energy) & jnp.isfinite(norm)
    status = jnp.where(finite, status, Status.NOT_FINITE).astype(jnp.int32)
    trajectory = end.trajectory
    if trajectory is not None:
        # Where all sets had stopped before, the rows that no step filled are as the last.
        step = jnp.arange(len(trajectory.energy))
        left = step >= jnp.max(end.num_steps)
        rows = zip(trajectory, (sets, energy, norm), strict=True)
        trajectory = Trajectory(
            *(jnp.where(left.reshape(-1, *[1] * x.ndim), x, kept) for kept, x in rows)
        )
    return Minimum(end.sets, energy, norm, end.num_steps, status, trajectory)


# Bounded: with an energy made anew for every call, each program is some 2 MB that nobody asks for
# again. A static argument of `jit` would keep 4,096 of them.
@functools.lru_cache(maxsize=64)
def _program(descent: Descent, adjoint: Adjoint) -> Callable[..., Minimum]:
    def run(hidden, params, context, initial_sets):
        given = {name: functools.partial(getattr(descent, name), hidden[name]) for name in hidden}
        whole = dataclasses.replace(descent, **given)
        return _minimise(whole, adjoint, params, context, initial_sets)

    return jax.jit(run)


def _without_closures(descent: Descent, params, context, sets) -> tuple[Descent, Any] | None:
    """The descent with its energy and projection `Opened`, and what they close over, by name.

    So a program is found again for functions that do the same, and is given what they hold now.
    None if that cannot be: where they close over tracers, or cannot be compared.
    """
    opened, hidden = {}, {}
    for name, examples in (("energy", (params, sets, context)), ("projection", (sets,))):
        function = getattr(descent, name)
        if is_fixed(function):
            continue
        found = spelled(function, *examples)
        if found is None or any(map(_check.is_traced, found[1])):
            return None
        opened[name], hidden[name] = found
    return dataclasses.replace(descent, **opened), hidden


def _hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


def _with_explicit_tracers(descent: Descent, params, context, sets) -> tuple[Descent, Any]:
    """The descent with what its energy closes over made a part of the parameters.

    A custom derivative sees the arguments of a function only.
    """
    rest, hidden = opened(descent.energy, params, sets, context)
    if not any(map(_check.is_traced, hidden)):
        return descent, params

    def explicit(both, sets, context):
        params, hidden = both
        return rest(hidden, params, sets, context)

    return dataclasses.replace(descent, energy=explicit), (params, hidden)


def per_set_norm(sets: Float[Array, "batch n d"]) -> Float[Array, " batch"]:
    """l2 norm over (n, d), with derivative zero rather than NaN at zero.

    In float32 for sets of 16 bits, whose squares leave the range of float16.
    """
    sets = sets.astype(jnp.promote_types(sets.dtype, jnp.float32))
    squared = jnp.sum(jnp.square(sets), axis=(1, 2))
    positive = squared > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, squared, 1)), squared)


def clip_per_set(grads: Float[Array, "batch n d"], max_norm: float) -> Float[Array, "batch n d"]:
    """Scale every set's gradient by min(1, max_norm / (norm + 1e-6)), norm over (n, d)."""
    norm = per_set_norm(grads)[:, None, None]
    return (grads * jnp.minimum(1, max_norm / (norm + 1e-6))).astype(grads.dtype)


# What other libraries and the authors' code call it, and versions before 0.2 did.
_ELSEWHERE = {
    "adjoint": ("gradient", "implicit_diff", "backward", "unroll", "b_solver"),
    "num_steps": ("maxiter", "max_steps", "max_iter", "f_max_iter", "decoder_iters"),
    "tolerance": ("tol", "atol", "rtol", "f_tol"),
    "max_grad_norm": ("grad_clip", "max_norm", "max_inner_grad_norm"),
    "optimizer": ("solver", "f_solver"),
    "optimizer=nesterov(step_size, momentum)": ("step_size", "stepsize", "learning_rate", "lr",
                                                "momentum", "decoder_lr", "decoder_momentum"),
}  # fmt: skip


def _refuse_unknown(arguments: dict[str, Any]) -> None:
    for name, value in arguments.items():
        names = [x for x in inspect.signature(minimise).parameters if x != "unknown"]
        expected = f"one of {', '.join(names)}, the arguments of minimise()"
        for own, others in _ELSEWHERE.items():
            if name in others:
                expected = f"{own}, the name here"
        raise TypeError(f"{name}: expected {expected}, got {name}={value!r}")


def _check_projection(projection, initial_sets):
    if not callable(projection):
        raise TypeError(
            f"projection: expected a function of sets such as simplex, got {projection!r}"
        )
    expected = jax.ShapeDtypeStruct(jnp.shape(initial_sets), jnp.result_type(initial_sets))
    found = jax.eval_shape(lambda sets: projection(sets), expected)
    if (getattr(found, "shape", None), getattr(found, "dtype", None)) != (
        expected.shape,
        expected.dtype,
    ):
        raise ValueError(
            f"projection: expected a function that returns sets of shape {expected.shape} and "
            f"{expected.dtype}, as it is given, got {found}"
        )


def _check_arguments(
    energy, params, context, initial_sets, optimizer, num_steps, projection, max_grad_norm, adjoint
):
    if not callable(energy):
        raise TypeError(
            "energy: expected a function (params, sets, context) -> [batch], such as "
            f"latent_energy(encoder.apply), got {energy!r}"
        )
    _check.require_rank("initial_sets", initial_sets, 3, "batch n d")
    _check.require_nonempty("initial_sets", initial_sets, "batch n d")
    _check.require_floating("initial_sets", initial_sets)
    _check.require_arrays("params", params)
    _check.require_arrays("context", context)
    _check.require_finite("initial_sets", initial_sets)
    _check.require_finite("context", context)
    _check.require_finite("params", params)
    if projection is not None:
        _check_projection(projection, initial_sets)
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise TypeError(
            "optimizer: expected an optax transformation such as optax.sgd(1.0) or anderson(), "
            f"got {optimizer!r}"
        )
    _check.require_steps("num_steps", num_steps)
    if max_grad_norm is not None:
        _check.require_positive("max_grad_norm", max_grad_norm)
    if isinstance(adjoint, type) or not hasattr(adjoint, "wrap"):
        raise TypeError(
            "adjoint: expected identity(), neumann(k), conjugate_gradient(k), exact(), unrolled() "
            "or another value with a method wrap(descent); of a word, parse_adjoint(word); got "
            f"{adjoint!r}"
        )
    shape = jax.eval_shape(energy, params, initial_sets, context)
    batch = initial_sets.shape[:1]
    if getattr(shape, "shape", None) != batch:
        raise ValueError(
            f"energy: expected one number per set, shape {batch}, got "
            f"{getattr(shape, 'shape', shape)}; do not average over the batch"
        )
