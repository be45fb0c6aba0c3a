"""What a report asks about the runs that it collects."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from msdspn_jax.training.config import TrainConfig


@runtime_checkable
class Runs(Protocol):
    """Reads runs back, as the module `msdspn_jax.trained.run` does; handed to every ``report``."""

    def read_config(self, folder: str | Path) -> tuple[str, TrainConfig]:
        """Task name and configuration of a run."""
        ...

    def load_run(self, folder: str | Path) -> Any:
        """Configuration, task, variables of every replicate and step of the best checkpoint."""
        ...


def more_steps(folders: Sequence[Path], weights: Sequence[float]) -> dict[str, float]:
    """Mean score of runs by number of inner steps at evaluation, where all of them have it.

    From their inner_steps.json, which experiments/more_steps.py writes.
    """
    tried = [folder / "inner_steps.json" for folder in folders]
    if not all(path.exists() for path in tried):
        return {}
    scores = [json.loads(path.read_text()) for path in tried]
    common = [steps for steps in scores[0] if all(steps in of for of in scores)]
    return {
        steps: float(np.average([of[steps] for of in scores], weights=weights)) for steps in common
    }
