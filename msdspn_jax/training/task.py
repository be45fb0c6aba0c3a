"""What an experiment must say about itself so that the training loop can run it.

A `Task` is a handful of pure functions. The loop (`training.loop`) owns everything else: the
optimiser step, the devices, the checkpoints, the logs. A task never sees how many devices there
are, which is why its numbers do not depend on it.

What the module of a task exports, so that the command line finds it (`msdspn_jax.tasks.load`):

- ``Config``: a frozen dataclass, subclass of `training.config.TrainConfig`; every field has a
  docstring, from which the command line's help is made;
- ``build(config: Config) -> Task``, which touches no data.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key, PyTree, UInt

from msdspn_jax.errors import UserError

# {"params": ..., "state": ...}: "state" holds what the forward pass updates (batch statistics)
# and may be left out.
Variables = dict[str, Any]
Metrics = dict[str, Float[Array, ""]]
Batch = PyTree


@runtime_checkable
class LossFn(Protocol):
    """Loss of one device's share of the batch; see `Task.loss`."""

    def __call__(
        self,
        variables: Variables,
        batch: Batch,
        keys: Key[Array, " local_batch"],
        *,
        stage: Hashable,
        axis_name: str | None,
    ) -> tuple[Float[Array, ""], tuple[Metrics, PyTree]]: ...


def _one_stage(step: int) -> Hashable:
    del step
    return None


@dataclass(frozen=True)
class Task:
    """An experiment, as pure functions.

    Attributes:
        name: the word on the command line.
        init: ``key -> variables``; ``variables["params"]`` is trained, ``variables["state"]``
            (optional) is replaced by what `loss` returns.
        sample: ``(key, step, slots) -> batch``: the examples at positions ``slots [local_batch]``
            of the global batch of that step; leaves are batch first. ``key`` is the data key of
            one replicate, the same at every step. Pure and jittable, unless ``host_data``. Fresh
            data: one key an example, ``fold_in(fold_in(key, step), slot)``; fixed data: a
            permutation per epoch seeded by ``key`` (`training.task.epoch_positions`). So data
            never depends on the number of devices or processes.
        loss: ``(variables, batch, keys [local_batch], *, stage, axis_name) ->
            (loss, (metrics, new_state))``: the mean over the local batch; ``keys`` are one per
            example, for noise in the model; ``metrics`` is a dict of scalars, local means as
            well; ``new_state`` replaces ``variables["state"]`` (None when there is none).
            ``axis_name`` is None on one device, otherwise the mesh axis over which batch
            statistics are averaged. The metric names ``inner_energy`` and
            ``inner_gradient_norm`` are shown on the progress line and guarded against explosion.
        evaluate: ``(variables, split, key) -> {"loss": ..., ...}``: scalars over a whole split
            ("val", "test"). Called outside jit, with the variables of one replicate.
        optimizer: the outer optimiser, schedules included (`training.outer.outer_optimizer`).
        monitor: which validation metric picks the best checkpoint, and whether small or large is
            good.
        stage: ``step -> hashable`` constant over long runs of steps, handed to `loss` as a static
            argument (the number of inner steps). Each value is compiled once.
        staged_evaluation: if True, `evaluate` is called with ``stage=`` as well: that of the last
            step.
        data: ``() -> arrays`` that `sample` reads (a data set), called when training begins and
            placed on every device once; if given, `sample` is called as ``sample(key, step,
            slots, data)``. Arrays that `sample` merely closes over become constants of the
            compiled program, which only small ones should.
        host_data: if True, `sample` is called outside jit with a Python ``int`` step and a NumPy
            array of slots, and returns NumPy arrays (images from disk).
        figures: ``(variables, folder) -> None`` writes pictures of validation predictions as
            ``folder/*.png``; called when a run ends, by ``msdspn evaluate``, and for TensorBoard's
            images.
        describe: facts of the task worth keeping in config.json (sizes of the splits, …).
    """

    name: str
    init: Callable[[Key[Array, ""]], Variables]
    sample: Callable[..., Batch]
    loss: LossFn
    evaluate: Callable[..., dict[str, Any]]
    optimizer: optax.GradientTransformation
    monitor: tuple[str, Literal["min", "max"]] = ("loss", "min")
    stage: Callable[[int], Hashable] = _one_stage
    staged_evaluation: bool = False
    data: Callable[[], PyTree] | None = None
    host_data: bool = False
    figures: Callable[[Variables, Path], None] | None = None
    describe: dict[str, Any] = field(default_factory=dict)

    def evaluate_at(
        self, step: int, variables: Variables, split: str, key: Key[Array, ""]
    ) -> dict[str, Any]:
        """What `evaluate` says after ``step`` steps."""
        stage = {"stage": self.stage(max(0, step - 1))} if self.staged_evaluation else {}
        return self.evaluate(variables, split, key, **stage)


# Compiled once also where a task calls it outside jit.
@partial(jax.jit, static_argnames=("batch_size", "size"))
def epoch_positions(
    key: Key[Array, ""], step: Any, slots: Int[Array, " local_batch"], *, batch_size: int, size: int
) -> Int[Array, " local_batch"]:
    """Indices into a fixed data set of ``size`` examples: a fresh permutation each epoch.

    Epochs are laid end to end: slot s of step t is example number ``t · batch_size + s`` of that
    endless sequence, so no example is dropped and a batch may span two epochs. Any index is
    computed on its own (a keyed permutation, `_permuted`), without building the permutation: the
    cost does not grow with the data set.

    Raises:
        UserError: ``batch_size · size`` is 2³² or more.
    """
    if batch_size * size >= 2**32:
        raise UserError(
            f"batch_size: expected at most {(2**32 - 1) // size} for a data set of {size} examples,"
            f" got {batch_size}"
        )
    step, slots = jnp.asarray(step, jnp.uint32), jnp.asarray(slots, jnp.uint32)
    # t · batch_size passes 2³² in long runs; what is left of it after whole epochs does not.
    number = step % size * batch_size + slots
    epoch, position = step // size * batch_size + number // size, number % size
    keys = jax.vmap(lambda e: jax.random.fold_in(key, e))(epoch)
    return jax.vmap(lambda k, p: _permuted(k, p, size))(keys, position)


def _permuted(key: Key[Array, ""], position: UInt[Array, ""], size: int) -> Int[Array, ""]:
    """Where a random permutation of ``range(size)``, chosen by ``key``, sends ``position``.

    A four-round Feistel network permutes the next power of four; walking its cycle until the
    value falls below ``size`` makes it a permutation of ``range(size)``.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = jnp.uint32((1 << half) - 1)
    round_keys = jax.random.bits(key, (4,), jnp.uint32)

    def scramble(value):
        value ^= value >> 16
        value *= jnp.uint32(0x7FEB352D)
        value ^= value >> 15
        value *= jnp.uint32(0x846CA68B)
        return value ^ (value >> 16)

    def permute(value):
        left, right = value >> half, value & mask
        for r in range(4):
            left, right = right, left ^ (scramble(right ^ round_keys[r]) & mask)
        return (left << half) | right

    value = permute(position)
    value = jax.lax.while_loop(lambda v: v >= size, permute, value)
    return value.astype(jnp.int32)
