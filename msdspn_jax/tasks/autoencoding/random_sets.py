"""Random sets autoencoding (paper, section 4.2): n vectors from N(0, I_d).

msdspn train random-sets --set-size 4 --set-dim 4 --inner.num-steps 10 --steps 1000
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from msdspn_jax.tasks.autoencoding.config import AutoencoderConfig
from msdspn_jax.tasks.autoencoding.report import report
from msdspn_jax.tasks.autoencoding.task import autoencoding_task
from msdspn_jax.training.config import require_at_least
from msdspn_jax.training.task import Task, epoch_positions

__all__ = ["Config", "build", "draw_sets", "indexed_sets", "report"]


@dataclass(frozen=True, kw_only=True)
class Config(AutoencoderConfig):
    """Autoencode sets of n vectors drawn from N(0, I_d) (paper, section 4.2).

    Published: n and d of 2, 4, 8, 16, 32; 10, 20, 40 inner steps; 20,000 training steps.
    """

    experiment: ClassVar[str] = "random-sets"

    set_size: int = 8
    """n, the number of elements of a set."""
    set_dim: int = 8
    """d, the dimension of an element."""
    train_size: int = 64_000
    """Sets in the training split."""
    fresh: bool = False
    """Draw new training sets at every step instead of a fixed split."""
    val_size: int = 6_400
    """Sets in the validation split."""
    test_size: int = 6_400
    """Sets in the test split."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(1, self, "set_size", "set_dim", "train_size", "val_size", "test_size")


def build(config: Config) -> Task:
    """The task of a configuration."""
    n, d = config.set_size, config.set_dim

    def sample(key, step, slots):
        if config.fresh:
            return indexed_sets(jax.random.fold_in(key, step), slots, n=n, d=d)
        order_key, sets_key = jax.random.split(key)
        indices = epoch_positions(
            order_key, step, slots, batch_size=config.batch_size, size=config.train_size
        )
        return indexed_sets(sets_key, indices, n=n, d=d)

    def sets_at(key, split, indices):
        split_key = jax.random.fold_in(key, ("val", "test").index(split))
        return indexed_sets(split_key, indices, n=n, d=d)

    def draw(prediction, target):
        from msdspn_jax import plots

        return plots.point_sets(prediction, target)

    return autoencoding_task(
        "random-sets",
        config,
        set_size=n,
        set_dim=d,
        loss="hungarian",
        sample=sample,
        sets_at=sets_at,
        split_sizes={"val": config.val_size, "test": config.test_size},
        draw=draw,
        describe={"train": "fresh" if config.fresh else config.train_size, "val": config.val_size},
    )


# --- the data: never stored, set i is drawn from fold_in(key, i) whenever it is needed ---


def draw_sets(keys: Key[Array, " batch"], *, n: int, d: int) -> Float[Array, "batch n d"]:
    """One set a key; the same key gives the same set."""
    if n < 1 or d < 1:
        raise ValueError(f"n, d: expected integers >= 1, got {n} and {d}")
    return jax.vmap(lambda key: jax.random.normal(key, (n, d), jnp.float32))(keys)


@partial(jax.jit, static_argnames=("n", "d"))
def indexed_sets(
    key: Key[Array, ""], indices: Int[Array, " batch"], *, n: int, d: int
) -> Float[Array, "batch n d"]:
    """The sets at ``indices`` of the endless data set that ``key`` stands for."""
    return draw_sets(jax.vmap(lambda i: jax.random.fold_in(key, i))(indices), n=n, d=d)
