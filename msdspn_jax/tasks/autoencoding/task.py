"""What the two autoencoding tasks, random sets and digits, have in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from msdspn_jax.adjoints import Gradient, Unrolled, parse_gradient, unrolled
from msdspn_jax.losses import chamfer_loss, hungarian_loss
from msdspn_jax.models.set_predictor import SetPredictor, gradient_of, set_autoencoder
from msdspn_jax.training.config import TrainConfig, adam
from msdspn_jax.training.task import Task, Variables

SetsAt = Callable[[Key[Array, ""], str, Int[Array, " batch"]], Float[Array, "batch n d"]]


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig(TrainConfig):
    """Flags of a set autoencoder."""

    model: Literal["idspn", "dspn"] = "idspn"
    """idspn: differentiate at the minimum (implicitly); dspn: through all inner steps."""
    inner_steps: int = 20
    """Steps of the inner minimisation that decodes a set."""
    eval_inner_steps: int | None = None
    """Inner steps at evaluation. Default: as in training."""
    inner_learning_rate: float = 1.0
    """Step size of the inner minimisation."""
    momentum: float | None = None
    """Nesterov momentum of the inner minimisation. Default: 0.9 for idspn, 0 for dspn, as in the
    paper."""
    backward: str = "auto"
    """How the minimum is differentiated, in place of the model's own way: identity, neumann:K,
    conjugate_gradient:K[:DAMPING], exact, unrolled, unrolled:remat (less memory, more time)."""
    pool: Literal["fspool", "sum", "mean"] = "fspool"
    """How both set encoders pool over elements; sum and mean are merely set-equivariant."""
    hidden_dim: int = 512
    """Width of the set encoders' hidden layer."""
    latent_dim: int = 512
    """Width of the latent vector."""
    proximity: float = 0.1
    """Weight of the energy's pull towards the learned initial set."""
    max_grad_norm: float | None = None
    """Clip the inner gradient of every set to this norm. Default: no clipping."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("inner_steps", "hidden_dim", "latent_dim", "inner_learning_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.eval_inner_steps is not None and self.eval_inner_steps < 1:
            raise ValueError(f"eval_inner_steps must be positive, got {self.eval_inner_steps}")
        self.gradient()

    def gradient(self) -> Gradient:
        """The way to differentiate that ``model`` and ``backward`` name together."""
        if self.backward == "auto":
            return gradient_of(self.model)
        if self.backward == "unrolled:remat":
            gradient = unrolled(rematerialise=True)
        else:
            gradient = parse_gradient(self.backward)
        if isinstance(gradient, Unrolled) != (self.model == "dspn"):
            raise ValueError(
                f"backward {self.backward!r} does not go with model {self.model!r}:"
                " dspn is unrolled, idspn is any other way"
            )
        return gradient

    def inner_momentum(self) -> float:
        """Momentum, the model's default resolved."""
        if self.momentum is not None:
            return self.momentum
        return 0.9 if self.model == "idspn" else 0.0


def autoencoder(config: AutoencoderConfig, set_size: int, set_dim: int) -> SetPredictor:
    """The model of a configuration."""
    return set_autoencoder(
        set_size=set_size,
        set_dim=set_dim,
        hidden_dim=config.hidden_dim,
        latent_dim=config.latent_dim,
        input_pool=config.pool,
        pool=config.pool,
        num_steps=config.inner_steps,
        learning_rate=config.inner_learning_rate,
        momentum=config.inner_momentum(),
        max_grad_norm=config.max_grad_norm,
        gradient=config.gradient(),
        proximity=config.proximity,
    )


def autoencoding_task(
    name: str,
    config: AutoencoderConfig,
    *,
    set_size: int,
    set_dim: int,
    loss: Literal["hungarian", "chamfer"],
    sample: Callable[[Key[Array, ""], Any, Any], Float[Array, "batch n d"]],
    sets_at: SetsAt,
    split_sizes: dict[str, int],
    draw: Callable[..., Any],
    describe: dict[str, Any],
) -> Task:
    """A `Task` that trains `autoencoder` to give back its input set.

    Args:
      name, describe: as in `Task`.
      config: the flags.
      set_size, set_dim: n and d.
      loss: between prediction and target.
      sample: as in `Task`; a batch is an array of sets.
      sets_at: ``(key, split, indices) -> sets`` of the validation or test split; ``key`` is the
        evaluation key of the seed.
      split_sizes: size of "val" and "test".
      draw: ``(prediction, target) -> figure`` of a few sets, as arrays [sets, n, d].
    """
    model = autoencoder(config, set_size, set_dim)
    per_set_loss = {"hungarian": hungarian_loss, "chamfer": chamfer_loss}[loss]
    eval_steps = config.eval_inner_steps or config.inner_steps

    def init(key):
        return {"params": model.init(key, jnp.zeros((1, set_size, set_dim)))["params"]}

    def apply(variables, sets, **options):
        minimum: Any = model.apply({"params": variables["params"]}, sets, **options)
        return minimum

    def task_loss(variables, batch, keys, *, stage, axis_name):
        del keys, stage, axis_name
        minimum = apply(variables, batch)
        metrics = {
            "inner_energy": jnp.mean(minimum.energy),
            "inner_gradient_norm": jnp.mean(minimum.gradient_norm),
        }
        return jnp.mean(per_set_loss(minimum.sets, batch)), (metrics, None)

    @lru_cache(maxsize=2)
    def evaluator(split: str):
        size = split_sizes[split]
        batch = min(config.batch_size, size)
        count = -(-size // batch)

        def of_batch(args):
            variables, key, number = args
            indices = number * batch + jnp.arange(batch)
            sets = sets_at(key, split, jnp.minimum(indices, size - 1))
            minimum = apply(variables, sets, num_steps=eval_steps)
            values = {
                "loss": per_set_loss(minimum.sets, sets),
                "inner_energy": minimum.energy,
                "inner_gradient_norm": minimum.gradient_norm,
            }
            return jax.tree.map(lambda x: jnp.sum(jnp.where(indices < size, x, 0)), values)

        def over_split(variables, key):
            sums = jax.lax.map(lambda i: of_batch((variables, key, i)), jnp.arange(count))
            return jax.tree.map(lambda x: jnp.sum(x) / size, sums)

        return jax.jit(over_split)

    def evaluate(variables, split, key):
        if split not in split_sizes:
            raise ValueError(f"split must be one of {', '.join(split_sizes)}, got {split!r}")
        values = evaluator(split)(variables, key)
        return {k: float(values[k]) for k in ("loss", "inner_energy", "inner_gradient_norm")}

    def figures(variables: Variables, folder: Path) -> None:
        from msdspn_jax import plots

        shown = 8
        sets = sets_at(jax.random.key(config.seed), "val", jnp.arange(shown))
        minimum = jax.jit(lambda v, s: apply(v, s, num_steps=eval_steps, return_trajectory=True))(
            variables, sets
        )
        prediction, target = np.asarray(minimum.sets), np.asarray(sets)
        trajectory = jax.tree.map(np.asarray, minimum.trajectory)
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
        init=init,
        sample=sample,
        loss=task_loss,
        evaluate=evaluate,
        optimizer=adam(config),
        figures=figures,
        describe=describe | {"set_size": set_size, "set_dim": set_dim, "loss": loss},
    )
