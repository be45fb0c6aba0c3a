"""``msdspn show RUN``: what a run is and how it went."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from msdspn_jax._options import parse
from msdspn_jax.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Show:
    """Summary of a run folder: its settings, metrics, checkpoints and figures."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """The run folder, or a folder of runs: then one line a run."""
    all: bool = False
    """Show every setting, not only those that differ from the task's defaults."""
    open: bool = False
    """Open the figures with the system's viewer."""


def main(argv: list[str]) -> int:
    """Run the verb; returns the exit code."""
    from msdspn_jax.training.run_folder import is_run

    options = parse(Show, argv, prog="msdspn show")
    folder = Path(options.run)
    if not is_run(folder):
        runs = sorted(p.parent for p in folder.rglob("config.json"))
        if not runs:
            raise UserError(f"{folder} is not a run folder (it has no config.json), nor holds any")
        _list(runs)
        return 0
    _show(folder, options)
    return 0


def metrics_table(found: dict[str, dict[str, float]], *, title: str) -> Any:
    """A rich table of metrics: a row a metric, a column a split; mean ± deviation."""
    from rich.table import Table
    from rich.text import Text

    # Text, not str: square brackets in a name are no markup.
    table = Table(title=Text(title), title_justify="left")
    table.add_column("metric")
    for split in found:
        table.add_column(Text(split), justify="right")
    names = dict.fromkeys(k for values in found.values() for k in values if not k.endswith("_std"))
    for name in names:
        row = [Text(name)]
        for values in found.values():
            row.append(Text(_number(values.get(name), values.get(f"{name}_std"))))
        table.add_row(*row)
    return table


def _number(value: float | None, deviation: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.5g}" + (f" ± {deviation:.2g}" if deviation is not None else "")


def best_line(folder: Path) -> dict[str, Any] | None:
    """The validation line with the lowest loss, or, without one, the last."""
    from msdspn_jax.training.run_folder import read_metrics

    lines = read_metrics(folder, "val")
    scored = [x for x in lines if x.get("loss") is not None]
    return min(scored, key=lambda x: x["loss"]) if scored else (lines[-1] if lines else None)


def _list(runs: list[Path]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from msdspn_jax.training.run_folder import is_finished, read_record

    table = Table()
    for column in ("run", "task", "steps", "best validation loss"):
        table.add_column(column)
    for folder in runs:
        try:
            record, best = read_record(folder), best_line(folder)
        except UserError as error:
            table.add_row(Text(str(folder)), "", Text(str(error)), "")
            continue
        steps = str(record["config"]["steps"])
        table.add_row(
            Text(str(folder)),
            Text(record["task"]),
            steps if is_finished(folder) else f"unfinished, of {steps}",
            "" if best is None else _number(best.get("loss"), best.get("loss_std")),
        )
    Console().print(table)


def _show(folder: Path, options: Any) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from msdspn_jax import tasks
    from msdspn_jax.trained.run import read_config
    from msdspn_jax.training.checkpoints import steps_in
    from msdspn_jax.training.config import as_flags
    from msdspn_jax.training.run_folder import (
        is_finished,
        read_evaluation,
        read_metrics,
        read_record,
    )

    console = Console()
    record = read_record(folder)
    name, config = read_config(folder)
    defaults = as_flags(tasks.load(name).Config().to_dict())
    console.print(
        Text.assemble(
            (name, "bold"),
            f" in {folder}, begun {record['created']},"
            f" {', '.join(record['devices'])} × {record['num_devices']},"
            f" jax {record['versions']['jax']}",
        )
    )
    table = Table(title="settings" if options.all else "settings that are not defaults")
    table.title_justify = "left"
    table.add_column("flag")
    table.add_column("value")
    for flag, value in as_flags(config.to_dict()).items():
        # The format of the data is no flag, and its numbers may be many.
        if flag.startswith("--form."):
            continue
        if options.all or (value != defaults[flag] and flag not in ("--run-dir", "--resume")):
            table.add_row(flag, Text(str(value)))
    if table.row_count:
        console.print(table)

    by_split: dict[str, dict[str, float]] = {}
    lines = read_metrics(folder)
    for line in lines:
        by_split[line["split"]] = {k: v for k, v in line.items() if k not in ("step", "split")}
    if not lines:
        console.print("no metrics yet")
    else:
        state = "finished" if is_finished(folder) else "not finished (--resume goes on)"
        last = max(line["step"] for line in lines)
        title = f"last metrics; step {last} of {config.steps}, {state}"
        console.print(metrics_table(by_split, title=title))
        best = best_line(folder)
        if best is not None and best.get("loss") is not None:
            console.print(
                f"best validation loss {_number(best['loss'], best.get('loss_std'))}"
                f" at step {best['step']}",
                highlight=False,
            )
    evaluation = read_evaluation(folder)
    if evaluation is not None:
        title = f"evaluated: checkpoint {evaluation['checkpoint']}, step {evaluation['step']}"
        console.print(metrics_table(evaluation["metrics"], title=title))
    steps = steps_in(folder / "checkpoints")
    if steps:
        console.print(f"checkpoints: {', '.join(map(str, steps))}", highlight=False)
    figures = sorted((folder / "figures").glob("*.png"))
    for path in figures:
        console.print(f"figure: {path}", markup=False, highlight=False, soft_wrap=True)
        if options.open:
            _open(path)


def _open(path: Path) -> None:
    import subprocess
    import sys

    opener = {"darwin": "open", "win32": "explorer"}.get(sys.platform, "xdg-open")
    try:
        subprocess.Popen([opener, str(path)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(0.1)
    except OSError as error:
        raise UserError(f"could not open {path} with {opener}: {error.strerror}") from error
