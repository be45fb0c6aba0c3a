"""The outer optimiser: Adam as published, or Muon; schedules; averaged weights.

Averaged weights (Polyak and Juditsky, 1992) are part of the optimiser's state, `Averaged`. They are
what a run evaluates, and what is exported of it. Batch statistics that fit them cannot be averaged
along: they are found anew by `refit_step` before each evaluation.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from msdspn_jax._check import AnyArray
from msdspn_jax.training.config import Outer, TrainConfig


def outer_optimizer(
    config: TrainConfig, published: optax.Schedule | None = None
) -> optax.GradientTransformation:
    """The optimiser that a configuration describes.

    Args:
        config: its learning rate, steps and `Outer` settings.
        published: the schedule that is published for the experiment. Default: a constant rate.
    """
    outer, rate = config.outer, config.resolved_learning_rate()
    schedule = (
        _schedule(outer, rate, config.steps) if outer.schedule != "published" else published or rate
    )
    if outer.optimizer == "adam" and not outer.weight_decay:
        # Not adamw without decay: its state is another, and checkpoints hold it.
        optimizer = optax.adam(schedule, b1=_or(outer.momentum, 0.9))
    elif outer.optimizer == "adam":
        b1 = _or(outer.momentum, 0.9)
        optimizer = optax.adamw(schedule, b1=b1, weight_decay=outer.weight_decay)
    else:
        optimizer = muon(schedule, _or(outer.momentum, 0.95), outer.weight_decay)
    if math.isfinite(outer.max_grad_norm):
        optimizer = optax.chain(optax.clip_by_global_norm(outer.max_grad_norm), optimizer)
    return averaged(optimizer, outer.average) if outer.average else optimizer


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _schedule(outer: Outer, rate: float, steps: int) -> optax.Schedule:
    falling = steps - outer.warmup_steps
    if outer.schedule != "constant" and outer.decay_steps is not None:
        falling = min(falling, outer.decay_steps)
    falling = max(falling, 1)

    def schedule(step):
        rising = jnp.minimum(1.0, (step + 1) / max(outer.warmup_steps, 1))
        done = jnp.clip((step - (steps - falling)) / falling, 0, 1)
        if outer.schedule == "cosine":
            left = 0.5 * (1 + jnp.cos(jnp.pi * done))
        else:
            left = 1 - done if outer.schedule == "linear" else 1.0
        return rate * rising * left

    return schedule


# --- Muon ---


def muon(
    learning_rate: optax.ScalarOrSchedule, momentum: float = 0.95, weight_decay: float = 0.0
) -> optax.GradientTransformation:
    """Orthogonalised momentum for matrices and convolution kernels, Adam for all else.

    The updates are those of ``optax.contrib.muon`` with ``consistent_rms=0.2``, which sees a kernel
    [h, w, in, out] as a matrix of h·w·in rows; only the products that make them are arranged
    otherwise, see `orthogonalise`.

    Args:
        learning_rate: of both.
        momentum: of the matrices.
        weight_decay: share of the matrices taken away at each step, times the learning rate.

    Example:
        >>> optimizer = muon(0.01)
        >>> state = optimizer.init({"kernel": jnp.zeros((3, 3, 8, 8)), "bias": jnp.zeros(8)})
    """

    def scaled(update, _):
        matrix = update.reshape(-1, update.shape[-1])
        # Steps as long as Adam's (Liu et al., 2025, arXiv 2502.16982), so that those of biases,
        # which Adam makes, suit the same learning rate.
        length = 0.2 * math.sqrt(max(matrix.shape))
        return (length * orthogonalise(matrix)).reshape(update.shape)

    return optax.partition(
        {
            "muon": optax.chain(
                # Without steps of its own: momentum, of norm one.
                optax.contrib.scale_by_muon(
                    ns_steps=0, beta=momentum, weight_dimension_numbers=_as_matrices
                ),
                optax.stateless_with_tree_map(scaled),
                optax.add_decayed_weights(weight_decay),
                optax.scale_by_learning_rate(learning_rate),
            ),
            "adam": optax.nadamw(learning_rate, weight_decay=0.0),
        },
        lambda params: jax.tree.map(lambda x: "muon" if x.ndim in (2, 4) else "adam", params),
    )


def _as_matrices(params: PyTree) -> PyTree:
    """How Muon sees a parameter: a kernel [h, w, in, out] is a matrix of h·w·in rows."""
    by_ndim = {
        2: optax.contrib.MuonDimensionNumbers(),
        4: optax.contrib.MuonDimensionNumbers((0, 1, 2), 3),
    }
    return jax.tree.map(lambda x: by_ndim[x.ndim], params)


# Of the quintic polynomial whose slope at zero is large (Jordan et al., 2024, Muon).
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
_NEWTON_SCHULZ_STEPS = 5


def orthogonalise(matrix: Float[AnyArray, "m n"]) -> Float[Array, "m n"]:
    """The matrix with all its singular values moved to about one, by Newton-Schulz iteration.

    Each step is X ← X (a + b S + c S²) with S = XᵀX. All factors are polynomials of the first S and
    commute: a matrix of many rows needs two products as large as itself, not two a step, and
    everything between is square. For a ResNet that is a fifth of the time of the plain iteration.

    Args:
        matrix: of Frobenius norm at most one.

    Example:
        >>> q = orthogonalise(jnp.diag(jnp.array([0.9, 0.1])))
        >>> [0.6 < value < 1.3 for value in jnp.linalg.svd(q)[1].tolist()]
        [True, True]
    """
    matrix = jnp.asarray(matrix)
    if matrix.shape[0] < matrix.shape[1]:
        return orthogonalise(matrix.T).T
    a, b, c = _NEWTON_SCHULZ
    tall = 2 * matrix.shape[0] > 3 * matrix.shape[1]

    def polynomial(gram):
        return b * gram + c * (gram @ gram) + a * jnp.eye(gram.shape[0], dtype=gram.dtype)

    gram = matrix.T @ matrix
    if not tall:
        for step in range(_NEWTON_SCHULZ_STEPS):
            matrix = matrix @ polynomial(gram)
            if step < _NEWTON_SCHULZ_STEPS - 1:
                gram = matrix.T @ matrix
        return matrix
    product = factor = polynomial(gram)
    for _ in range(_NEWTON_SCHULZ_STEPS - 1):
        gram = gram @ (factor @ factor)
        factor = polynomial(gram)
        product = product @ factor
    return matrix @ product


# --- Averaged weights ---


class Averaged(NamedTuple):
    """State of `averaged`.

    Attributes:
        inner: of the optimiser itself.
        params: the running average.
        model_state: batch statistics that fit it, see `msdspn_jax.training.state.refit_step`; None
            for models without.
        num_updates: so far.
    """

    inner: PyTree
    params: PyTree
    model_state: PyTree
    num_updates: Int[Array, ""]


def averaged(optimizer: optax.GradientTransformation, decay: float) -> optax.GradientTransformation:
    """The same optimiser, which keeps a running average of the parameters in its state."""

    def init(params):
        return Averaged(optimizer.init(params), params, None, jnp.zeros((), jnp.int32))

    def update(updates, state, params=None):
        if params is None:
            raise ValueError("params: expected the current parameters, got None")
        updates, inner = optimizer.update(updates, state.inner, params)
        # Young averages forget sooner: otherwise the first weights would count for long.
        kept = jnp.minimum(decay, (1.0 + state.num_updates) / (10.0 + state.num_updates))
        mean = jax.tree.map(
            lambda mean, x: (kept * mean + (1 - kept) * x).astype(mean.dtype),
            state.params,
            optax.apply_updates(params, updates),
        )
        return updates, Averaged(inner, mean, state.model_state, state.num_updates + 1)

    return optax.GradientTransformation(init, update)
