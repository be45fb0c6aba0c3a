"""``msdspn evaluate RUN``: score a trained run."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from msdspn_jax.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Score a run's best checkpoint on its validation and test splits, and draw its figures.

    Adds the test line to the run's metrics.jsonl and writes evaluation.json.
    """

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """The run folder."""
    checkpoint: str = "best"
    """best (by validation), latest, or a step."""
    split: tuple[str, ...] = ("val", "test")
    """Which splits."""
    figures: bool = True
    """Draw the task's figures into RUN/figures/."""
    compilation_cache: bool = True
    """Keep compiled programs between runs, as in msdspn train."""


def main(argv: list[str]) -> int:
    """Run the verb; returns the exit code."""
    options = tyro.cli(Evaluate, prog="msdspn evaluate", args=argv)
    folder = Path(options.run)
    evaluate(folder, options)
    return 0


def evaluate(folder: Path, options: Evaluate) -> dict[str, dict[str, float]]:
    """Metrics by split, written into the run folder and shown."""
    from msdspn_jax._cache import enable_compilation_cache
    from msdspn_jax._files import write_text
    from msdspn_jax.trained.run import checkpoint_named, load_run
    from msdspn_jax.training.logging import summarise
    from msdspn_jax.training.run_folder import append_metrics
    from msdspn_jax.training.state import run_keys

    checkpoint = checkpoint_named(options.checkpoint)
    if options.compilation_cache:
        enable_compilation_cache()
    run = load_run(folder, checkpoint=checkpoint)
    found: dict[str, dict[str, float]] = {}
    for split in options.split:
        try:
            results = [
                run.task.evaluate(variables, split, run_keys(run.config.seed + r).evaluation)
                for r, variables in enumerate(run.variables)
            ]
        except ValueError as error:
            raise UserError(str(error)) from error
        found[split] = summarise({k: [float(x[k]) for x in results] for k in results[0]})
        if split not in ("train", "val"):
            append_metrics(folder, run.step, split, found[split])
    record = {"step": run.step, "checkpoint": options.checkpoint, "metrics": found}
    write_text(folder / "evaluation.json", json.dumps(record, indent=2) + "\n")
    if options.figures and run.task.figures is not None:
        (folder / "figures").mkdir(exist_ok=True)
        run.task.figures(run.variables[0], folder / "figures")
    _show(folder, run.step, found, len(run.variables))
    return found


def _show(folder: Path, step: int, found: dict[str, dict[str, float]], replicates: int) -> None:
    from rich.console import Console

    from msdspn_jax.commands.show import metrics_table

    console = Console()
    seeds = f", {replicates} seeds" if replicates > 1 else ""
    console.print(metrics_table(found, title=f"{folder}, step {step}{seeds}"))
    if (folder / "figures").is_dir():
        console.print(f"figures: {folder / 'figures'}", highlight=False, soft_wrap=True)
