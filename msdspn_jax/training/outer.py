"""The outer optimiser: Adam as published, or Muon; schedules; averaged weights.

Averaged weights (Polyak and Juditsky, 1992) are part of the optimiser's state, `Averaged`. They are
what a run evaluates, and what is exported of it. Batch statistics that fit them cannot be averaged
along: they are found anew by `refit_step` before each evaluation.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PyTree

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
        optimizer = optax.contrib.muon(
            schedule,
            beta=_or(outer.momentum, 0.95),
            weight_decay=outer.weight_decay,
            # Steps as long as Adam's (Liu et al., 2025, arXiv 2502.16982), so that those of
            # biases, which Adam makes, suit the same learning rate.
            consistent_rms=0.2,
            muon_weight_dimension_numbers=_as_matrices,
        )
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


def _as_matrices(params: PyTree) -> PyTree:
    """How Muon sees a parameter: a kernel [h, w, in, out] is a matrix of h·w·in rows."""

    def dimensions(x: Any) -> Any:
        if x.ndim == 4:
            return optax.contrib.MuonDimensionNumbers((0, 1, 2), 3)
        return optax.contrib.MuonDimensionNumbers() if x.ndim == 2 else None

    return jax.tree.map(dimensions, params)


# --- Averaged weights ---


class Averaged(NamedTuple):
    """State of `averaged`.

    Attributes:
        inner: of the optimiser itself.
        params: the running average.
        model_state: batch statistics that fit it, see `msdspn_jax.training.state.refit_step`; None
            for models without.
        count: updates so far.
    """

    inner: PyTree
    params: PyTree
    model_state: PyTree
    count: Int[Array, ""]


def averaged(optimizer: optax.GradientTransformation, decay: float) -> optax.GradientTransformation:
    """The same optimiser, which keeps a running average of the parameters in its state."""

    def init(params):
        return Averaged(optimizer.init(params), params, None, jnp.zeros((), jnp.int32))

    def update(updates, state, params=None):
        updates, inner = optimizer.update(updates, state.inner, params)
        # Young averages forget sooner: otherwise the first weights would count for long.
        kept = jnp.minimum(decay, (1.0 + state.count) / (10.0 + state.count))
        mean = jax.tree.map(
            lambda mean, x: (kept * mean + (1 - kept) * x).astype(mean.dtype),
            state.params,
            optax.apply_updates(params, updates),
        )
        return updates, Averaged(inner, mean, state.model_state, state.count + 1)

    return optax.GradientTransformation(init, update)
