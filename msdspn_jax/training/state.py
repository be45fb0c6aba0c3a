"""The state of a training run and the one step that changes it: pure functions, no devices."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, Key, PyTree

from msdspn_jax.training.outer import Averaged
from msdspn_jax.training.task import Batch, Metrics, Task, Variables

Init = Callable[[Key[Array, ""]], Variables]

# Why a step was refused: bits of the status that `train_step` returns.
LOSS_NOT_FINITE = 1
GRADIENT_NOT_FINITE = 2
INNER_ENERGY_EXPLODED = 4


class TrainState(NamedTuple):
    """Everything that training changes; with replicates every leaf but ``step`` has them first.

    Attributes:
        params, model_state, opt_state: parameters, batch statistics (or None), optimiser state.
        step: number of steps done; the data, order and noise of a step follow from it and the
            seed.
        skipped: number of steps left out because they were not finite.
    """

    params: PyTree
    model_state: PyTree
    opt_state: PyTree
    step: Int[Array, ""]
    skipped: Int[Array, ""]

    @property
    def variables(self) -> Variables:
        """The variables in training, as `Task` functions take them."""
        return _variables(self.params, self.model_state)

    @property
    def variables_to_keep(self) -> Variables:
        """The variables to evaluate and to export: averaged where an average is kept."""
        if isinstance(self.opt_state, Averaged):
            return _variables(self.opt_state.params, self.opt_state.model_state)
        return self.variables


def _variables(params: PyTree, model_state: PyTree) -> Variables:
    return {"params": params} | ({} if model_state is None else {"state": model_state})


class RunKeys(NamedTuple):
    """The independent streams of randomness of one seed."""

    init: Key[Array, ""]
    data: Key[Array, ""]
    noise: Key[Array, ""]
    evaluation: Key[Array, ""]


def run_keys(seed: int) -> RunKeys:
    """The keys of a seed; nothing else in training is random."""
    root = jax.random.key(seed)
    return RunKeys(*(jax.random.fold_in(root, i) for i in range(4)))


def by_seed(
    task: Task, step: int, variables: Sequence[Variables], split: str, seed: int
) -> dict[str, list[float]]:
    """The scores of a split after ``step`` steps: by metric, a number for each replicate.

    Args:
        task: what was trained.
        step: after how many steps.
        variables: those of every replicate.
        split: "val" or "test".
        seed: of the run, that is of its first replicate.
    """
    results = [
        task.evaluate_at(step, of, split, run_keys(seed + replicate).evaluation)
        for replicate, of in enumerate(variables)
    ]
    return {name: [float(result[name]) for result in results] for name in results[0]}


def init_state(
    init: Init, optimizer: optax.GradientTransformation, key: Key[Array, ""]
) -> TrainState:
    """The state before the first step, for one seed; ``init`` and ``optimizer`` as in `Task`."""
    variables = init(key)
    params = variables["params"]
    zero = jnp.zeros((), jnp.int32)
    opt_state, model_state = optimizer.init(params), variables.get("state")
    if isinstance(opt_state, Averaged):
        opt_state = opt_state._replace(model_state=model_state)
    return TrainState(params, model_state, opt_state, zero, zero)


def init_states(
    init: Init, optimizer: optax.GradientTransformation, seed: int, replicates: int
) -> TrainState:
    """The state before the first step of seeds ``seed … seed + replicates - 1``, side by side."""
    states = [init_state(init, optimizer, run_keys(seed + r).init) for r in range(replicates)]
    if replicates == 1:
        return states[0]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    return stacked._replace(step=states[0].step)


def replicate_of(state: TrainState, replicates: int, index: int) -> TrainState:
    """One of the ``replicates`` seeds of a state."""
    if replicates == 1:
        return state
    return jax.tree.map(lambda x: x[index], state._replace(step=None))._replace(step=state.step)


def train_step(
    task: Task,
    state: TrainState,
    batch: Batch,
    noise_key: Key[Array, ""],
    slots: Int[Array, " local_batch"],
    *,
    stage: Hashable,
    axis_name: str | None,
    max_inner_energy: float,
) -> tuple[TrainState, Metrics, Int[Array, ""]]:
    """One step on one device's share of the batch; with ``axis_name``, all shares together.

    Returns the new state, metrics averaged over the global batch, and the status: 0, or the sum
    of the reasons (constants above) why the step was refused, in which case parameters, batch
    statistics and optimiser state are those from before.
    """
    keys = _noise(noise_key, state.step, slots)

    def loss_of(params):
        variables = state._replace(params=params).variables
        return task.loss(variables, batch, keys, stage=stage, axis_name=axis_name)

    (loss, (metrics, model_state)), gradient = jax.value_and_grad(loss_of, has_aux=True)(
        state.params
    )
    loss, metrics, model_state, gradient = _mean_over(
        axis_name, (loss, _as_floats(metrics), model_state, gradient)
    )
    gradient_norm = optax.tree.norm(gradient)
    metrics = {"loss": loss} | metrics | {"gradient_norm": gradient_norm}

    status = LOSS_NOT_FINITE * ~jnp.isfinite(loss) + GRADIENT_NOT_FINITE * ~jnp.isfinite(
        gradient_norm
    )
    if "inner_energy" in metrics:
        # Written so that a NaN energy counts as exploded.
        status += INNER_ENERGY_EXPLODED * ~(metrics["inner_energy"] <= max_inner_energy)
    status = status.astype(jnp.int32)
    good = status == 0

    updates, opt_state = task.optimizer.update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)

    def if_good(new, old):
        return jax.tree.map(lambda a, b: jnp.where(good, a, b), new, old)

    new_state = TrainState(
        if_good(params, state.params),
        if_good(model_state, state.model_state),
        if_good(opt_state, state.opt_state),
        state.step + 1,
        state.skipped + (~good).astype(jnp.int32),
    )
    return new_state, metrics, status


def refit_step(
    task: Task,
    state: TrainState,
    batch: Batch,
    noise_key: Key[Array, ""],
    slots: Int[Array, " local_batch"],
    *,
    stage: Hashable,
    axis_name: str | None,
    max_inner_energy: float,
) -> tuple[TrainState, Metrics, Int[Array, ""]]:
    """Let the averaged weights see a batch, as `train_step`, and change their statistics alone."""
    del max_inner_energy
    average: Averaged = state.opt_state
    keys = _noise(noise_key, state.step, slots)
    variables = state.variables_to_keep
    loss, (metrics, model_state) = task.loss(
        variables, batch, keys, stage=stage, axis_name=axis_name
    )
    loss, metrics, model_state = _mean_over(axis_name, (loss, _as_floats(metrics), model_state))
    # A batch that training left out, or would have, is left out here as well.
    finite = [jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves((loss, model_state))]
    good = jnp.all(jnp.stack(finite))
    model_state = jax.tree.map(lambda a, b: jnp.where(good, a, b), model_state, average.model_state)
    new_state = state._replace(
        opt_state=average._replace(model_state=model_state), step=state.step + 1
    )
    return new_state, {"loss": loss} | metrics, jnp.zeros((), jnp.int32)


def _noise(
    key: Key[Array, ""], step: Int[Array, ""], slots: Int[Array, " local_batch"]
) -> Key[Array, " local_batch"]:
    """One key for every example of a step."""
    step_key = jax.random.fold_in(key, step)
    return jax.vmap(lambda slot: jax.random.fold_in(step_key, slot))(slots)


def _as_floats(metrics: dict[str, Any]) -> dict[str, Any]:
    """Counts as well have a mean over devices."""
    return {name: x * jnp.ones((), jnp.float32) for name, x in metrics.items()}


def _mean_over(axis_name: str | None, tree: Any) -> Any:
    if axis_name is None:
        return tree
    return jax.tree.map(
        lambda x: jax.lax.pmean(x, axis_name) if jnp.issubdtype(x.dtype, jnp.floating) else x,
        tree,
    )
