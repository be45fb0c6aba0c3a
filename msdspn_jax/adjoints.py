"""How a minimum is differentiated: adjoints, each a value that wraps the descent.

A minimum of E over sets is a fixed point of one plain step of (projected) gradient descent,

    Y = T(Y; z, θ) = proj(Y − ∇_Y E(Y; z, θ)).                                      equation (2)

With H = ∂²E/∂Y² and P = ∂proj, both symmetric, ∂T/∂Y = P (I − H) and ∂T/∂θ = −P ∂²E/∂Y∂θ, and the
implicit function theorem gives the derivative of the minimum (paper, section 3):

    Ẏ = (I − ∂T/∂Y)⁻¹ ∂T/∂θ θ̇,   transposed   θ̄ = (∂T/∂θ)ᵀ (I − ∂T/∂Y)⁻ᵀ v,         equation (3)

and likewise for z and whatever else the energy depends on. A dot marks a tangent, a bar a
cotangent; v is the cotangent of Y. The adjoints differ in what they put in place of the inverse,
and so in cost (P = 1 for the unconstrained problem):

    ==========================  =======================  ==================  =====================
    value                       (I − ∂T/∂Y)⁻¹ b          products with H     memory
    ==========================  =======================  ==================  =====================
    identity()                  b                        0                   one step
    neumann(k)                  Σ_{i≤k} (∂T/∂Y)ⁱ b       k                   one step
    conjugate_gradient(k, δ)    (H + δI)⁻¹ b, k steps    k                   one step
    exact()                     solved, dense by default n · d               (n · d)² per set
    unrolled()                  none: the steps          2 passes per step   grows with the steps
    ==========================  =======================  ==================  =====================

`identity` is the paper's rule, equation (4): H is replaced by the identity, which is the same as
truncating the Neumann series after its first term.

The rule is written once, as the map θ̇ ↦ Ẏ of forward mode; JAX transposes it for reverse mode. It
is linear but for truncated conjugate gradients, see `conjugate_gradient`. The rule calls the
minimum that it differentiates, so it can be differentiated again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from msdspn_jax import _check
from msdspn_jax._closures import hoisted
from msdspn_jax._varying import vary_like
from msdspn_jax.energy import Energy, Params

Sets = Float[Array, "batch n d"]
Projection = Callable[[jax.Array], jax.Array]


class FixedPoint(NamedTuple):
    """The equation Y = T(Y; z, θ) that a minimum solves: an energy, and where its sets may lie."""

    energy: Energy
    projection: Projection | None = None

    def energies_and_gradient(
        self, params: Params, context: Any, sets: Sets
    ) -> tuple[Float[Array, " batch"], Sets]:
        """E and ∇_Y E, for every set of the batch.

        The energies are summed before differentiating. Sets do not interact, so this gives the
        gradient of each, and the derivatives keep matrix products over the whole batch.
        """

        def total_energy(sets):
            energies = self.energy(params, sets, context)
            return jnp.sum(energies), energies

        gradient, energies = jax.grad(total_energy, has_aux=True)(sets)
        return energies, gradient

    def gradient(self, params: Params, context: Any, sets: Sets) -> Sets:
        """∇_Y E."""
        return self.energies_and_gradient(params, context, sets)[1]

    def step(self, params: Params, context: Any, sets: Sets) -> Sets:
        """T(Y; z, θ) = proj(Y − ∇_Y E)."""
        return self.project(sets - self.gradient(params, context, sets))

    def project(self, points: Sets) -> Sets:
        """Project onto the feasible sets; the identity for an unconstrained problem."""
        return points if self.projection is None else self.projection(points)


class End(NamedTuple):
    """What a descent came to.

    Attributes:
        sets: Y_T, the last iterates.
        evaluated: Y_{T−1}, where the last gradient was evaluated.
        num_steps: steps that each set took.
        trajectory: all iterates, if asked for.
    """

    sets: Float[Array, "batch n d"]
    evaluated: Float[Array, "batch n d"]
    num_steps: Int[Array, " batch"] | Float[Array, " batch"]
    trajectory: Any = None


Solve = Callable[[Params, Any, Sets], Any]
"""``(params, context, initial_sets) -> end``, which has the attributes of `End`."""


@runtime_checkable
class Minimisation(Protocol):
    """What an adjoint wraps; `msdspn_jax.Descent` is one."""

    @property
    def fixed_point(self) -> FixedPoint:
        """The equation that the minimum solves."""
        ...

    @property
    def num_steps(self) -> int | Int[Array, ""]:
        """How many steps are to be taken, at most."""
        ...

    def init(self, params: Params, context: Any, initial_sets: Sets) -> Any:
        """The state before the first step; has ``sets``, ``evaluated`` and more."""
        ...

    def step(self, params: Params, context: Any, state: Any) -> tuple[Any, Any]:
        """One step: the next state, and what it has seen."""
        ...

    def run(self, params: Params, context: Any, state: Any, num_steps: Any = None) -> Any:
        """All steps, or `num_steps` of them, as fast as possible; has no reverse derivative."""
        ...

    def run_differentiably(
        self, params: Params, context: Any, state: Any, *, rematerialise: bool = False
    ) -> Any:
        """All steps, as a scan, which has a reverse derivative."""
        ...


@runtime_checkable
class Adjoint(Protocol):
    """How a minimum is differentiated. Anything with this one method is an adjoint.

    Make it a frozen dataclass, so that adjoints with equal settings are equal. `minimise` then uses
    a program again that it compiled for an equal one.
    """

    def wrap(self, descent: Minimisation) -> Solve:
        """The descent as a function ``(params, context, initial_sets) -> end``.

        Only the derivative of ``end.sets`` is taken.
        """
        ...


class Linearised(NamedTuple):
    """∂T/∂Y at a point, as products with its two symmetric factors: ∂T/∂Y = P (I − H)."""

    hessian: Callable[[Sets], Sets]
    """w ↦ H w."""
    project: Callable[[Sets], Sets]
    """w ↦ P w, the derivative of the projection at Y − ∇_Y E."""
    constrained: bool = True
    """Whether there is a projection; P is the identity otherwise."""

    def residual(self, w: Sets) -> Sets:
        """(I − ∂T/∂Y) w."""
        if not self.constrained:  # The same, but a small H w would be lost in w − (w − H w).
            return self.hessian(w)
        return w - self.project(w - self.hessian(w))


@dataclass(frozen=True)
class Implicit:
    """Base of the adjoints that differentiate *at* the minimum.

    A subclass says how (I − ∂T/∂Y) u = b is solved; this class does the rest. As in the authors'
    code, the derivative is taken at the iterate before the last step, where the last gradient was
    evaluated. Momentum, clipping and the step size do not enter it. The initial sets get a
    derivative of zero: a minimum does not depend on where the descent started.
    """

    def solve(self, linearised: Linearised, b: Sets) -> Sets:
        """Return u ≈ (I − ∂T/∂Y)⁻¹ b, linear in b for both modes to agree."""
        raise NotImplementedError

    def through(self, project: Callable[[Any, Sets], Sets]) -> Callable[[Any, Sets], Sets]:
        """What b = ∂T/∂θ θ̇ goes through after Y − ∇_Y E: the projection, with what it holds."""
        return project

    def wrap(self, descent: Minimisation) -> Solve:
        """See `Adjoint.wrap`."""
        fixed_point = descent.fixed_point

        def run(params, context, initial_sets, num_steps):
            start = descent.init(params, context, fixed_point.project(initial_sets))
            state = descent.run(params, context, start, num_steps)
            # As a float: shard_map cannot mark the tangents of integers as varying over devices.
            steps = state.num_steps.astype(jnp.float32)
            return End(state.sets, state.evaluated, steps, state.trajectory)

        def solve(params, context, initial_sets):
            # A custom derivative sees arguments only: what energy, projection and optimiser close
            # over becomes one, and so does a traced number of steps.
            traced = descent.num_steps if isinstance(descent.num_steps, jax.Array) else None
            point = vary_like(initial_sets, params, context)
            runs, in_run = hoisted(run, params, context, initial_sets, traced)
            gradient, in_gradient = hoisted(fixed_point.gradient, params, context, point)
            project, in_project = hoisted(fixed_point.project, point)

            @jax.custom_jvp
            def minimum(hidden, params, context, initial_sets, num_steps):
                return runs(hidden[0], params, context, initial_sets, num_steps)

            @minimum.defjvp
            def rule(primals, tangents):
                hidden, params, context, *_ = primals
                end = minimum(*primals)
                sets = end.evaluated

                through = self.through(project)

                def step(in_gradient, params, context):
                    return through(hidden[2], sets - gradient(in_gradient, params, context, sets))

                # b = ∂T/∂θ θ̇, then Ẏ = (I − ∂T/∂Y)⁻¹ b: equation (3).
                (_, in_gradient_dot, in_project_dot), *others_dot = tangents[:3]
                _, b = jax.jvp(step, (hidden[1], params, context), (in_gradient_dot, *others_dot))
                linearised = _linearise(
                    lambda sets: gradient(hidden[1], params, context, sets),
                    lambda points: project(hidden[2], points),
                    sets,
                )._replace(constrained=fixed_point.projection is not None)
                if in_project:
                    # What moves the feasible sets themselves is no tangent of them, as b is:
                    # (I − ∂T/∂Y)⁻¹ c = c + (I − ∂T/∂Y)⁻¹ ∂T/∂Y c.
                    point = sets - gradient(hidden[1], params, context, sets)
                    _, c = jax.jvp(lambda held: project(held, point), (hidden[2],),
                                   (in_project_dot,))  # fmt: skip
                    tangent = c + self.solve(linearised, b + c - linearised.residual(c))
                else:
                    tangent = self.solve(linearised, b)
                nothing = jax.tree.map(jnp.zeros_like, end)
                return end, nothing._replace(sets=tangent, evaluated=tangent)

            hidden = (in_run, in_gradient, in_project)
            end = minimum(hidden, params, context, initial_sets, traced)
            return end._replace(num_steps=end.num_steps.astype(jnp.int32))

        return solve


@dataclass(frozen=True)
class Identity(Implicit):
    """See `identity`."""

    straight_through: bool = False

    def solve(self, linearised: Linearised, b: Sets) -> Sets:
        """Equation (4): u = b."""
        return b

    def through(self, project: Callable[[Any, Sets], Sets]) -> Callable[[Any, Sets], Sets]:
        """See `Implicit.through`: nothing, if straight through."""
        return (lambda _, points: points) if self.straight_through else project

    def __str__(self) -> str:
        """The spelling that `parse_adjoint` reads."""
        return "identity:straight-through" if self.straight_through else "identity"


@dataclass(frozen=True)
class Neumann(Implicit):
    """See `neumann`."""

    num_terms: int

    def __post_init__(self) -> None:
        _check.require_integer("num_terms", self.num_terms, 0)

    def solve(self, linearised: Linearised, b: Sets) -> Sets:
        """Return u = Σ_{i≤k} (∂T/∂Y)ⁱ b, by Horner's rule: u ← b + (∂T/∂Y) u."""

        def horner(_, u):
            return b + (u - linearised.residual(u))

        return lax.fori_loop(0, self.num_terms, horner, vary_like(b, linearised.residual(b)))

    def __str__(self) -> str:
        """The spelling that `parse_adjoint` reads."""
        return f"neumann:{self.num_terms}"


@dataclass(frozen=True)
class ConjugateGradient(Implicit):
    """See `conjugate_gradient`."""

    max_steps: int = 10
    damping: float = 0.0

    def __post_init__(self) -> None:
        _check.require_integer("max_steps", self.max_steps, 1)
        _check.require_nonnegative("damping", self.damping)

    def solve(self, linearised: Linearised, b: Sets) -> Sets:
        """Solve (I − ∂T/∂Y) u = b by u = P w: P (I − P + H P) w + δ w = b, which is symmetric.

        b is in the range of P, as every derivative of T is. On flat faces P² = P, and what is left
        is P H P; where the constraint is curved, I − P is its share.
        """
        hessian, project, _ = _where_seen(linearised, b)

        def operator(w):
            u = project(w)
            return project(w - u + hessian(u)) + self.damping * w

        def descend(operator, b):
            return _conjugate_gradients(operator, b, self.max_steps)

        return project(_solve(operator, b, descend, symmetric=True))

    def __str__(self) -> str:
        """The spelling that `parse_adjoint` reads."""
        damping = f":{float(self.damping)!r}" if self.damping else ""
        return f"conjugate_gradient:{self.max_steps}{damping}"


@dataclass(frozen=True)
class Exact(Implicit):
    """See `exact`."""

    method: str = "auto"

    def __post_init__(self) -> None:
        _check.require_choice("method", self.method, ("auto", "dense", "cg"))

    def solve(self, linearised: Linearised, b: Sets) -> Sets:
        """Solve (I − ∂T/∂Y) u = b."""
        linearised = _where_seen(linearised, b)
        small = b.shape[1] * b.shape[2] <= 1024
        dense = self.method == "dense" or (self.method == "auto" and small)
        return _solve(linearised.residual, b, _dense_solve if dense else _normal_cg)

    def __str__(self) -> str:
        """The spelling that `parse_adjoint` reads."""
        return "exact" if self.method == "auto" else f"exact:{self.method}"


@dataclass(frozen=True)
class Unrolled:
    """See `unrolled`."""

    rematerialise: bool = False

    def wrap(self, descent: Minimisation) -> Solve:
        """See `Adjoint.wrap`."""

        def minimum(params, context, initial_sets):
            state = descent.init(params, context, initial_sets)
            return descent.run_differentiably(
                params, context, state, rematerialise=self.rematerialise
            )

        return minimum

    def __str__(self) -> str:
        """The spelling that `parse_adjoint` reads."""
        return "unrolled:remat" if self.rematerialise else "unrolled"


def identity(*, straight_through: bool = False) -> Identity:
    """The paper's rule: H is replaced by the identity, equation (4) (section 3).

    The default for training. It costs one mixed second derivative and no products with H, in
    constant memory. Its direction is biased where the curvature of the energy differs between
    directions, and its length by the curvature where that is not about 1: energies that are trained
    with it adapt, for a fixed one of your own take another.

    A second derivative applies the rule again: it is that of ∂T/∂θ at the minimum, where the
    minimum moves as the rule says.

    Args:
        straight_through: leave out the derivative of the projection, as if sets were free (a
            straight-through estimator; Bengio et al. 2013, arXiv 1308.3432). Not in the paper.
            Where an element has come to lie in a corner of its constraint, that derivative is zero,
            and a loss teaches nothing about it, right or wrong. Without a projection the same rule.

    Example:
        >>> str(identity(straight_through=True))
        'identity:straight-through'
    """
    return Identity(straight_through)


def neumann(num_terms: int) -> Neumann:
    """(I − ∂T/∂Y)⁻¹ ≈ Σ_{i=0}^{num_terms} (∂T/∂Y)ⁱ, a truncated Neumann series.

    It converges to the exact inverse where the step T contracts, that is where all eigenvalues of H
    lie in (0, 2). Elsewhere it diverges. Every term after the first costs one product with H.
    ``neumann(0)`` is the rule of `identity`.

    Args:
        num_terms: number of terms after the first, an integer ≥ 0.

    Example:
        >>> str(neumann(3))
        'neumann:3'
    """
    return Neumann(num_terms)


def conjugate_gradient(max_steps: int = 10, *, damping: float = 0.0) -> ConjugateGradient:
    """(I − ∂T/∂Y)⁻¹ ≈ (H + damping · I)⁻¹, on the tangent space of the projection.

    Every set of the batch has its own system and its own step lengths. A step costs one product
    with H. At a minimum H is positive semidefinite; before convergence it need not be. Where a set
    meets a direction of non-positive curvature, it stops and keeps its solution so far; at the
    first step that is the paper's rule. `damping` makes this rarer.

    With fewer steps than n · d the result is not linear in b: the steps depend on it. So the
    gradient of a sum of losses is not the sum of their gradients, and forward and reverse mode
    differ, by as much as the solution is inexact. Where that matters, take `neumann` or `exact`.

    Args:
        max_steps: upper bound on the steps, ≥ 1; n · d of them solve the system exactly.
        damping: δ ≥ 0 added to the diagonal of H.

    Example:
        >>> str(conjugate_gradient(5, damping=0.01))
        'conjugate_gradient:5:0.01'
    """
    return ConjugateGradient(max_steps, damping)


def exact(*, method: str = "auto") -> Exact:
    """The implicit function theorem without approximation: to check the others, not to train.

    Args:
        method: "dense" builds the matrix I − ∂T/∂Y, which takes n · d products with H and (n · d)²
            numbers per set, and factorises it. "cg" solves its normal equations by conjugate
            gradients, in little memory; they square the condition number, so in float32 it is right
            up to some 10³ of it: use float64 above. "auto" is dense up to n · d = 1024, else "cg".
            The dense way solves for 16-bit sets in float32.

    A singular system (an energy with flat directions, for instance two elements that the encoder
    cannot tell apart and no proximity term) has no implicit derivative; the result is not finite,
    or arbitrary: it changes with `num_steps`.

    Example:
        >>> str(exact(method="dense"))
        'exact:dense'
    """
    return Exact(method)


def unrolled(*, rematerialise: bool = False) -> Unrolled:
    """Differentiate through every inner step, as DSPN does (arXiv 1906.06565).

    This is the exact derivative of the iteration as it was run, with a gradient for the initial
    sets. Memory grows linearly with the steps. As in the authors' DSPN, the initial set is not
    projected before the first step.

    Args:
        rematerialise: keep only the iterates, and compute everything else of a step again in the
            backward pass. Far less memory a step; one more evaluation of it, where forward and
            backward cost about three: about a third more time.

    Example:
        >>> str(unrolled(rematerialise=True))
        'unrolled:remat'
    """
    return Unrolled(rematerialise)


# --- the linear algebra ---


def _linearise(gradient_at, project_at, sets) -> Linearised:
    gradient, hessian = jax.linearize(gradient_at, sets)
    _, project = jax.linearize(project_at, sets - gradient)
    return Linearised(hessian, project)


def _where_seen(linearised: Linearised, b: Sets) -> Linearised:
    """H with a one on the diagonal for entries that the energy does not see.

    Rows of H are zero there, as for elements that a mask says are absent: any u solves them, and
    no solver would. One product with a vector without zeros finds them.
    """
    hessian = linearised.hessian
    probe = jax.random.normal(jax.random.key(0), b.shape[1:], b.dtype)
    image = hessian(vary_like(jnp.broadcast_to(probe, b.shape), b))
    seen = lax.stop_gradient(image) != 0
    return linearised._replace(hessian=lambda w: jnp.where(seen, hessian(w), w))


def _solve(operator, b: Sets, solve, *, symmetric: bool = False) -> Sets:
    """``solve(operator, b)``, differentiated as the solution of a linear system, not as its steps.

    Transposed, the same ``solve`` is applied to the transpose of the operator.
    """
    b = vary_like(b, operator(b))
    return lax.custom_linear_solve(operator, b, solve, transpose_solve=solve, symmetric=symmetric)


def _conjugate_gradients(operator, b: Sets, max_steps: int) -> Sets:
    """Conjugate gradients on every set of the batch by itself, from zero.

    For sets of 16 bits only the products with H are of 16 bits: squares of small cotangents would
    vanish.
    """
    dtype = b.dtype
    tolerance = 8 * float(jnp.finfo(dtype).eps)
    b, scale = _scaled(b)

    def apply(w):
        return operator(w.astype(dtype)).astype(b.dtype)

    step, start = _cg_step(apply, b, tolerance)
    u = lax.fori_loop(0, max_steps, lambda _, carry: step(carry), start)[0]
    # Where no direction had positive curvature, the paper's rule.
    return (jnp.where(_dot(u, u) > 0, u, b) * scale).astype(dtype)


def _scaled(b: Sets) -> tuple[Sets, Float[Array, "batch 1 1"]]:
    """Every set over its largest entry, whose squares neither vanish nor overflow; in 32 bits."""
    b = b.astype(jnp.promote_types(b.dtype, jnp.float32))
    scale = jnp.max(jnp.abs(b), (1, 2), keepdims=True)
    scale = jnp.where(scale > 0, scale, 1)
    return b / scale, scale


def _cg_step(apply: Callable[[Sets], Sets], b: Sets, tolerance: float):
    """A step of conjugate gradients on every set by itself, and where it begins: u = 0.

    A set is at rest where its residual is that small a part of b, or its curvature not positive.
    """
    squared = _dot(b, b)
    enough = tolerance**2 * squared

    def step(carry):
        u, residual, direction, squared, active = carry
        image = apply(direction)
        curvature = _dot(direction, image)
        active = active & (curvature > 0) & (squared > enough)
        length = jnp.where(active, squared / jnp.where(active, curvature, 1), 0)
        u = u + length * direction
        residual = residual - length * image
        new_squared = _dot(residual, residual)
        ratio = jnp.where(active, new_squared / jnp.where(active, squared, 1), 0)
        return u, residual, residual + ratio * direction, new_squared, active

    return step, vary_like((jnp.zeros_like(b), b, b, squared, squared > 0), b)


def _dense_solve(operator, b: Sets) -> Sets:
    batch, n, d = b.shape
    basis = jnp.eye(n * d, dtype=b.dtype).reshape(n * d, 1, n, d)
    columns = lax.map(lambda e: operator(vary_like(jnp.broadcast_to(e, b.shape), b)), basis)
    matrix = jnp.moveaxis(columns.reshape(n * d, batch, n * d), 0, -1)
    # LAPACK has no 16-bit types.
    wide = jnp.promote_types(b.dtype, jnp.float32)
    right = b.reshape(batch, n * d, 1).astype(wide)
    return jnp.linalg.solve(matrix.astype(wide), right).reshape(b.shape).astype(b.dtype)


def _normal_cg(operator, b: Sets) -> Sets:
    """Conjugate gradients on AᵀA u = Aᵀb, every set by itself, until its residual is rounding."""
    dtype = b.dtype
    b, scale = _scaled(b)

    def apply(w):  # Of 16 bits only the operator.
        return operator(w.astype(dtype)).astype(b.dtype)

    transposed = jax.linear_transpose(apply, b)

    def normal(w):
        return transposed(apply(w))[0]

    tolerance = max(100 * float(jnp.finfo(b.dtype).eps), float(jnp.finfo(dtype).eps))
    right, size = _scaled(transposed(b)[0])
    step, start = _cg_step(normal, right, tolerance)
    _, (u, *_) = lax.while_loop(
        lambda carry: (carry[0] < 20 * b[0].size) & jnp.any(carry[1][-1]),
        lambda carry: (carry[0] + 1, step(carry[1])),
        (0, start),
    )
    return (u * size * scale).astype(dtype)


def _dot(a: Sets, b: Sets) -> Float[Array, "batch 1 1"]:
    return jnp.sum(a * b, axis=(1, 2), keepdims=True)


# --- spelled as a word ---

_SPELLINGS = (
    "'identity', 'identity:straight-through', 'neumann:3' (terms), 'conjugate_gradient:10:0.01'"
    " (steps, damping), 'exact', 'unrolled' or 'unrolled:remat'"
)


def _identity_of(straight_through: str = "") -> Identity:
    if straight_through.replace("_", "-") not in ("", "straight-through"):
        raise ValueError(f"straight_through: expected 'straight-through', got {straight_through!r}")
    return identity(straight_through=bool(straight_through))


def _neumann_of(num_terms: str = "1") -> Neumann:
    return neumann(int(num_terms))


def _conjugate_gradient_of(max_steps: str = "10", damping: str = "0") -> ConjugateGradient:
    return conjugate_gradient(int(max_steps), damping=float(damping))


def _exact_of(method: str = "auto") -> Exact:
    return exact(method=method)


def _unrolled_of(rematerialise: str = "") -> Unrolled:
    if rematerialise not in ("", "remat"):
        raise ValueError(f"rematerialise: expected 'remat', got {rematerialise!r}")
    return unrolled(rematerialise=bool(rematerialise))


ADJOINTS: dict[str, Callable[..., Adjoint]] = {
    "identity": _identity_of,
    "neumann": _neumann_of,
    "conjugate_gradient": _conjugate_gradient_of,
    "exact": _exact_of,
    "unrolled": _unrolled_of,
}


def parse_adjoint(text: str) -> Adjoint:
    """An adjoint from its spelling, which ``str(adjoint)`` gives back.

    For command lines and configuration files. Arguments follow the name after colons, in order.

    Raises:
        ValueError: an unknown name, or arguments that the named adjoint does not take.

    Example:
        >>> parse_adjoint("neumann:3") == neumann(3)
        True
    """
    try:
        name, *arguments = text.split(":")
        return ADJOINTS[name.replace("-", "_")](*arguments)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"adjoint: expected {_SPELLINGS}, got {text!r}") from error
