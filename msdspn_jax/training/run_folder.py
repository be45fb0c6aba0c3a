"""The small files of a run folder: config.json and metrics.jsonl."""

from __future__ import annotations

import dataclasses
import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

from msdspn_jax._files import write_text
from msdspn_jax.errors import UserError
from msdspn_jax.training.config import TrainConfig, as_flags, from_dict
from msdspn_jax.training.task import Task

PACKAGES = ("msdspn-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


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
    write_text(folder / "config.json", json.dumps(record, indent=2, default=str) + "\n")


def read_record(folder: str | Path) -> dict[str, Any]:
    """config.json as it is.

    Raises:
        UserError: there is none, or it is not the record of a run.
    """
    path = Path(folder) / "config.json"
    try:
        record = json.loads(path.read_bytes())
        if not isinstance(record["task"], str) or not isinstance(record["config"], dict):
            raise ValueError("no record of a run")
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{folder} is not a run folder: it has no config.json") from None
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise UserError(f"{path} is damaged: {error!r}") from None
    return record


def read_config(folder: str | Path, config_type: type[TrainConfig]) -> TrainConfig:
    """The configuration of a run; fields that the type no longer has are left out.

    Raises:
        UserError: no record, or none that makes a valid configuration.
    """
    return parse_config(folder, config_type, read_record(folder)["config"])


def parse_config(
    folder: str | Path, config_type: type[TrainConfig], values: dict[str, Any]
) -> TrainConfig:
    """As `read_config`, from the record's configuration."""
    known = {f.name for f in dataclasses.fields(config_type)}
    try:
        return from_dict(config_type, {k: v for k, v in values.items() if k in known})
    except (ValueError, TypeError) as error:
        raise UserError(f"{folder}: its configuration is not valid: {error}") from error


def config_difference(saved: TrainConfig, asked: TrainConfig) -> list[str]:
    """Lines saying which flags that change the numbers differ, as a user types them."""
    a, b = (as_flags(config.resolved().numerical()) for config in (saved, asked))
    return [
        f"{flag}: the run has {a.get(flag)!r}, asked for {b.get(flag)!r}"
        for flag in sorted(a.keys() | b.keys())
        if a.get(flag) != b.get(flag)
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
    _write_metrics(folder, [line for line in read_metrics(folder) if line["step"] <= step])


def append_metrics(folder: Path, step: int, split: str, values: dict[str, float]) -> None:
    """Add a line to metrics.jsonl; an older one of the same step and split is replaced."""
    lines = [x for x in read_metrics(folder) if (x["step"], x["split"]) != (step, split)]
    _write_metrics(folder, [*lines, {"step": step, "split": split} | values])


def _write_metrics(folder: Path, lines: list[dict[str, Any]]) -> None:
    write_text(folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))


# --- what became of a run ---


def is_finished(folder: Path) -> bool:
    """Whether a run has done all its steps."""
    try:
        steps = read_record(folder)["config"]["steps"]
    except (UserError, KeyError):
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
        if record["task"] == task and is_finished(path.parent):
            folders.append(path.parent)
    return folders
