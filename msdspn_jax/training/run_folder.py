"""The small files of a run folder: config.json, metrics.jsonl, evaluation.json, decodings.json."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import math
import platform
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from msdspn_jax._files import as_json, waiting_for, write_text
from msdspn_jax.errors import UserError
from msdspn_jax.training.checkpoints import newest_record, steps_in
from msdspn_jax.training.config import TrainConfig, as_flags, from_dict
from msdspn_jax.training.legacy import modernise
from msdspn_jax.training.task import Task

PACKAGES = ("msdspn-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


# --- config.json ---


def is_run(folder: str | Path) -> bool:
    """Whether a folder holds a run that has begun."""
    return (Path(folder) / "config.json").exists() or bool(steps_in(Path(folder) / "checkpoints"))


def require_run(folder: str | Path) -> None:
    """Refuse to go on with a run that is not there.

    Raises:
        UserError: it names runs beside it whose names are like that.
    """
    folder = Path(folder)
    if is_run(folder):
        return
    parent = folder.absolute().parent
    beside: list[str] = []
    with contextlib.suppress(OSError):
        beside = [p.name for p in parent.iterdir() if is_run(p)]
    near = difflib.get_close_matches(folder.name, sorted(beside), n=3)
    hint = f" Did you mean {' or '.join(str(folder.with_name(n)) for n in near)}?" if near else ""
    raise UserError(
        f"--resume: {folder} holds no run to go on with.{hint}"
        " To begin one there, leave out --resume; --resume auto does whichever is needed."
    )


def record_of(task: Task, config: TrainConfig) -> dict[str, Any]:
    """What config.json holds: enough to run the same again, and to know what it ran on."""
    import jax

    return {
        "task": task.name,
        "config": config.to_dict(),
        "command": sys.argv,
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "versions": {"python": platform.python_version()} | package_versions(),
        "devices": sorted({d.device_kind for d in jax.devices()}),
        "precision": _precision(),
        "num_devices": jax.device_count(),
        "num_processes": jax.process_count(),
        # As config.json will give it back.
        "facts": json.loads(json.dumps(task.describe, default=str)),
    }


def write_config(folder: Path, task: Task, config: TrainConfig) -> None:
    """Write config.json."""
    text = json.dumps(record_of(task, config), indent=2)
    write_text(folder / "config.json", text + "\n")


def read_record(folder: str | Path) -> dict[str, Any]:
    """config.json as it is; where it is missing, the record in the newest checkpoint.

    Raises:
        UserError: there is none, or it is not the record of a run.
    """
    path = Path(folder) / "config.json"
    try:
        record = json.loads(path.read_bytes())
        if not isinstance(record["task"], str) or not isinstance(record["config"], dict):
            raise ValueError("no record of a run")
    except (FileNotFoundError, NotADirectoryError):
        checkpoints = Path(folder) / "checkpoints"
        record = newest_record(checkpoints)
        if record is None and steps_in(checkpoints):
            raise UserError(
                f"{folder} has no config.json, and none of its checkpoints says with which"
                " settings it was made: put config.json back"
            ) from None
        if record is None:
            raise UserError(f"{folder} is not a run folder: it has no config.json") from None
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise UserError(f"{path} is damaged: {error!r}") from None
    return record


def environment_changes(record: dict[str, Any]) -> list[str]:
    """What a run was made with, by its record, that is another now and may change the last bits."""
    import jax

    then = {
        "JAX": record.get("versions", {}).get("jax"),
        "device": ", ".join(record.get("devices", [])),
        "precision": record.get("precision"),
    }
    now = {
        "JAX": package_versions()["jax"],
        "device": ", ".join(sorted({d.device_kind for d in jax.devices()})),
        "precision": _precision(),
    }
    return [
        f"{name} {then[name]} then, {now[name]} now"
        for name in then
        if then[name] and then[name] != now[name]
    ]


def _precision() -> str:
    """How JAX computes where a program does not say."""
    import jax

    bits = 64 if jax.config.read("jax_enable_x64") else 32
    matmul = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    return f"{bits} bits" + (f", matmul {matmul}" if matmul else "")


def read_config(folder: str | Path, config_type: type[TrainConfig]) -> TrainConfig:
    """The configuration of a run; fields that the type no longer has are left out.

    Raises:
        UserError: no record, or none that makes a valid configuration.
    """
    record = read_record(folder)
    values = modernise(record["task"], record["config"])
    known = {f.name for f in dataclasses.fields(config_type)}
    try:
        return from_dict(config_type, {k: v for k, v in values.items() if k in known})
    except (ValueError, TypeError) as error:
        raise UserError(f"{folder}: its configuration is not valid: {error}") from error


def config_difference(saved: TrainConfig, asked: TrainConfig) -> list[str]:
    """Lines saying which flags that change the numbers differ, as a user types them."""
    a, b = (as_flags(config.resolved().numerical()) for config in (saved, asked))
    places = [f"--{name.replace('_', '-')}" for name in asked.places()]
    return [
        f"{flag}: the run has {a.get(flag)!r}, asked for {b.get(flag)!r}"
        for flag in sorted(a.keys() | b.keys())
        if a.get(flag) != b.get(flag) and flag not in places
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
    try:
        content = (Path(folder) / "metrics.jsonl").read_bytes()
    except FileNotFoundError:
        return []
    lines = []
    for text in content.splitlines():
        try:
            line = json.loads(text)
            if not isinstance(line["step"], int) or not isinstance(line["split"], str):
                continue
        except (ValueError, KeyError, TypeError):
            continue
        if split is None or line["split"] == split:
            lines.append(line)
    return lines


def truncate_metrics(folder: Path, step: int) -> None:
    """Drop what was logged after ``step``, so that a resumed run's history has no echo."""
    lines = [line for line in read_metrics(folder) if line["step"] <= step]
    write_text(folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))


# --- evaluation.json ---


def read_evaluation(folder: str | Path) -> dict[str, Any] | None:
    """What `write_evaluation` wrote last: step, checkpoint, metrics by split; None if nothing."""
    try:
        record = read_json(Path(folder) / "evaluation.json")
        if not all(isinstance(x, dict) for x in (record, *record["metrics"].values())):
            return None
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return record


def write_evaluation(
    folder: Path, step: int, checkpoint: str, found: dict[str, dict[str, float]]
) -> None:
    """Keep the metrics of a checkpoint by split, beside those of its other splits.

    Evaluations under way at the same time do not lose one another's splits.
    """
    with waiting_for(folder):
        before = read_evaluation(folder)
        kept = before["metrics"] if before is not None and before.get("step") == step else {}
        record = {"step": step, "checkpoint": checkpoint, "metrics": kept | found}
        _write_json(folder / "evaluation.json", record)


# --- decodings.json ---


def read_decodings(folder: str | Path) -> list[dict[str, Any]]:
    """What `write_decoding` wrote: step, inner settings, and by split the metrics of every seed.

    Raises:
        UserError: the file is damaged.
    """
    path = Path(folder) / "decodings.json"
    try:
        records = read_json(path)
        if not all(record["step"] >= 0 and record["inner"] for record in records):
            raise ValueError("a record without settings")
        if not all(record["metrics"] for record in records):
            raise ValueError("a record without metrics")
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error!r}): mend it or remove it") from error
    return records


def last_decodings(folder: str | Path) -> list[dict[str, Any]]:
    """Those of `read_decodings` that are of the last checkpoint that was decoded so."""
    records = read_decodings(folder)
    return [x for x in records if x["step"] == max(record["step"] for record in records)]


def write_decoding(
    folder: Path, step: int, inner: dict[str, float], found: dict[str, dict[str, list[float]]]
) -> None:
    """Keep the metrics of a checkpoint that was decoded with other settings than the run's own.

    Other checkpoints and settings stay, and so do other splits of the same.
    """
    with waiting_for(folder):
        records = read_decodings(folder)
        for record in records:
            if (record["step"], record["inner"]) == (step, inner):
                record["metrics"] |= found
                break
        else:
            records.append({"step": step, "inner": inner, "metrics": found})
        _write_json(folder / "decodings.json", records)


def _write_json(path: Path, record: Any) -> None:
    write_text(path, as_json(record, indent=1) + "\n")


def read_json(path: Path) -> Any:
    """What `as_json` wrote of dictionaries, with NaN where a number is null."""

    def number(value):
        if isinstance(value, list):
            return [number(v) for v in value]
        return math.nan if value is None else value

    return json.loads(
        path.read_bytes(), object_pairs_hook=lambda pairs: {k: number(v) for k, v in pairs}
    )


# --- what became of a run ---


def is_finished(folder: Path) -> bool:
    """Whether a run has done all its steps, and saved the last.

    Of a record that is kept without its checkpoints, the log says it.
    """
    try:
        steps = read_record(folder)["config"]["steps"]
    except (UserError, KeyError):
        return False
    checkpoints = folder / "checkpoints"
    if checkpoints.is_dir() and max(steps_in(checkpoints), default=-1) < steps:
        return False
    return any(line["step"] >= steps for line in read_metrics(folder, "val"))


def training_hours(folder: str | Path) -> float:
    """Hours that the steps of a run took, compiling and evaluating aside, from its metrics."""
    return max(_hours_by_step(folder).values(), default=0.0)


def validation_curve(folder: str | Path, name: str) -> list[tuple[int, float, float]]:
    """Step, hours of training until then, and the metric `name`, at every evaluation of a run."""
    # An evaluation may lie between two lines of training.
    hours = {0: 0.0} | _hours_by_step(folder)
    steps, until = list(hours), list(hours.values())
    return [
        (x["step"], float(np.interp(x["step"], steps, until)), x[name])
        for x in read_metrics(folder, "val")
        if x[name] is not None  # Null where it was not finite.
    ]


def _hours_by_step(folder: str | Path) -> dict[int, float]:
    """Hours that training had taken at each step of which the log has a line.

    Steps that took three times as long as at the median of the lines around were held up, by a
    pause of the machine or by other work on it, and count as long as those.
    """
    seconds, last, found = 0.0, 0, {}
    lines = read_metrics(folder, "train")
    paces = [1 / (line.get("steps_per_second") or math.inf) for line in lines]
    for i, (line, pace) in enumerate(zip(lines, paces, strict=True)):
        # Not of all lines: the pace may change for good, with the number of inner steps.
        usual = float(np.median(paces[max(0, i - 10) : i + 11]))
        seconds += (line["step"] - last) * (pace if pace < 3 * usual else usual)
        last = line["step"]
        found[last] = seconds / 3600
    return found


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
