"""``msdspn bench``: measure time and memory of a part."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from tyro.conf import Positional

from msdspn_jax._files import as_json
from msdspn_jax._options import parse
from msdspn_jax.errors import UserError


@dataclass(frozen=True)
class Bench:
    """Measure a part of the library on this machine.

    layer: encoder and set decoder (clevr-decoder, random-8x8, random-32x32, numbering, cloud,
    tiny). encoder: the image encoder, side of the images and width (64-32, 64-64, 128-32, 128-64,
    tiny). matching: optimal assignment of up to 128 sets (10, 32, 64, 256, 512, 1024). render:
    scenes to images. step: a whole CLEVR training step, image encoder, inner loop, matching and
    backward, with the share of each (clevr-128 at the published batch of 128, clevr-128-batch-8 for
    machines without an accelerator, tiny). Beside other libraries: see experiments/benchmarks.
    """

    part: Positional[Literal["layer", "encoder", "step", "matching", "render"]]
    """What to measure."""
    case: str | None = None
    """Which case; all of them if left out."""
    json: bool = False
    """One JSON object a case on standard output, and nothing else."""
    repeat: int = 5
    """Timed runs, after one that is not timed."""
    size: int = 128
    """Side of the images that `render` makes; its cases are the qualities of the renderer."""


def main(argv: list[str]) -> int:
    """Run ``msdspn bench``."""
    command = parse(Bench, argv, prog="msdspn bench", description=Bench.__doc__)
    cases, measure = _part(command.part, command.size)
    if command.part == "render" and command.case is None:
        cases = ["default"]
    if command.case is not None and cases and command.case not in cases:
        raise UserError(f"--case: expected one of {', '.join(cases)}, got {command.case!r}.")
    chosen = [case for case in cases if case != "tiny"] if command.case is None else [command.case]
    for case in chosen:
        result = measure(case, command.repeat)
        if command.json:
            print(as_json(result), flush=True)
        else:
            _show(result)
    return 0


def _part(part: str, size: int) -> tuple[list[str], Callable[[str, int], dict[str, Any]]]:
    """The cases of a part, and what measures one."""
    if part == "encoder":
        from msdspn_jax.bench import encoder

        return list(encoder.ENCODER_CASES), encoder.bench_encoder
    if part == "step":
        from msdspn_jax.bench import step

        return list(step.CASES), step.bench_step
    if part == "render":
        from msdspn_jax.bench.render import bench_render
        from msdspn_jax.clevr.render.trace import QUALITIES

        def measure(case: str, repeat: int) -> dict[str, Any]:
            return {"case": case, **bench_render(size, case, repeat=repeat)}

        return list(QUALITIES), measure
    from msdspn_jax.bench import layer

    if part == "layer":
        return list(layer.LAYER_CASES), layer.bench_layer
    return list(layer.MATCHING_CASES), layer.bench_matching


def _show(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{result.get('case')} on {result.get('device')}", show_header=False)
    for key, value in _flat(result):
        table.add_row(key, f"{value:.4g}" if isinstance(value, float) else str(value))
    Console().print(table)


def _flat(result: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows = []
    for key, value in result.items():
        if isinstance(value, dict):
            rows += _flat(value, f"{prefix}{key} ")
        elif key not in ("case", "device"):
            rows.append((prefix + key, value))
    return rows
