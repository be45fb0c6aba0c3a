"""Tables of reports, as Markdown."""

from collections.abc import Iterable, Sequence
from typing import Any


def table(head: Sequence[Any], rows: Iterable[Sequence[Any]]) -> str:
    """A table; cells are spelled by `str`, and a bar within one is escaped.

    Example:
        >>> print(table(["n", "loss"], [[4, 0.5]]), end="")
        | n | loss |
        |---|---|
        | 4 | 0.5 |
    """
    return _line(head) + "|---" * len(head) + "|\n" + "".join(map(_line, rows))


def _line(cells: Sequence[Any]) -> str:
    escaped = [str(cell).replace("|", "\\|") for cell in cells]
    return f"| {' | '.join(escaped)} |\n"
