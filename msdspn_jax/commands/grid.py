"""``msdspn grid TASK``: train many settings of one task."""

from __future__ import annotations

import contextlib
import itertools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from msdspn_jax import tasks
from msdspn_jax._options import parse, parse_known
from msdspn_jax.errors import UserError

HELP = """\
usage: msdspn grid TASK [--FLAG A,B,C ...] [grid options]

Train one run, a cell, for every combination of the values given with commas. Flags are those of
msdspn train TASK; one value without a comma holds for every cell. Cells that are finished are
skipped, unfinished ones are resumed, so the same command may be given again after anything.

Example (the grid of the paper's section 4.2, three variants of the model):
  msdspn grid random-sets --set-size 2,4,8,16,32 --set-dim 2,4,8,16,32 --inner.num-steps 10,20,40 \\
      --variant idspn-momentum,idspn,dspn --replicates 8

"""

# Models as the paper names them in 4.2: one word for two flags.
VARIANTS = {
    "idspn-momentum": {"model": "idspn", "inner.momentum": "0.9"},
    "idspn": {"model": "idspn", "inner.momentum": "0"},
    "dspn": {"model": "dspn", "inner.momentum": "0"},
}


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Options of the grid itself."""

    grid_dir: str | None = None
    """Folder of the cells, one run folder each. Default: runs/TASK-grid."""
    dry_run: bool = False
    """List the cells and their state, and train none."""
    executor: Literal["here", "local", "slurm"] = "here"
    """here: one cell after another in this process; local, slurm: a job a cell, through submitit
    (pip install 'msdspn-jax[slurm]')."""
    slurm_partition: str | None = None
    """With --executor slurm: the partition."""
    job_minutes: int = 24 * 60
    """With --executor local or slurm: the time limit of a job."""
    max_cells: int | None = None
    """Train at most this many cells now."""


@dataclass(frozen=True)
class Cell:
    """One run of a grid."""

    name: str
    arguments: tuple[str, ...]


def main(argv: list[str]) -> int:
    """Run the verb; returns the exit code: 0 if every cell asked for is finished, otherwise 1."""
    if not argv or argv[0] in ("-h", "--help") or "--help" in argv or "-h" in argv:
        print(HELP, end="")
        with contextlib.suppress(SystemExit):
            parse(Grid, ["--help"], prog="msdspn grid TASK")
        return 0 if argv else 2
    task, rest = argv[0], argv[1:]
    tasks.load(task)
    task = tasks.canonical(task)
    options, rest = parse_known(Grid, rest, prog=f"msdspn grid {task}")
    folder = Path(options.grid_dir or f"runs/{tasks.word(task)}-grid")
    cells = expand(task, rest)
    return run(task, cells, folder, options)


def expand(task: str, argv: list[str]) -> list[Cell]:
    """The cells of a grid: every combination of the comma-separated values."""
    flags = _flags(argv)
    for flag, values in flags.items():
        if len(set(values)) < len(values):
            raise UserError(f"{flag} names a value twice: {','.join(values)}")
    varied = [flag for flag, values in flags.items() if len(values) > 1]
    cells = []
    for combination in itertools.product(*flags.values()):
        chosen = dict(zip(flags, combination, strict=True))
        name = "_".join(f"{flag[2:]}-{chosen[flag]}" for flag in varied) or "only"
        arguments: list[str] = []
        for flag, value in chosen.items():
            if flag == "--variant":
                if value not in VARIANTS:
                    raise UserError(
                        f"--variant: expected one of {', '.join(VARIANTS)}, got {value!r}"
                    )
                for key, word in VARIANTS[value].items():
                    arguments += [f"--{key}", word]
            else:
                arguments += [flag] if value == "" else [flag, value]
        cells.append(Cell(name, tuple(arguments)))
    # One bad value should stop the grid before its first cell, not at its last.
    for cell in cells:
        _config(task, cell, Path("checked"))
    return cells


def _flags(argv: list[str]) -> dict[str, list[str]]:
    flags: dict[str, list[str]] = {}
    i = 0
    while i < len(argv):
        word = argv[i]
        if not word.startswith("--"):
            raise UserError(f"expected a flag such as --set-size, got {word!r}")
        if "=" in word:
            word, value = word.split("=", 1)
        elif i + 1 < len(argv) and not argv[i + 1].startswith("--"):
            i += 1
            value = argv[i]
        else:
            value = ""
        word = word.replace("_", "-")
        if word in flags:
            raise UserError(f"{word} is given twice")
        if word in ("--run-dir", "--resume"):
            raise UserError(f"{word} is the grid's own affair; its folder is --grid-dir")
        flags[word] = value.split(",")
        i += 1
    return flags


def _config(task: str, cell: Cell, folder: Path) -> Any:
    from msdspn_jax.commands.train import parse

    return parse(task, [*cell.arguments, "--run-dir", str(folder / cell.name), "--resume", "auto"])


def state_of(cell: Cell, folder: Path) -> Literal["finished", "unfinished", "new"]:
    """How far a cell has come."""
    from msdspn_jax.training.run_folder import is_finished, is_run

    if is_finished(folder / cell.name):
        return "finished"
    return "unfinished" if is_run(folder / cell.name) else "new"


def run(task: str, cells: list[Cell], folder: Path, options: Grid) -> int:
    """Train what is not finished; returns the exit code."""
    states = {cell: state_of(cell, folder) for cell in cells}
    counts = {s: list(states.values()).count(s) for s in ("finished", "unfinished", "new")}
    print(
        f"{len(cells)} cells in {folder}: "
        + ", ".join(f"{count} {state}" for state, count in counts.items() if count),
        file=sys.stderr,
    )
    if options.dry_run:
        for cell, state in states.items():
            print(f"{state:<10}  {cell.name}")
        return 0
    # A finished cell is checked all the same: its folder must be of this grid's settings.
    for cell, state in states.items():
        if state != "new":
            _check_unchanged(task, cell, folder)
    todo = [cell for cell, state in states.items() if state != "finished"]
    todo = todo[: options.max_cells]
    if options.executor != "here":
        return _submit(task, todo, folder, options)
    failed = []
    for number, cell in enumerate(todo, 1):
        print(f"[{number}/{len(todo)}] {cell.name}", file=sys.stderr)
        try:
            code = train_cell(task, cell, folder)
        except UserError as error:
            # One diverging cell must not keep the others from being trained.
            print(f"{cell.name}: {error}", file=sys.stderr)
            failed.append(cell.name)
            continue
        if code:
            return code
    if failed:
        print(f"not finished: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def train_cell(task: str, cell: Cell, folder: Path) -> int:
    """Train one cell, or go on with it; returns the exit code."""
    from msdspn_jax.commands.train import train

    return train(task, _config(task, cell, folder))


def _check_unchanged(task: str, cell: Cell, folder: Path) -> None:
    from msdspn_jax.commands.train import parse
    from msdspn_jax.trained.run import read_config
    from msdspn_jax.training.run_folder import config_difference

    _, saved = read_config(folder / cell.name)
    # Without --resume: what the cell does not say is the default, not what the run has.
    asked = parse(task, list(cell.arguments))
    difference = config_difference(saved, asked)
    if difference:
        raise UserError(
            f"{folder / cell.name} was begun with other flags:\n  "
            + "\n  ".join(difference)
            + "\nUse another --grid-dir, or the flags of then."
        )


def _submit(task: str, cells: list[Cell], folder: Path, options: Grid) -> int:
    try:
        import submitit
    except ImportError:
        raise UserError(
            f"--executor {options.executor} needs submitit: pip install 'msdspn-jax[slurm]'"
        ) from None
    executor = submitit.AutoExecutor(
        folder / "jobs", cluster="local" if options.executor == "local" else "slurm"
    )
    executor.update_parameters(name=f"msdspn-{tasks.word(task)}", timeout_min=options.job_minutes)
    if options.slurm_partition is not None:
        executor.update_parameters(slurm_partition=options.slurm_partition)
    jobs = [executor.submit(train_cell, task, cell, folder) for cell in cells]
    print(f"{len(jobs)} jobs submitted; logs in {folder / 'jobs'}", file=sys.stderr)
    if options.executor == "slurm":
        return 0
    codes = []
    for cell, job in zip(cells, jobs, strict=True):
        try:
            codes.append(job.result())
        except Exception as error:
            reason = str(error).strip().splitlines()
            print(f"{cell.name}: {reason[-1] if reason else error!r}", file=sys.stderr)
            codes.append(1)
    return 1 if any(codes) else 0
