"""Running steps on devices: many steps a dispatch, many devices, many seeds, many machines.

`StepRunner` maps the per-device step of `training.state` in one of three ways: on one device
(``none``), by ``jax.shard_map`` over a mesh axis, or by ``jax.pmap``. In each, a dispatch is one
``while`` loop whose length is an argument of the compiled program: a run cut into pieces of any
length executes the same program and gives the same bits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

from msdspn_jax._cores import compiler_options
from msdspn_jax.errors import DataError, UserError, origin
from msdspn_jax.training.config import TrainConfig
from msdspn_jax.training.outer import Averaged
from msdspn_jax.training.state import TrainState, init_states, refit_step, run_keys, train_step
from msdspn_jax.training.task import Batch, Task

AXIS = "data"
# Batches that averaged weights see before they are evaluated: at the usual momentum of 0.9, 4% of
# the statistics are still those of the weights in training.
REFIT_STEPS = 30


class Chunk(NamedTuple):
    """What came of one dispatch.

    Attributes:
        state: the state after the last step done.
        done: how many steps were done; fewer than asked for when one was refused and could not be
            skipped (that one is the last of them).
        metrics: name -> [done, replicates].
        status: [done, replicates], see `training.state`.
    """

    state: TrainState
    done: int
    metrics: dict[str, np.ndarray]
    status: np.ndarray


class StepRunner:
    """Compiles and runs the steps of a task on the devices that the configuration asks for."""

    def __init__(self, task: Task, config: TrainConfig, devices: Sequence[Any] | None = None):
        """Prepare; nothing is compiled before the first step.

        Args:
            task: what to train.
            config: ``parallel``, ``batch_size``, ``replicates`` and so on.
            devices: which to use, unless ``parallel`` is "none". Default: all.
        """
        self.task, self.config = task, config
        self.mode = config.devices.parallel
        if jax.process_count() > 1 and self.mode == "none":
            self.mode = "shard-map"
        if self.mode == "none":
            self.devices = [jax.local_devices()[0]]
        else:
            self.devices = list(devices or jax.devices())
        if config.batch_size % len(self.devices):
            raise UserError(
                f"--batch-size: expected a multiple of {len(self.devices)}, the number of devices,"
                f" got {config.batch_size}"
            )
        self.local_batch = config.batch_size // len(self.devices)
        self.mesh = Mesh(np.array(self.devices), (AXIS,))
        seeds = [config.seed + r for r in range(config.replicates)]
        self.keys = [run_keys(seed) for seed in seeds]
        self._compiled: dict[Hashable, Any] = {}

    # --- state ---

    def init(self) -> TrainState:
        """The state before the first step, as host arrays."""
        return _to_host(jax.jit(self._init_states)())

    def empty_state(self) -> TrainState:
        """Host arrays of the shapes that `init` gives, for nothing."""
        shapes = jax.eval_shape(self._init_states)
        return jax.tree.map(lambda x: np.empty(x.shape, x.dtype), shapes)

    def _init_states(self) -> TrainState:
        task, config = self.task, self.config
        return init_states(task.init, task.optimizer, config.seed, config.replicates)

    def place(self, tree: PyTree) -> PyTree:
        """Host arrays (a state, a data set), copied to every device."""
        if self.mode == "none":
            return jax.device_put(tree, self.devices[0])
        if self.mode == "pmap":
            local = [d for d in self.devices if d.process_index == jax.process_index()]
            spread = NamedSharding(Mesh(np.array(local), (AXIS,)), P(AXIS))
            stacked = jax.tree.map(lambda x: np.broadcast_to(x, (len(local), *np.shape(x))), tree)
            return jax.device_put(stacked, spread)
        return jax.device_put(tree, NamedSharding(self.mesh, P()))

    @functools.cached_property
    def _host_data(self) -> PyTree:
        return None if self.task.data is None else self.task.data()

    @functools.cached_property
    def _data(self) -> PyTree:
        """The task's data set, copied to every device when it is first asked for."""
        data = self._host_data
        del self._host_data
        return None if data is None else self.place(data)

    def read_data(self) -> None:
        """Read the task's data set now, not at the first step."""
        _ = self._host_data

    def place_data(self) -> None:
        """Copy it to every device now."""
        _ = self._data

    def fetch(self, state: TrainState) -> TrainState:
        """A copy of the state as host arrays."""
        host = _to_host(state)
        return jax.tree.map(lambda x: x[0], host) if self.mode == "pmap" else host

    # --- steps ---

    def run(self, state: TrainState, step: int, count: int, batches: Batch = None) -> Chunk:
        """Do ``count`` steps from ``step`` on, all of one stage.

        ``state`` is used up. ``batches``: what `load` returned for these steps, if the task's data
        comes from the host.
        """
        capacity = self.config.devices.steps_per_dispatch
        if not 0 < count <= capacity:
            raise ValueError(f"count: expected 1 to {capacity}, got {count}")
        return self._dispatch(self._program(self.task.stage(step)), state, count, batches)

    def refit(self, state: TrainState, step: int) -> TrainState:
        """Batch statistics that fit averaged weights, from the batches of the last steps.

        The state itself where no average is kept, or the model has no batch statistics.
        """
        average = state.opt_state
        if not isinstance(average, Averaged) or average.model_state is None:
            return state
        first = max(0, step - REFIT_STEPS)
        program = self._program(self.task.stage(max(0, step - 1)), refit_step)
        # From the statistics in training, so that earlier refits leave no trace.
        average = average._replace(model_state=jax.tree.map(jnp.copy, state.model_state))
        state = state._replace(opt_state=average, step=state.step - (step - first))
        while first < step:
            count = min(step - first, self.config.devices.steps_per_dispatch)
            state = self._dispatch(program, state, count, self.load(first, count)).state
            first += count
        return state

    def _dispatch(self, program: Any, state: TrainState, count: int, batches: Batch) -> Chunk:
        state, done, metrics, status = program(
            state, self._key_data(), np.int32(count), batches, self._data
        )
        if self.mode == "pmap":
            done, metrics, status = jax.tree.map(lambda x: _local(x)[0], (done, metrics, status))
        done = int(_local(done))
        cut = functools.partial(_rows, done=done, replicates=self.config.replicates)
        return Chunk(state, done, {k: cut(v) for k, v in metrics.items()}, cut(status))

    def load(self, step: int, count: int) -> Batch:
        """The batches of ``count`` steps of a task with ``host_data``, placed on the devices."""
        if not self.task.host_data:
            return None
        index = [i for i, d in enumerate(self.devices) if d.process_index == jax.process_index()]
        slots = np.concatenate(
            [np.arange(i * self.local_batch, (i + 1) * self.local_batch) for i in index]
        )
        per_step = []
        for t in range(step, step + count):
            try:
                per_seed = [self.task.sample(keys.data, t, slots) for keys in self.keys]
            except (OSError, ValueError) as error:
                raise DataError(
                    f"step {t}: the data cannot be read: {error}{origin(error)}"
                ) from error
            per_step.append(
                per_seed[0]
                if len(per_seed) == 1
                else jax.tree.map(lambda *x: np.stack(x, 1), *per_seed)
            )
        # [steps, batch, (replicates,) ...]; padded to the compiled length.
        missing = self.config.devices.steps_per_dispatch - count
        stacked = jax.tree.map(lambda *x: np.stack(x + (x[-1],) * missing), *per_step)
        if self.mode == "none":
            return jax.device_put(stacked, self.devices[0])
        if self.mode == "pmap":
            return jax.tree.map(lambda x: np.stack(np.split(x, len(index), axis=1)), stacked)
        sharding = NamedSharding(self.mesh, P(None, AXIS))
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), stacked)

    def _key_data(self) -> np.ndarray:
        # Raw key data [replicates, 2 (data, noise), ...]: plain integers pass through every map.
        return np.stack(
            [
                [np.asarray(jax.random.key_data(k)) for k in (keys.data, keys.noise)]
                for keys in self.keys
            ]
        )

    def _program(self, stage: Hashable, one_step: Callable[..., Any] = train_step) -> Any:
        if (stage, one_step) not in self._compiled:
            function = functools.partial(self._device_chunk, stage, one_step)
            if self.mode == "none":
                mapped = jax.jit(function, donate_argnums=0, compiler_options=compiler_options())
            elif self.mode == "pmap":
                mapped = jax.pmap(
                    function,
                    axis_name=AXIS,
                    in_axes=(0, None, None, 0, 0),
                    devices=self.devices,
                    donate_argnums=0,
                )
            else:
                mapped = jax.jit(
                    jax.shard_map(
                        function,
                        mesh=self.mesh,
                        in_specs=(P(), P(), P(), P(None, AXIS), P()),
                        out_specs=P(),
                        check_vma=False,
                    ),
                    donate_argnums=0,
                    compiler_options=compiler_options(),
                )
            self._compiled[stage, one_step] = mapped
        return self._compiled[stage, one_step]

    def _device_chunk(self, stage, one_step, state, key_data, count, batches, data):
        """Up to ``count`` steps on this device; see `Chunk`."""
        config, task = self.config, self.task
        axis_name = None if self.mode == "none" else AXIS
        first_slot = 0 if axis_name is None else jax.lax.axis_index(AXIS) * self.local_batch
        slots = first_slot + jnp.arange(self.local_batch, dtype=jnp.int32)
        keys = jax.random.wrap_key_data(jnp.asarray(key_data))

        def step_of_seed(state, keys, batch):
            if not task.host_data:
                arguments = () if data is None else (data,)
                batch = task.sample(keys[0], state.step, slots, *arguments)
            return one_step(
                task,
                state,
                batch,
                keys[1],
                slots,
                stage=stage,
                axis_name=axis_name,
                max_inner_energy=config.safety.max_inner_energy,
            )

        def step(state, batch):
            if config.replicates == 1:
                return step_of_seed(state, keys[0], batch)
            axes: Any = TrainState(0, 0, 0, None, 0)  # pyright: ignore[reportArgumentType]
            return jax.vmap(step_of_seed, in_axes=(axes, 0, 1), out_axes=(axes, 0, 0))(
                state, keys, batch
            )

        def batch_of(i):
            return jax.tree.map(lambda x: x[i], batches)

        capacity = config.devices.steps_per_dispatch
        _, metrics, status = jax.eval_shape(lambda: step(state, batch_of(0)))
        buffers = jax.tree.map(
            lambda x: jnp.zeros((capacity, *x.shape), x.dtype), (metrics, status)
        )

        def body(carry):
            i, state, buffers, _ = carry
            state, *row = step(state, batch_of(i))
            buffers = jax.tree.map(lambda b, x: b.at[i].set(x), buffers, tuple(row))
            refused = (row[1] > 0) & (state.skipped > config.safety.skip_bad_steps)
            return i + 1, state, buffers, jnp.any(refused)

        i, state, (metrics, status), _ = jax.lax.while_loop(
            lambda carry: (carry[0] < count) & ~carry[3],
            body,
            (jnp.int32(0), state, buffers, jnp.bool_(False)),
        )
        return state, i, metrics, status


def _local(x: Any) -> np.ndarray:
    """What this process holds of a replicated array (or, under pmap, its devices' shares)."""
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        shards = sorted(x.addressable_shards, key=lambda s: s.device.id)
        if x.is_fully_replicated:
            return np.asarray(shards[0].data)
        return np.concatenate([np.asarray(s.data) for s in shards])
    return np.asarray(x)


def _to_host(tree: PyTree) -> PyTree:
    # A copy: on CPU, np.asarray would be a view of a buffer that the next step overwrites.
    return jax.tree.map(lambda x: np.array(_local(x)), tree)


def _rows(x: Any, *, done: int, replicates: int) -> np.ndarray:
    return _local(x)[:done].reshape(done, replicates)


# --- several machines ---


def distributed_arguments(config: TrainConfig) -> dict[str, Any] | None:
    """What `jax.distributed.initialize` is to be told; None if there are no other processes.

    Raises:
        UserError: flags that do not go together.
    """
    devices = config.devices
    if devices.coordinator is None:
        if devices.num_processes is not None or devices.process_id is not None:
            raise UserError("--num-processes and --process-id need --coordinator host:port")
        return {} if devices.distributed else None
    if devices.num_processes is None or devices.process_id is None:
        raise UserError("--coordinator needs --num-processes and --process-id as well")
    if not 0 <= devices.process_id < devices.num_processes:
        raise UserError(
            f"--process-id: expected 0 to {devices.num_processes - 1}, got {devices.process_id}"
        )
    return {
        "coordinator_address": devices.coordinator,
        "num_processes": devices.num_processes,
        "process_id": devices.process_id,
    }


def start_distributed(config: TrainConfig) -> None:
    """Join the other processes, if the configuration says that there are any.

    Must come before anything else touches JAX's devices.
    """
    arguments = distributed_arguments(config)
    if arguments is None:
        return
    try:
        jax.distributed.initialize(
            **arguments,
            heartbeat_timeout_seconds=config.devices.heartbeat_timeout,
            initialization_timeout=max(60, config.devices.heartbeat_timeout),
            shutdown_timeout_seconds=config.devices.heartbeat_timeout,
        )
    except (ValueError, RuntimeError) as error:
        raise UserError(f"could not join the other processes: {error}") from error


def agree(flag: int, value: int) -> tuple[int, int]:
    """The largest ``flag`` of all processes, and process 0's ``value``."""
    if jax.process_count() == 1:
        return flag, value
    from jax.experimental import multihost_utils

    gathered = multihost_utils.process_allgather(np.array([flag, value], np.int32))
    return int(gathered[:, 0].max()), int(gathered[0, 1])
