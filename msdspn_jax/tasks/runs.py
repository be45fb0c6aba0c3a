"""What a report asks about the runs that it collects."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol, runtime_checkable

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
