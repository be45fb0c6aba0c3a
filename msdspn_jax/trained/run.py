"""The run folder: what a run writes, and how to read it back."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any, Literal, NamedTuple

from msdspn_jax.errors import UserError
from msdspn_jax.training.config import TrainConfig
from msdspn_jax.training.task import Task, Variables

PACKAGES = ("msdspn-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


class Run(NamedTuple):
    """A trained run, read back by `load_run`.

    Attributes:
      folder: the run folder.
      task_name, config, task: the experiment, built again from config.json.
      variables: the model's variables of each replicate, ready for ``task.evaluate`` or ``apply``.
      step: the step of the checkpoint they come from.
    """

    folder: Path
    task_name: str
    config: TrainConfig
    task: Task
    variables: list[Variables]
    step: int


def load_run(folder: str | Path, *, checkpoint: Literal["best", "latest"] | int = "best") -> Run:
    """Read a run folder: its task, and the variables of its best (by validation) checkpoint.

    Raises:
      UserError: no such run, no such checkpoint, or it is damaged.
    """
    import jax
    import numpy as np

    from msdspn_jax import tasks
    from msdspn_jax.training.checkpoints import Checkpoints
    from msdspn_jax.training.state import init_states, replicate_of

    folder = Path(folder)
    task_name, config = read_config(folder)
    task = tasks.load(task_name).build(config)
    if not (folder / "checkpoints").is_dir():
        raise UserError(f"{folder} holds no checkpoint yet")
    checkpoints = Checkpoints(folder / "checkpoints", monitor=task.monitor, read_only=True)

    shapes = jax.eval_shape(lambda: init_states(task, config.seed, config.replicates))
    like = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), shapes)
    if checkpoint == "best":
        best = checkpoints.best_step()
        restored = checkpoints.read_latest(like) if best is None else checkpoints.read(best, like)
    elif checkpoint == "latest":
        restored = checkpoints.read_latest(like)
    else:
        if checkpoint not in checkpoints.steps():
            raise UserError(
                f"{folder} has no checkpoint of step {checkpoint};"
                f" there are {', '.join(map(str, checkpoints.steps())) or 'none'}"
            )
        restored = checkpoints.read(checkpoint, like)
    if restored is None:
        raise UserError(f"{folder} holds no checkpoint yet")
    variables = [
        replicate_of(restored.state, config.replicates, r).variables
        for r in range(config.replicates)
    ]
    return Run(folder, task_name, config, task, variables, restored.step)


# --- config.json ---


def write_config(folder: Path, task: Task, config: TrainConfig) -> None:
    """Write config.json: enough to run the same again, and to know what it ran on."""
    import jax

    record = {
        "task": task.name,
        "config": config.to_dict(),
        "command": sys.argv,
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "versions": {"python": platform.python_version()} | package_versions(),
        "devices": sorted({d.device_kind for d in jax.devices()}),
        "num_devices": jax.device_count(),
        "num_processes": jax.process_count(),
        "facts": task.describe,
    }
    write_atomically(folder / "config.json", json.dumps(record, indent=2, default=str) + "\n")


def read_record(folder: Path) -> dict[str, Any]:
    """config.json as it is.

    Raises:
      UserError: there is none, or it is not JSON.
    """
    path = folder / "config.json"
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{folder} is not a run folder: it has no config.json") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is damaged: {error}") from None


def read_config(folder: Path) -> tuple[str, TrainConfig]:
    """Task name and configuration of a run."""
    from msdspn_jax import tasks

    record = read_record(folder)
    config_type = tasks.load(record["task"]).Config
    known = {f.name for f in dataclasses.fields(config_type)}
    values = {
        # JSON has no tuples.
        k: tuple(v) if isinstance(v, list) else v
        for k, v in record["config"].items()
        if k in known
    }
    return record["task"], config_type(**values)


def config_difference(saved: TrainConfig, asked: TrainConfig) -> list[str]:
    """Lines saying which fields that change the numbers differ."""
    a, b = saved.numerical(), asked.numerical()
    return [
        f"--{name.replace('_', '-')}: the run has {a.get(name)!r}, asked for {b.get(name)!r}"
        for name in sorted(a.keys() | b.keys())
        if a.get(name) != b.get(name)
    ]


def package_versions() -> dict[str, str]:
    """Installed versions of the packages that a run's numbers depend on."""
    from importlib import metadata

    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


# --- metrics.jsonl ---


def read_metrics(folder: str | Path, split: str | None = None) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, of one split if named; a torn last line is left out."""
    path = Path(folder) / "metrics.jsonl"
    if not path.exists():
        return []
    lines = []
    for text in path.read_text().splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if split is None or line.get("split") == split:
            lines.append(line)
    return lines


def truncate_metrics(folder: Path, step: int) -> None:
    """Drop what was logged after ``step``, so that a resumed run's history has no echo."""
    kept = [line for line in read_metrics(folder) if line["step"] <= step]
    write_atomically(folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in kept))


def append_metrics(folder: Path, step: int, split: str, values: dict[str, float]) -> None:
    """Add a line to metrics.jsonl; an older one of the same step and split is replaced."""
    lines = [x for x in read_metrics(folder) if (x["step"], x["split"]) != (step, split)]
    lines.append({"step": step, "split": split} | values)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    write_atomically(folder / "metrics.jsonl", text)


def write_atomically(path: Path, text: str) -> None:
    """Write a small file so that it is whole or as before."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def is_finished(folder: Path) -> bool:
    """Whether a run has done all its steps."""
    try:
        steps = read_record(folder)["config"]["steps"]
    except UserError:
        return False
    return any(line["step"] >= steps for line in read_metrics(folder, "val"))


def finished_runs(root: Path, task: str) -> list[Path]:
    """Folders below `root` that hold a finished run of a task."""
    folders = []
    for path in sorted(root.rglob("config.json")):
        try:
            record = read_record(path.parent)
        except UserError:
            continue
        if record.get("task") == task and is_finished(path.parent):
            folders.append(path.parent)
    return folders
