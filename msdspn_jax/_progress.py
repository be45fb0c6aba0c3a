"""One progress bar for everything that reports (done, total)."""

from __future__ import annotations

import sys
from typing import Any


class ProgressBar:
    """A bar on standard error with count and remaining time: call it with (done, total).

    It shows once something is reported, and nothing where standard error is not a terminal.

        with ProgressBar("reading") as report:
            for i, file in enumerate(files):
                report(i, len(files))

    Texts are shown as they are: square brackets are no markup.

    Attributes:
        live: whether there is a terminal to draw on.
    """

    def __init__(self, label: str = "", *, transient: bool = False):
        """Draw nothing yet.

        Args:
            label: stands before the bar.
            transient: leave no bar behind at the end.
        """
        self.live = sys.stderr.isatty()
        self._label, self._transient = label, transient
        self._bar: Any = None

    def __call__(self, done: int, total: int | None, note: str = "") -> None:
        """Show that `done` of `total` is done, with a note behind the bar."""
        if not self.live:
            return
        if self._bar is None:
            self._bar = _bar(self._transient)
            self._task = self._bar.add_task(self._label, total=total, completed=done, note=note)
            self._bar.start()
        self._bar.update(self._task, completed=done, total=total, note=note)

    def restart_clock(self) -> None:
        """Estimate the remaining time from what follows alone."""
        if self._bar is not None:
            completed = self._bar.tasks[self._task].completed
            self._bar.reset(self._task, completed=completed)

    def say(self, text: str) -> None:
        """A line that stays, above the bar."""
        if self._bar is None:
            print(text, file=sys.stderr, flush=True)
        else:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _bar(transient: bool) -> Any:
    from rich import progress
    from rich.console import Console

    return progress.Progress(
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(bar_width=24),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.fields[note]}", markup=False),
        progress.TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=transient,
    )
