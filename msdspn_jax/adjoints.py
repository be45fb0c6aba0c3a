"""How a minimum is differentiated.

A minimum of E over sets is a fixed point of one plain step of (projected) gradient descent,

    Y = T(Y; z, θ) = proj(Y − ∇_Y E(Y; z, θ)).

With H = ∂²E/∂Y² and P = ∂proj, both symmetric, ∂T/∂Y = P (I − H) and ∂T/∂θ = −P ∂²E/∂Y∂θ, so the
implicit function theorem gives the vector-Jacobian product of an output cotangent v as

    u = (I − ∂T/∂Y)⁻ᵀ v,        θ̄ = (∂T/∂θ)ᵀ u = −∂/∂θ ⟨∇_Y E(Y; z, θ), P u⟩,

and likewise for z and whatever else the energy depends on. The ways to differentiate offered here
differ in how they approximate u, and so in cost (P = 1 for the unconstrained problem):

    ==========================  =======================  ==================  =====================
    value                       u                        products with H     memory
    ==========================  =======================  ==================  =====================
    identity()                  v                        0                   one step
    neumann(k)                  Σ_{i≤k} (∂T/∂Y)ᵀⁱ v      k                   one step
    conjugate_gradient(k, δ)    (H + δI)⁻¹ v, k steps    k                   one step
    exact()                     solved densely           n · d               (n · d)² per set
    unrolled()                  none: backpropagation    2 passes per step   grows with the steps
    ==========================  =======================  ==================  =====================

`identity` is the paper's rule (section 3.2 and equation 6): H is replaced by the identity, which is
the same as truncating the Neumann series of (I − ∂T/∂Y)⁻ᵀ after its first term.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from msdspn_jax import _check
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

        The energies are summed before differentiating. Sets do not interact, so this is the
        gradient of each; and it keeps the batch inside the matrix products of the derivatives.
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


class Linearisation(NamedTuple):
    """Products with the two symmetric operators of the implicit system at a point Y."""

    hessian: Callable[[Sets], Sets]
    """v ↦ H v."""
    project: Callable[[Sets], Sets]
    """v ↦ P v, the derivative of the projection at Y − ∇_Y E."""


Solve = Callable[[Linearisation, Sets], Sets]
"""(linearisation, v) ↦ u ≈ (I − ∂T/∂Y)⁻ᵀ v."""

Vjp = Callable[[FixedPoint, Params, Any, Sets, Sets], tuple[Params, Any]]


@dataclass(frozen=True)
class Implicit:
    """Differentiate at the minimum: ``vjp(fixed_point, params, context, sets, v) -> (θ̄, context̄)``.

    Build one with `identity`, `neumann`, `conjugate_gradient` or `exact`; or wrap your own rule.
    """

    name: str
    vjp: Vjp


@dataclass(frozen=True)
class Unrolled:
    """Differentiate through the iterations. Build with `unrolled`."""

    rematerialise: bool = False
    name: str = "unrolled"


Gradient = Implicit | Unrolled


def unrolled(*, rematerialise: bool = False) -> Unrolled:
    """Backpropagate through every inner step, as DSPN does (arXiv 1906.06565).

    The exact gradient of the iteration as it was run, the pull on the starting point included.
    Memory grows linearly with the steps. Following the authors' DSPN, the initial set is not
    projected before the first step.

    Args:
        rematerialise: keep only the iterates and compute the inside of every step again in the
            backward pass: far less memory a step for about a third more time.
    """
    return Unrolled(rematerialise)


def identity() -> Implicit:
    """The paper's rule: u = v, as if H were the identity (section 3.2).

    One mixed second derivative, no products with H, constant memory. The direction is biased where
    the curvature of the energy is uneven. What it is good for: training, by default.
    """
    return _from_solve("identity", lambda linearisation, v: v)


def neumann(num_terms: int) -> Implicit:
    """u = Σ_{i=0}^{num_terms} (∂T/∂Y)ᵀⁱ v; no further term than the first is `identity`.

    Converges to the exact u where the step T contracts, that is where all eigenvalues of H lie in
    (0, 2); diverges elsewhere. One product with H for every further term.

    Args:
        num_terms: number of terms after the first.
    """
    if num_terms < 0:
        raise ValueError(f"num_terms: expected an integer >= 0, got {num_terms!r}")

    def solve(linearisation, v):
        def horner(_, u):
            p = linearisation.project(u)
            return v + p - linearisation.hessian(p)

        return lax.fori_loop(0, num_terms, horner, v)

    return _from_solve(f"neumann({num_terms})", solve)


def conjugate_gradient(max_steps: int = 10, *, damping: float = 0.0) -> Implicit:
    """u = (H + damping · I)⁻¹ v, on the tangent space of the projection, by conjugate gradients.

    Every set of the batch has its own system and its own step lengths. One product with H a step.
    At a minimum H is positive semidefinite; before convergence it need not be, so a set stops where
    a direction of non-positive curvature is met, keeping what it has (v itself at the first step),
    and `damping` makes that rarer.

    Args:
        max_steps: upper bound on the steps; n · d of them solve the system exactly.
        damping: δ ≥ 0 added to the diagonal of H.
    """
    if max_steps < 1:
        raise ValueError(f"max_steps: expected an integer >= 1, got {max_steps!r}")
    if not damping >= 0:
        raise ValueError(f"damping: expected a number >= 0, got {damping!r}")

    def solve(linearisation, v):
        # Restricted to the range of P the system reads (P H P + δ P) p = P v, which is symmetric;
        # P p = p, so p may be handed on in place of u.
        def matvec(p):
            return linearisation.project(linearisation.hessian(p)) + damping * p

        rhs = linearisation.project(v)
        tiny = jnp.finfo(v.dtype).eps ** 2

        def step(_, carry):
            p, residual, direction, squared, active = carry
            image = matvec(direction)
            curvature = _dot(direction, image)
            active = active & (curvature > 0) & (squared > tiny * _dot(rhs, rhs))
            length = jnp.where(active, squared / jnp.where(active, curvature, 1), 0)
            p = p + length * direction
            residual = residual - length * image
            new_squared = _dot(residual, residual)
            ratio = jnp.where(active, new_squared / jnp.where(active, squared, 1), 0)
            return p, residual, residual + ratio * direction, new_squared, active

        squared = _dot(rhs, rhs)
        start = (jnp.zeros_like(rhs), rhs, rhs, squared, squared > 0)
        # Without one positive curvature there is nothing to go by but the paper's rule.
        p = lax.fori_loop(0, max_steps, step, start)[0]
        return jnp.where(_dot(p, p) > 0, p, rhs)

    return _from_solve(f"conjugate_gradient({max_steps}, damping={damping:g})", solve)


def exact(*, method: str = "auto") -> Implicit:
    """The implicit function theorem without approximation: the oracle, not for training.

    Args:
        method: "dense" builds I − ∂T/∂Y, n · d products with H and (n · d)² numbers a set, and
            factorises it; "cg" solves its normal equations to a tight tolerance with little memory;
            "auto" is dense up to n · d = 1024. Both go through `jaxopt.implicit_diff.root_vjp`.

    A singular system (an energy with flat directions, for instance two elements that the encoder
    cannot tell apart and no proximity term) has no implicit derivative; the result is not finite.
    """
    _check.require_choice("method", method, ("auto", "dense", "cg"))

    def vjp(fixed_point, params, context, sets, cotangent):
        from jaxopt import implicit_diff, linear_solve

        def dense(matvec, b):
            batch, n, d = b.shape
            basis = jnp.eye(n * d, dtype=b.dtype).reshape(n * d, 1, n, d)
            columns = lax.map(lambda e: matvec(jnp.broadcast_to(e, b.shape)), basis)
            matrix = jnp.moveaxis(columns.reshape(n * d, batch, n * d), 0, -1)
            return jnp.linalg.solve(matrix, b.reshape(batch, n * d, 1)).reshape(b.shape)

        def normal_cg(matvec, b):
            eps = float(jnp.finfo(b.dtype).eps)
            return linear_solve.solve_normal_cg(matvec, b, tol=100 * eps, maxiter=20 * b[0].size)

        small = sets.shape[1] * sets.shape[2] <= 1024
        solve = dense if method == "dense" or (method == "auto" and small) else normal_cg
        return implicit_diff.root_vjp(
            lambda sets, params, context: sets - fixed_point.step(params, context, sets),
            sets,
            (params, context),
            cotangent,
            solve=solve,
        )

    return Implicit("exact", vjp)


def implicit_vjp(
    fixed_point: FixedPoint,
    params: Params,
    context: Any,
    sets: Sets,
    cotangent: Sets,
    *,
    solve: Solve,
) -> tuple[Params, Any]:
    """Pull v back from the minimum to parameters and context, u being found by `solve`.

    θ̄ = −∂/∂θ ⟨∇_Y E(Y; z, θ), P u⟩, by one reverse pass through the gradient. It pulls back to Y as
    well, which gives the products with H; and the gradient itself, where P is to be taken, is the
    pass's own forward half, so that nothing is computed twice.
    """
    gradient, pull_back = jax.vjp(fixed_point.gradient, params, context, sets)
    # H and P are symmetric, so their transposes, which are what reverse passes apply, will do.
    _, project = jax.vjp(fixed_point.project, sets - gradient)
    linearisation = Linearisation(lambda v: pull_back(v)[2], lambda v: project(v)[0])
    p = linearisation.project(solve(linearisation, cotangent))
    return pull_back(-p)[:2]


def _from_solve(name: str, solve: Solve) -> Implicit:
    def vjp(fixed_point, params, context, sets, cotangent):
        return implicit_vjp(fixed_point, params, context, sets, cotangent, solve=solve)

    return Implicit(name, vjp)


def _dot(a: Sets, b: Sets) -> Float[Array, "batch 1 1"]:
    return jnp.sum(a * b, axis=(1, 2), keepdims=True)


GRADIENTS: dict[str, Callable[..., Gradient]] = {
    "unrolled": unrolled,
    "identity": identity,
    "neumann": neumann,
    "conjugate_gradient": conjugate_gradient,
    "exact": exact,
}


def parse_gradient(text: str) -> Gradient:
    """A way to differentiate from its spelling: "identity", "neumann:3", "conjugate_gradient:10".

    For command lines and configuration files. Arguments follow the name after colons, in order.

    Raises:
        ValueError: an unknown name, or arguments that the named way does not take.
    """
    name, *arguments = text.split(":")
    name = name.replace("-", "_")
    _check.lookup("gradient", name, GRADIENTS)
    try:
        if name == "neumann":
            (num_terms,) = arguments or ["1"]
            return neumann(int(num_terms))
        if name == "conjugate_gradient":
            max_steps, damping = [*arguments, *["10", "0"][len(arguments) :]]
            return conjugate_gradient(int(max_steps), damping=float(damping))
        if arguments:
            raise ValueError("no arguments")
    except ValueError as error:
        raise ValueError(
            f"gradient: expected e.g. 'identity', 'unrolled', 'exact', 'neumann:3' or "
            f"'conjugate_gradient:10:0.01' (steps, damping), got {text!r}"
        ) from error
    return GRADIENTS[name]()
