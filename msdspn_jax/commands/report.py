"""``msdspn report TASK``: tables and charts of a task, ours beside the published."""

from __future__ import annotations

from msdspn_jax import tasks
from msdspn_jax.errors import UserError

HELP = """\
usage: msdspn report TASK [flags]

Collect the finished runs of a task into the paper's tables and charts, with the published
numbers beside ours. Each task has its own flags:
  msdspn report TASK --help

Tasks: {tasks}
"""


def main(argv: list[str]) -> int:
    """Hand over to the task's own report; returns the exit code."""
    if not argv or argv[0] in ("-h", "--help"):
        reported = [name for name in tasks.TASKS if hasattr(tasks.load(name), "report")]
        print(HELP.format(tasks=", ".join(reported)), end="")
        return 0 if argv else 2
    name, rest = argv[0], argv[1:]
    module = tasks.load(name)
    if not hasattr(module, "report"):
        raise UserError(f"there is no report for {name}; msdspn show RUN summarises a run")
    from msdspn_jax.trained import run

    return module.report(rest, run)
