"""Where a run's numbers go: metrics.jsonl, TensorBoard, Weights & Biases, the terminal."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from msdspn_jax._progress import ProgressBar
from msdspn_jax.training.config import TrainConfig

# Shown on the progress line, if a task reports them.
SHOWN = {
    "accuracy": "accuracy",
    "macro_accuracy": "macro accuracy",
    "ap_0.125": "AP0.125",
    "ap_0.5": "AP0.5",
    "inner_gradient_norm": "inner gradient",
    "inner_steps": "inner steps",
}


def summarise(values: Mapping[str, Iterable[float]]) -> dict[str, float]:
    """Mean over replicates under the plain name; sample standard deviation as ``name_std``."""
    summary = {}
    for name, per_replicate in values.items():
        numbers = np.asarray(list(per_replicate), np.float64)
        summary[name] = float(numbers.mean())
        if len(numbers) > 1:
            summary[f"{name}_std"] = float(numbers.std(ddof=1))
    return summary


class Window:
    """Sums of the training metrics since the last line in metrics.jsonl."""

    def __init__(self, replicates: int):
        self.replicates = replicates
        self.count = np.zeros(replicates, np.int64)
        self.sums: dict[str, np.ndarray] = {}
        self.seconds, self.steps_timed = 0.0, 0

    def took(self, seconds: float, steps: int) -> None:
        """How long steps took, those left out that were compiled for."""
        self.seconds += seconds
        self.steps_timed += steps

    def rate(self) -> float:
        """Steps a second, evaluation and checkpoints aside; NaN where none was timed."""
        return self.steps_timed / self.seconds if self.seconds > 0 else float("nan")

    def add(self, metrics: dict[str, np.ndarray], status: np.ndarray) -> None:
        # Step by step, not chunk by chunk: sums must not depend on where chunks end.
        for i, good in enumerate(status == 0):
            self.count += good
            for name, values in metrics.items():
                total = self.sums.setdefault(name, np.zeros(self.replicates))
                total += np.where(good, values[i], 0.0)

    def summary(self) -> dict[str, float]:
        if not self.count.any():
            return {}
        # Of the seeds that had a good step.
        had = self.count > 0
        return summarise({k: v[had] / self.count[had] for k, v in self.sums.items()})

    def record(self) -> dict[str, Any]:
        return {
            "count": self.count.tolist(),
            "sums": {k: v.tolist() for k, v in self.sums.items()},
        }

    def restore(self, record: dict[str, Any]) -> None:
        self.count = np.array(record["count"], np.int64)
        self.sums = {k: np.array(v) for k, v in record["sums"].items()}


class Logger:
    """Writes a run's metrics everywhere; only process 0 has one that is not silent."""

    def __init__(self, folder: Path, config: TrainConfig, *, first_step: int, silent: bool = False):
        self.folder, self.config, self.silent = folder, config, silent
        self._tensorboard = self._wandb = self._file = None
        if silent:
            return
        if config.run.wandb:
            import wandb

            self._wandb = wandb.init(
                project="msdspn-jax",
                name=folder.name,
                id=_wandb_id(folder),
                dir=str(folder),
                config=config.to_dict(),
                resume="allow",
            )
        self._file = (folder / "metrics.jsonl").open("a")
        if config.run.tensorboard:
            from tensorboardX import SummaryWriter

            # purge_step: what an interrupted run logged after its last checkpoint disappears.
            purge_step = first_step + 1 if first_step else None
            self._tensorboard = SummaryWriter(str(folder), purge_step=purge_step, flush_secs=10)

    def metrics(self, step: int, split: str, values: dict[str, float]) -> None:
        """One line of metrics.jsonl, and the scalars of TensorBoard and Weights & Biases."""
        if self._file is None:
            return
        line = {"step": step, "split": split} | {
            # JSON has no NaN; null is what readers of the file can parse.
            k: v if np.isfinite(v) else None
            for k, v in sorted(values.items(), key=lambda item: item[0] not in ("loss", "loss_std"))
        }
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        if self._tensorboard is not None:
            # Numbers only: of others it warns, at each, as if training had gone wrong.
            for name, value in values.items():
                if not np.isfinite(value):
                    continue
                self._tensorboard.add_scalar(f"{split}/{name}", value, step)
        if self._wandb is not None:
            self._wandb.log({f"{split}/{k}": v for k, v in values.items()} | {"step": step})

    def images(self, step: int, folder: Path) -> None:
        """Show the pictures ``folder/*.png`` in TensorBoard (and Weights & Biases)."""
        if self._tensorboard is None and self._wandb is None:
            return
        from PIL import Image

        for path in sorted(folder.glob("*.png")):
            with Image.open(path) as picture:
                pixels = np.asarray(picture.convert("RGB"))
            if self._tensorboard is not None:
                self._tensorboard.add_image(path.stem, pixels, step, dataformats="HWC")
            if self._wandb is not None:
                import wandb

                self._wandb.log({path.stem: wandb.Image(pixels), "step": step})

    def flush(self) -> None:
        """Bring everything to disk, so that no checkpoint is newer than its history."""
        if self._file is not None:
            os.fsync(self._file.fileno())
        if self._tensorboard is not None:
            self._tensorboard.flush()

    def close(self) -> None:
        """Flush and close."""
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._file is not None:
            self._file.close()
        if self._wandb is not None:
            self._wandb.finish()


def _wandb_id(folder: Path) -> str:
    # The same run folder continues the same W&B run.
    import zlib

    return f"{folder.name}-{zlib.crc32(str(folder.absolute()).encode()):08x}"


class Progress:
    """The live line of a run on a terminal; elsewhere, a plain line now and then."""

    def __init__(self, config: TrainConfig, *, first_step: int, silent: bool = False):
        self.config = config
        self._silent = silent
        self._start, self._first = time.monotonic(), first_step
        self._left_out, self._steps_left_out = 0.0, 0
        self._last_line = time.monotonic()
        self._bar = ProgressBar(transient=True)
        if config.run.progress and not silent:
            self._bar(first_step, config.steps, "compiling …")
            if not self._bar.live and first_step < config.steps:
                print("compiling the first step …", file=sys.stderr, flush=True)

    def rate(self, step: int) -> float:
        """Steps per second since the run began, without what was left out; 0 if nothing is left."""
        steps = step - self._first - self._steps_left_out
        return steps / max(time.monotonic() - self._start - self._left_out, 1e-9)

    def leave_out(self, seconds: float, steps: int = 0) -> None:
        """Do not count the last seconds, nor the steps done in them: they went into compiling."""
        self._left_out += seconds
        self._steps_left_out += steps
        self._bar.restart_clock()

    def update(self, step: int, values: dict[str, float]) -> None:
        """Show where training is; ``values`` as in a metrics line."""
        if self._silent or not self.config.run.progress:
            return
        shown, rate = _shown(values), f"{self.rate(step):.3g} steps/s" if self.rate(step) else ""
        self._bar(step, self.config.steps, f"{shown}  {rate}")
        if not self._bar.live and time.monotonic() - self._last_line > 15:
            self._last_line = time.monotonic()
            if rate:
                rate += f"  {_clock((self.config.steps - step) / self.rate(step))} left"
            print(
                f"step {step}/{self.config.steps}  {shown}  {rate}".rstrip(),
                file=sys.stderr,
                flush=True,
            )

    def say(self, text: str) -> None:
        """A line that stays, without --progress too: something the user must know."""
        if not self._silent:
            self._bar.say(text)

    def evaluated(self, step: int, split: str, values: dict[str, float]) -> None:
        """A line about an evaluation."""
        if self.config.run.progress:
            self.say(f"step {step}/{self.config.steps}  {split}: {_shown(values)}")

    def close(self) -> None:
        """Leave the terminal as it was."""
        self._bar.close()


def _shown(values: dict[str, Any]) -> str:
    parts = [f"loss {values['loss']:.4g}"] if "loss" in values else []
    if "loss_std" in values:
        parts[-1] += f" ± {values['loss_std']:.2g}"
    parts += [f"{label} {values[name]:.3g}" for name, label in SHOWN.items() if name in values]
    return "  ".join(parts)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
