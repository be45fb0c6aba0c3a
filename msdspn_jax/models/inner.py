"""The settings of the inner minimisation: one value for models, tasks and the command line."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import optax

from msdspn_jax import _check
from msdspn_jax.adjoints import Adjoint, Projection, identity, parse_adjoint, unrolled
from msdspn_jax.descent import nesterov
from msdspn_jax.products import bfloat16_dot_general
from msdspn_jax.projections import simplex
from msdspn_jax.set_encoder import DotGeneral

Pool = Literal["fspool", "continuous_fspool", "relation", "sum", "mean"]
Products = Literal["float32", "bfloat16"]
PRODUCTS: dict[str, DotGeneral | None] = {"float32": None, "bfloat16": bfloat16_dot_general}
PROJECTIONS: dict[str, Projection | None] = {"none": None, "simplex": simplex}

ENERGY_MODELS = ("idspn", "dspn")
"""The models that decode by minimising. They differ in the adjoint; their published settings (see
`published_inner`) also differ in momentum and clipping."""

EXPERIMENTS = ("random-sets", "digits", "numbering", "clevr", "sets")


@dataclass(frozen=True, kw_only=True)
class Inner:
    """How a set is decoded: the settings of the inner minimisation, and how the energy pools.

    A field that is None has its default. In an experiment that is the published setting of the
    model, see `published_inner`; in a `SetDecoder` by itself it is that of `DEFAULTS`. What begins
    with late or eval is read by ``msdspn train`` alone: in code, give a `SetDecoder` ``num_steps=``
    and ``num_starts=`` at the call.
    """

    num_steps: int | None = None
    """Steps of the minimisation."""
    late_num_steps: int | None = None
    """Steps in the second half of training. Default: as in the first; 40 for CLEVR."""
    eval_num_steps: int | None = None
    """Steps at evaluation. Default: as at the end of training."""
    eval_num_starts: int | None = None
    """Initial sets to descend from at evaluation; the set of the lowest energy counts. All descend
    at once: as many times the time and the memory."""
    step_size: float | None = None
    """Step size."""
    momentum: float | None = None
    """Nesterov momentum; 0: plain gradient descent."""
    max_grad_norm: float | None = None
    """Clip the gradient of every set to this norm; inf: no clipping."""
    projection: Literal["none", "simplex"] | None = None
    """Where sets may lie: anywhere, or every element on the probability simplex. In code, any
    function that projects [batch, n, d]."""
    adjoint: Adjoint | None = None
    """How the minimum is differentiated: identity, identity:straight-through (projections left out
    of the derivative), neumann:K, conjugate_gradient:K[:DAMPING], exact, unrolled, unrolled:remat.
    Default: identity for idspn, unrolled for dspn."""
    pool: Pool | None = None
    """How the energy's set encoder pools over elements; continuous_fspool: fspool with weights for
    relative positions, for sets of varying size; relation: over all pairs of elements, then fspool;
    sum and mean are merely set-equivariant."""
    products: Products | None = None
    """What the energy's set encoder multiplies. bfloat16: numbers rounded to it, with sums in
    float32 (`bfloat16_dot_general`); twice as fast or more on hardware that can."""
    proximity: float | None = None
    """Weight of the energy's pull towards the initial set."""
    tolerance: float | None = None
    """Stop a set where its gradient norm is at most this. Default: take all steps."""

    def __post_init__(self) -> None:
        if isinstance(self.adjoint, str):
            object.__setattr__(self, "adjoint", parse_adjoint(self.adjoint))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, np.number):  # As config.json can hold it.
                object.__setattr__(self, field.name, value.item())
        given = {name: value for name, value in vars(self).items() if value is not None}
        for name, value in given.items():
            if name.endswith(("num_steps", "num_starts")):
                _check.require_integer(name, value, 1)
        for name in given.keys() & {"step_size", "max_grad_norm", "tolerance"}:
            _check.require_positive(name, given[name])
        if "momentum" in given:
            _check.require_momentum(given["momentum"])
        if "proximity" in given:
            _check.require_nonnegative("proximity", given["proximity"])
        if self.projection is not None and not callable(self.projection):
            _check.require_choice("projection", self.projection, PROJECTIONS)
        if self.pool is not None:
            _check.require_choice("pool", self.pool, Pool.__args__)
        if self.products is not None:
            _check.require_choice("products", self.products, PRODUCTS)

    def or_else(self, other: Inner) -> Inner:
        """These settings, and those of ``other`` where these say None."""
        mine = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return dataclasses.replace(other, **{k: v for k, v in mine.items() if v is not None})

    def steps_at(self, progress: float) -> int:
        """Steps of the minimisation when this share of training, in [0, 1], is done."""
        assert self.num_steps is not None
        return self.num_steps if progress < 0.5 else self.late_num_steps or self.num_steps

    @property
    def steps_at_evaluation(self) -> int:
        """Steps at evaluation, the default resolved."""
        return self.eval_num_steps or self.steps_at(1.0)

    @property
    def set_pool(self) -> str:
        """The pool of a set encoder: "relation" pools pairs, and does so by "fspool"."""
        assert self.pool is not None
        return "fspool" if self.pool == "relation" else self.pool

    @property
    def dot_general(self) -> DotGeneral | None:
        """The products of a set encoder, as its attribute of this name."""
        return PRODUCTS[self.products or "float32"]

    def optimizer(self) -> optax.GradientTransformation:
        """The optimiser of the minimisation; equal settings give the same object, as `nesterov`."""
        assert self.step_size is not None
        assert self.momentum is not None
        return nesterov(self.step_size, self.momentum)

    def _projection(self) -> Projection | None:
        if callable(self.projection):
            return self.projection
        return PROJECTIONS[self.projection or "none"]

    def options(self) -> dict[str, Any]:
        """The arguments of `minimise` that these settings determine."""
        assert self.max_grad_norm is not None
        return {
            "optimizer": self.optimizer(),
            "num_steps": self.num_steps,
            "projection": self._projection(),
            "max_grad_norm": None if math.isinf(self.max_grad_norm) else self.max_grad_norm,
            "adjoint": self.adjoint,
            "tolerance": self.tolerance,
        }


DEFAULTS = Inner(
    num_steps=20,
    step_size=1.0,
    momentum=0.9,
    max_grad_norm=math.inf,
    projection="none",
    adjoint=identity(),
    pool="fspool",
    products="float32",
    proximity=0.1,
    eval_num_starts=1,
)
"""What every experiment of the paper shares, for iDSPN."""


def published_inner(experiment: str, model: str) -> Inner:
    """The published settings of an experiment, for "idspn" or "dspn" (paper, sections 4.1 to 4.3).

    Digits and sets (data of one's own) are no experiments of the paper. Digits takes the settings
    of random sets, with a step size large enough to move its 34 elements; sets takes those of
    CLEVR, but for the number of steps.

    Example:
        >>> published_inner("numbering", "idspn").max_grad_norm
        40.0
    """
    _check.require_choice("experiment", experiment, EXPERIMENTS)
    _check.require_choice("model", model, ENERGY_MODELS)
    implicit = model == "idspn"
    own = {
        "random-sets": Inner(momentum=None if implicit else 0.0),
        "digits": Inner(momentum=None if implicit else 0.0, step_size=3.0),
        "numbering": Inner(
            momentum=None if implicit else 0.0,
            max_grad_norm=40.0 if implicit else None,
            projection="simplex",
            proximity=0.0,
        ),
        "clevr": Inner(
            momentum=None if implicit else 0.5,
            max_grad_norm=10.0 if implicit else None,
            late_num_steps=40,
        ),
        "sets": Inner(momentum=None if implicit else 0.5, max_grad_norm=10.0),
    }[experiment]
    adjoint = Inner(adjoint=identity() if implicit else unrolled())
    return own.or_else(adjoint).or_else(DEFAULTS)
