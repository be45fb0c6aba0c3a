"""The results of `day.py` as Markdown: ``python table.py [RESULTS]``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

HEADINGS = {"part": "part", "status": "ended", "seconds": "seconds", "error": "why"}


def last_line(path: Path) -> dict[str, Any] | None:
    """How a part ended the last time; None if it never did. A torn line is left out."""
    if not path.exists():
        return None
    found = None
    for text in path.read_text().splitlines():
        try:
            found = json.loads(text)
        except ValueError:
            continue
    return found


def last_lines(results: Path) -> list[dict[str, Any]]:
    """The last line of every part, in the order in which they ended."""
    found = [last_line(path) for path in sorted(results.glob("*.jsonl"))]
    return sorted((line for line in found if line), key=lambda line: line["date"])


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, its keys joined by slashes."""
    if not isinstance(value, dict):
        return {prefix.rstrip("/"): value}
    return {k: x for key, inner in value.items() for k, x in flat(inner, f"{prefix}{key}/").items()}


def shown(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return ", ".join(map(shown, value)) if isinstance(value, list) else str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def grid(rows: list[list[Any]], *headings: str) -> list[str]:
    lines = ["| " + " | ".join(headings) + " |", "|---" * len(headings) + "|"]
    return [*lines, *("| " + " | ".join(map(shown, row)) + " |" for row in rows), ""]


def layer_rows(by_part: dict[str, dict]) -> list[list[Any]]:
    """Our layers beside PyTorch's: milliseconds, and theirs as multiples of ours."""
    rows = []
    for part, line in by_part.items():
        if not part.startswith("layer-") or line["status"] != "done":
            continue
        case = part.removeprefix("layer-")
        torch = by_part.get(f"torch-{case}", {}).get("result") or {}
        for kind, ours in line["result"].items():
            row: list[Any] = [case, kind]
            for what in ("forward_seconds", "training_step_seconds"):
                row.append(1e3 * ours[what])
                for peer in ("torch", "torch-compiled"):
                    theirs = torch.get(f"{peer}/{kind}") or {}
                    row.append(theirs[what] / ours[what] if what in theirs else "")
            rows.append(row)
    return rows


def page(results: Path) -> str:
    """The whole page."""
    lines = last_lines(results)
    if not lines:
        return "Nothing has run.\n"
    by_part = {line["part"]: line for line in lines}
    devices = sorted({line["device"] for line in lines if "device" in line})
    out = [f"Devices: {', '.join(devices) or 'none yet'}.", ""]
    if any(line.get("rehearsal") for line in lines):
        out += ["**A rehearsal at tiny sizes: the numbers mean nothing.**", ""]
    attempts = [[line["part"], line["status"], line["seconds"],
                 " ".join(line.get("error", "").split())[-160:].replace("|", "/")]
                for line in lines]  # fmt: skip
    out += ["## Parts", "", *grid(attempts, *HEADINGS.values())]
    rows = layer_rows(by_part)
    if rows:
        who = ("ours, ms", "PyTorch, times ours", "compiled, times ours")
        kinds = [f"{what}: {whose}" for what in ("forward", "training step") for whose in who]
        out += ["## Layers beside PyTorch", "", *grid(rows, "case", "precision", *kinds)]
    for line in lines:
        if line["status"] in ("done", "stopped") and "result" in line:
            values = [[key, value] for key, value in flat(line["result"]).items()]
            out += [f"## {line['part']}", "", *grid(values, "what", "value")]
    return "\n".join(out)


if __name__ == "__main__":
    print(page(Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).parent / "results"), end="")
