"""The summary table of the README: paper's number, ours, size of run, hours, command.

Every report writes its rows beside its other results, as summary*.json. ``msdspn report all`` puts
them together, so that no number is copied by hand.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from msdspn_jax import _markdown
from msdspn_jax._files import write_text
from msdspn_jax.errors import UserError

FILE = "summary{}.json"
MARK = "msdspn report all"
_HEAD = ("experiment", "", "published", "ours", "size of our run", "hours", "command")


class Result(NamedTuple):
    """A row.

    Attributes:
        experiment: what was done and measured, the first words a link to the page if wanted.
        case: which model or data this row is of; nothing where there is one row only.
        published: the paper's number, and whose it is if not the paper's.
        ours: as precise as it is sure.
        size: what our run is smaller in, and the number of seeds.
        hours: of training, on what.
        command: that makes the runs; empty where no single one does.
    """

    experiment: str
    case: str
    published: str
    ours: str
    size: str
    hours: str
    command: str


def write_results(folder: Path, results: Sequence[Result], part: str = "") -> None:
    """Write the rows of one experiment, or of a part of it, into its folder."""
    rows = [result._asdict() for result in results]
    write_text(
        Path(folder) / FILE.format(part and f"_{part}"),
        json.dumps(rows, indent=1, ensure_ascii=False) + "\n",
    )


def read_results(folders: Iterable[Path]) -> list[Result]:
    """The rows of these experiments, in this order; folders without any have none.

    Raises:
        UserError: a file that was not written by `write_results`.
    """
    results = []
    for folder in folders:
        for path in sorted(Path(folder).glob(FILE.format("*"))):
            try:
                results += [Result(**row) for row in json.loads(path.read_text())]
            except (ValueError, TypeError) as error:
                raise UserError(f"{path}: not a summary of results ({error})") from error
    return results


def table(results: Sequence[Result]) -> str:
    """The rows as Markdown. What rows of one experiment share stands in the first only."""
    lines = []
    above = None
    for result in results:
        own = result
        if above is not None and above.experiment == result.experiment:
            shared = ("experiment", "size", "hours", "command")
            same = [name for name in shared if getattr(result, name) == getattr(above, name)]
            own = result._replace(**dict.fromkeys(same, ""))
        above = result
        lines.append([*own[:-1], f"`{own.command}`" if own.command else ""])
    return _markdown.table(_HEAD, lines)


def marks(name: str = MARK) -> tuple[str, str]:
    """The comments between which a page holds what a command writes, by the command's name."""
    return f"<!-- {name}: begin -->", f"<!-- {name}: end -->"


def put_into(page: Path, text: str, name: str = MARK) -> None:
    """Replace what stands between the two marks of a page.

    Raises:
        UserError: the page has not both marks, in this order.
    """
    first, last = marks(name)
    before, begin, rest = page.read_text().partition(first)
    _, end, after = rest.partition(last)
    if not begin or not end:
        raise UserError(f"{page}: expected the marks {first} and {last} around its table")
    write_text(page, f"{before}{begin}\n{text}{end}{after}")
