"""A run folder, read back: its experiment and what was trained."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from msdspn_jax import tasks
from msdspn_jax.errors import UserError
from msdspn_jax.trained.weights import Model
from msdspn_jax.training import run_folder
from msdspn_jax.training.checkpoints import Checkpoints, damage
from msdspn_jax.training.config import TrainConfig
from msdspn_jax.training.state import init_states, replicate_of
from msdspn_jax.training.task import Task, Variables

#: Best by validation, the latest, or that of a step.
Checkpoint = Literal["best", "latest"] | int


class Run(NamedTuple):
    """A trained run, read back by `load_run`.

    Attributes:
        folder: the run folder.
        task_name, config, task: the experiment, built again from config.json.
        variables: the model's variables of each replicate, ready for ``task.evaluate``.
        step: the step of the checkpoint they come from.
        damaged: why other checkpoints could not be read, if there are such.
    """

    folder: Path
    task_name: str
    config: TrainConfig
    task: Task
    variables: list[Variables]
    step: int
    damaged: tuple[str, ...] = ()


def load_run(folder: str | Path, *, checkpoint: Checkpoint = "best") -> Run:
    """Read a run folder: its task, and the variables of a checkpoint.

    Raises:
        UserError: no such run, no such checkpoint, or it is damaged.
    """
    folder = Path(folder)
    task_name, config = read_config(folder)
    task = tasks.build(task_name, config)
    variables, step, damaged = _restore(folder, config, task, checkpoint)
    return Run(folder, task_name, config, task, variables, step, damaged)


def load_predictor(folder: str | Path, *, checkpoint: Checkpoint = "best") -> Model:
    """The model that a run trained; its data need not be there.

    Of a run with ``--replicates`` it is that of the first seed, which a warning says.

    Raises:
        UserError: as `load_run`, or its task makes no predictors.
    """
    task_name = read_config(folder)[0]
    module: Any = tasks.load(task_name)
    if not hasattr(module, "build_predictor"):
        raise UserError(f"{folder}: a run of the task {task_name}, expected clevr or sets")
    run = load_run(folder, checkpoint=checkpoint)
    for reason in run.damaged:
        warnings.warn(f"left out: {reason}", stacklevel=2)
    if run.config.replicates > 1:
        warnings.warn(
            f"{folder}: a run of {run.config.replicates} seeds; the model is the first one's, seed"
            f" {run.config.seed}",
            stacklevel=2,
        )
    predictor, versions = module.build_predictor(run.config), run_folder.package_versions()
    return Model(
        run.config, run.variables[0], run.step, predictor, versions, task_name, str(folder)
    )


def read_config(folder: str | Path) -> tuple[str, TrainConfig]:
    """Task name and configuration of a run.

    Raises:
        UserError: no such run, or its record is damaged.
    """
    name = run_folder.read_record(folder)["task"]
    return name, run_folder.read_config(folder, tasks.load(name).Config)


def checkpoint_named(text: str) -> Checkpoint:
    """What ``--checkpoint`` says: best, latest, or a step.

    Raises:
        UserError: it says something else.
    """
    if text == "best" or text == "latest":
        return text
    if not text.isdecimal():
        raise UserError(f"--checkpoint: expected best, latest or a step, got {text!r}")
    return int(text)


def _restore(
    folder: Path, config: TrainConfig, task: Task, checkpoint: Checkpoint
) -> tuple[list[Variables], int, tuple[str, ...]]:
    """The variables of every replicate at a checkpoint, its step, and which others are damaged."""
    if not (folder / "checkpoints").is_dir():
        raise UserError(f"{folder} holds no checkpoint yet")
    checkpoints = Checkpoints(folder / "checkpoints", monitor=task.monitor, read_only=True)
    shapes = jax.eval_shape(
        lambda: init_states(task.init, task.optimizer, config.seed, config.replicates)
    )
    like = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), shapes)
    while True:
        step = checkpoints.best_step() if checkpoint == "best" else checkpoint
        if step == "latest" or step is None:
            restored = checkpoints.read_latest(like)
            break
        if step not in checkpoints.steps():
            raise UserError(
                f"{folder} has no checkpoint of step {step};"
                f" there are {', '.join(map(str, checkpoints.steps())) or 'none'}"
            )
        try:
            restored = checkpoints.read(step, like)
            break
        except UserError:
            # Training goes on, and what was best a moment ago may have had its day.
            if checkpoint != "best" or step in checkpoints.steps():
                raise
    reasons = {s: damage(folder / "checkpoints" / str(s)) for s in checkpoints.steps()}
    damaged = tuple(
        f"checkpoint {s}: {reason}"
        for s, reason in reasons.items()
        if reason and s in checkpoints.steps()
    )
    if restored is None:
        raise UserError(f"{folder} holds no checkpoint yet")
    states = [replicate_of(restored.state, config.replicates, r) for r in range(config.replicates)]
    return [state.variables_to_keep for state in states], restored.step, damaged
