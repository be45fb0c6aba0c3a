"""``msdspn report TASK``: tables and charts of a task, ours beside the published."""

from __future__ import annotations

import importlib

from msdspn_jax import tasks
from msdspn_jax.errors import UserError

HELP = """\
usage: msdspn report TASK [flags]

Collect the finished runs of a task into the paper's tables and charts, with the published
numbers beside ours. Each task has its own flags:
  msdspn report TASK --help

Tasks: {tasks}
"""

_REPORTS = {
    "random-sets": "msdspn_jax.tasks.autoencoding.report",
    "numbering": "msdspn_jax.tasks.numbering.report",
    "clevr": "msdspn_jax.tasks.clevr.report",
}


def main(argv: list[str]) -> int:
    """Hand over to ``msdspn_jax.tasks.<task>_report.report``; returns the exit code."""
    if not argv or argv[0] in ("-h", "--help"):
        print(HELP.format(tasks=", ".join(tasks.TASKS)), end="")
        return 0 if argv else 2
    name = argv[0]
    tasks.load(name)
    module = _REPORTS.get(name)
    if module is None:
        raise UserError(f"there is no report for {name}; msdspn show RUN summarises a run")
    return importlib.import_module(module).report(argv[1:])
