"""``msdspn evaluate RUN``: score a trained run."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from msdspn_jax._options import parse
from msdspn_jax.errors import EmptySplit, UserError, origin

if TYPE_CHECKING:
    from msdspn_jax.trained.run import Run
    from msdspn_jax.training.task import Task

NAMES_AT_EVALUATION = {"num_steps": "eval_num_steps", "num_starts": "eval_num_starts"}


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """Decode with other settings than the run's own. Its scores go into decodings.json instead, a
    record for each set of flags, and no figures are drawn.
    """

    num_steps: int | None = None
    """Inner steps."""
    num_starts: int | None = None
    """Initial sets to descend from; the set of the lowest energy counts."""
    step_size: float | None = None
    """Step size."""
    momentum: float | None = None
    """Nesterov momentum."""

    def given(self) -> dict[str, float]:
        """The settings that are not None."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Score a run's best checkpoint on its validation and test splits, and draw its figures.

    Keeps the scores in the run's evaluation.json, and changes nothing that training writes: it may
    be used while training goes on.

        msdspn evaluate RUN
        msdspn evaluate RUN --split val --inner.num-steps 80 --inner.num-starts 4
    """

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """The run folder."""
    checkpoint: str = "best"
    """best (by validation), latest, or a step."""
    split: tuple[str, ...] = ()
    """Which splits. Default: val and test, where the data has them."""
    figures: bool = True
    """Draw the task's figures into RUN/figures/."""
    compilation_cache: bool = True
    """Keep compiled programs between runs, as in msdspn train."""
    inner: Decoding = Decoding()


def main(argv: list[str]) -> int:
    """Run the verb; returns the exit code."""
    options = parse(Evaluate, argv, prog="msdspn evaluate")
    folder = Path(options.run)
    evaluate(folder, options)
    return 0


def evaluate(folder: Path, options: Evaluate) -> dict[str, dict[str, float]]:
    """Metrics by split, written into the run folder and shown."""
    from msdspn_jax._cache import enable_compilation_cache
    from msdspn_jax._files import as_user_error
    from msdspn_jax.trained.run import checkpoint_named, load_run
    from msdspn_jax.training.failures import out_of_memory
    from msdspn_jax.training.logging import summarise
    from msdspn_jax.training.run_folder import write_decoding, write_evaluation
    from msdspn_jax.training.state import by_seed

    checkpoint, decoding = checkpoint_named(options.checkpoint), options.inner.given()
    if options.compilation_cache:
        enable_compilation_cache()
    run = load_run(folder, checkpoint=checkpoint)
    for reason in run.damaged:
        print(f"left out: {reason}", file=sys.stderr)
    task = _decoding_otherwise(run, decoding) if decoding else run.task
    # By split and metric, one number per seed.
    scores: dict[str, dict[str, list[float]]] = {}
    for split in options.split or ("val", "test"):
        try:
            # With the inner steps of the end, as one predicts, also for an earlier checkpoint.
            scores[split] = by_seed(task, run.config.steps, run.variables, split, run.config.seed)
        except EmptySplit as error:
            if options.split:
                raise
            print(f"left out: {error}", file=sys.stderr)
        except UserError:
            raise
        except (ValueError, OSError) as error:
            raise UserError(f"{error}{origin(error)}") from error
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            first = (str(error).strip() or "MemoryError").splitlines()[0][:200]
            raise UserError(f"out of memory: {first}") from error
    found = {split: summarise(of) for split, of in scores.items()}
    # Before anything that may fail: to score takes long.
    _show(folder, run.step, found, len(run.variables))
    with as_user_error(folder / ("decodings.json" if decoding else "evaluation.json")):
        if decoding:
            write_decoding(folder, run.step, decoding, scores)
        else:
            write_evaluation(folder, run.step, options.checkpoint, found)
    if options.figures and not decoding and run.task.figures is not None:
        (folder / "figures").mkdir(exist_ok=True)
        run.task.figures(run.variables[0], folder / "figures")
    return found


def _decoding_otherwise(run: Run, decoding: dict[str, float]) -> Task:
    """The run's task, with other settings of the inner minimisation at evaluation."""
    from msdspn_jax import tasks
    from msdspn_jax.tasks.config import TaskConfig

    config, first = run.config, next(iter(decoding)).replace("_", "-")
    if not isinstance(config, TaskConfig):
        raise UserError(
            f"--inner.{first}: expected a task whose Config is derived from"
            f" msdspn_jax.tasks.config.TaskConfig, got {run.task_name}"
        )
    if not config.minimises:
        raise UserError(f"--inner.{first}: the model {config.model} has no inner loop")
    changes = {NAMES_AT_EVALUATION.get(name, name): value for name, value in decoding.items()}
    try:
        inner = dataclasses.replace(config.resolved_inner(), **changes)
    except ValueError as error:
        raise UserError(f"--inner.{str(error).removeprefix('eval_').replace('_', '-')}") from None
    return tasks.build(run.task_name, dataclasses.replace(config, inner=inner))


def _show(folder: Path, step: int, found: dict[str, dict[str, float]], replicates: int) -> None:
    from rich.console import Console

    from msdspn_jax.commands.show import metrics_table

    console = Console()
    seeds = f", {replicates} seeds" if replicates > 1 else ""
    console.print(metrics_table(found, title=f"{folder}, step {step}{seeds}"))
    if (folder / "figures").is_dir():
        figures = f"figures: {folder / 'figures'}"
        console.print(figures, markup=False, highlight=False, soft_wrap=True)
