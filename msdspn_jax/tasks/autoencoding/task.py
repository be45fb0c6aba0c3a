"""What the two autoencoding tasks, random sets and digits, have in common."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from msdspn_jax import _check
from msdspn_jax.descent import Minimum
from msdspn_jax.losses import chamfer_loss, hungarian_loss
from msdspn_jax.tasks.autoencoding.config import AutoencoderConfig
from msdspn_jax.tasks.autoencoding.model import autoencoder
from msdspn_jax.tasks.evaluation import inner_scores, means, over_split
from msdspn_jax.training.outer import outer_optimizer
from msdspn_jax.training.state import run_keys
from msdspn_jax.training.task import Task, Variables

SetsAt = Callable[[Key[Array, ""], str, Int[Array, " batch"]], Float[Array, "batch n d"]]
_SHOWN = 8


def autoencoding_task(
    name: str,
    config: AutoencoderConfig,
    *,
    set_size: int,
    set_dim: int,
    loss: Literal["hungarian", "chamfer"],
    sets_at: SetsAt,
    split_sizes: dict[str, int],
    draw: Callable[..., Any],
    describe: dict[str, Any],
    **sampling: Any,
) -> Task:
    """A `Task` that trains `autoencoder` to give back its input set.

    Args:
        name: as in `Task`.
        config: the flags.
        set_size: n.
        set_dim: d.
        loss: between prediction and target.
        sets_at: ``(key, split, indices) -> sets`` of the validation or test split, jittable;
            ``key`` is the evaluation key of the seed.
        split_sizes: size of "val" and "test".
        draw: ``(prediction, target) -> figure`` of a few sets, as arrays [sets, n, d].
        describe: as in `Task`.
        **sampling: ``sample`` and ``data``, as in `Task`; a batch is an array of sets.
    """
    model = autoencoder(config, set_size, set_dim)
    per_set_loss = {"hungarian": hungarian_loss, "chamfer": chamfer_loss}[loss]

    def apply(variables, sets, **options) -> Minimum:
        return model.apply({"params": variables["params"]}, sets, **options)  # type: ignore

    def task_loss(variables, batch, keys, *, stage, axis_name):
        del keys, axis_name
        minimum = apply(variables, batch, num_steps=stage)
        metrics = {name: jnp.mean(score) for name, score in inner_scores(minimum).items()}
        return jnp.mean(per_set_loss(minimum.sets, batch)), (metrics, None)

    @jax.jit
    def score(variables, sets):
        minimum = apply(variables, sets, **config.at_evaluation)
        return {"loss": per_set_loss(minimum.sets, sets)} | inner_scores(minimum)

    def evaluate(variables, split, key):
        _check.require_choice("split", split, split_sizes)
        scores = over_split(
            lambda index: score(variables, sets_at(key, split, jnp.asarray(index))),
            split_sizes[split],
            batch_size=config.batch_size,
        )
        return means(scores)

    def figures(variables: Variables, folder: Path) -> None:
        from msdspn_jax import plots

        sets = sets_at(run_keys(config.seed).evaluation, "val", jnp.arange(_SHOWN))
        minimum = jax.jit(lambda v, s: apply(v, s, **config.at_evaluation, return_trajectory=True))(
            variables, sets
        )
        prediction, target = np.asarray(minimum.sets), np.asarray(sets)
        trajectory: Any = jax.tree.map(np.asarray, minimum.trajectory)
        plots.save(draw(prediction, target), folder / "predictions.png")
        plots.save(
            plots.inner_curves(trajectory.energy, trajectory.gradient_norm),
            folder / "inner_loop.png",
        )
        strip = plots.strip(
            trajectory.sets[:, 0],
            target[0],
            as_digits=name == "digits",
            energy=trajectory.energy[:, 0],
        )
        plots.save(strip, folder / "strip.png")

    return Task(
        name=name,
        init=lambda key: {"params": model.init(key, jnp.zeros((1, set_size, set_dim)))["params"]},
        loss=task_loss,
        evaluate=evaluate,
        optimizer=outer_optimizer(config),
        stage=config.stages(),
        figures=figures,
        describe=describe | {"set_size": set_size, "set_dim": set_dim, "loss": loss},
        **sampling,
    )
