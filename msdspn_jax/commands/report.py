"""``msdspn report TASK``: tables and charts of a task, ours beside the published."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from msdspn_jax import tasks
from msdspn_jax.errors import UserError

HELP = """\
usage: msdspn report TASK [flags]
       msdspn report all [flags]

Collect the finished runs of a task into the paper's tables and charts, with the published
numbers beside ours. Each task has its own flags:
  msdspn report TASK --help

all: every task that has finished runs, then the summary table of the README.

Tasks: {tasks}
"""


@dataclass(frozen=True, kw_only=True)
class All:
    """Every table and figure of experiments/ from the runs there are, and the README's summary.

    What has no finished runs keeps the tables that it has.
    """

    runs: Path | None = None
    """Folder to search for finished runs, at any depth. Default: the records that are kept beside
    each report, EXPERIMENTS/*/runs. Scripts, as clevr/comparison.py, always read kept records."""
    experiments: Path = Path("experiments")
    """Where the reports go, a folder a task; each has its part of the summary, summary.json."""
    readme: Path = Path("README.md")
    """The page whose table is made anew."""


class Experiment(NamedTuple):
    """A folder of experiments/: the task whose runs it reports, and scripts that report others.

    A script is a path and its arguments; it reads kept records, and writes beside itself.
    """

    folder: str
    task: str = ""
    scripts: tuple[tuple[str, ...], ...] = ()


#: In the order of the summary.
EXPERIMENTS = (
    Experiment("class_specific_numbering", "numbering"),
    Experiment("random_sets", "random-sets"),
    Experiment("clevr", "clevr", (("comparison.py",), ("recipes/search.py",))),
    Experiment("digits", scripts=(("report.py",),)),
    # Without a second for new runs, it draws those that there are.
    Experiment("implicit_differentiation", scripts=(("training.py", "--seconds", "0"),)),
    Experiment("benchmarks", scripts=(("report.py",),)),
)


def main(argv: list[str]) -> int:
    """Hand over to the task's own report; returns the exit code."""
    if not argv or argv[0] in ("-h", "--help"):
        print(HELP.format(tasks=", ".join(_reported())), end="")
        return 0 if argv else 2
    name, rest = argv[0], argv[1:]
    if name == "all":
        return _all(rest)
    own = name.endswith(".py") or "." in name
    module: Any = tasks.load(name) if own or name in tasks.TASKS else None
    if not hasattr(module, "report"):
        raise UserError(
            f"task: expected one with a report, {', '.join(_reported())}, got {name!r}"
            " (msdspn show RUN summarises any run)"
        )
    from msdspn_jax.trained import run

    return module.report(rest, run)


def _reported() -> list[str]:
    return [name for name in tasks.TASKS if hasattr(tasks.load(name), "report")]


def _all(argv: list[str]) -> int:
    from msdspn_jax._options import parse
    from msdspn_jax.tasks import summary
    from msdspn_jax.trained import run
    from msdspn_jax.training.run_folder import finished_runs

    options = parse(All, argv, prog="msdspn report all")
    for experiment in EXPERIMENTS:
        out = options.experiments / experiment.folder
        runs = options.runs or out / "runs"
        if experiment.task and finished_runs(runs, experiment.task):
            flags = ["--runs", str(runs), "--out", str(out)]
            tasks.load(experiment.task).report(flags, run)
        for script, *flags in experiment.scripts:
            if (out / script).exists():
                _execute(out / script, flags)
    results = summary.read_results(options.experiments / each.folder for each in EXPERIMENTS)
    if not results:
        raise UserError(
            f"--experiments: expected folders with summary.json, got {options.experiments}"
        )
    summary.put_into(options.readme, summary.table(results))
    print(f"{len(results)} results in the table of {options.readme}")
    return 0


def _execute(script: Path, flags: list[str]) -> None:
    done = subprocess.run([sys.executable, script, *flags], capture_output=True, text=True)
    if done.returncode:
        why = done.stderr.strip().splitlines() or ["it wrote no error"]
        raise UserError(f"--experiments: {script} ended with {done.returncode}: {why[-1]}")
    print(f"{script}: done")
