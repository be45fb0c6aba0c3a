"""The training loop: from a `Task` and a `TrainConfig` to a run folder."""

from __future__ import annotations

import importlib.util
import shutil
import signal
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from msdspn_jax.errors import UserError, origin
from msdspn_jax.training import run_folder
from msdspn_jax.training.checkpoints import DAMAGED, Checkpoints, is_disk_full
from msdspn_jax.training.config import TrainConfig
from msdspn_jax.training.failures import (
    Standing,
    collected_signals,
    explained,
    memory_explained,
    refusal_of_step,
)
from msdspn_jax.training.logging import Logger, Progress, Window, summarise
from msdspn_jax.training.opening import barrier, cannot_write, must_write_record, take
from msdspn_jax.training.parallel import Chunk, StepRunner, agree
from msdspn_jax.training.state import TrainState, by_seed, replicate_of
from msdspn_jax.training.task import Task, Variables

# A dispatch should return often enough that a signal or the progress line need not wait long.
SECONDS_PER_DISPATCH = 2.0


class Outcome(NamedTuple):
    """How a call of `train` ended.

    Attributes:
        folder: the run folder.
        state: the state at the end, as host arrays.
        metrics: the last validation metrics.
        signal: the signal that ended it early, or None: all steps are done.
    """

    folder: Path
    state: TrainState
    metrics: dict[str, float]
    signal: int | None


def train(task: Task, config: TrainConfig) -> Outcome:
    """Train ``task`` in the run folder ``config.run.dir``; with ``config.run.resume``, go on there.

    Args:
        task: what to train.
        config: how.

    Raises:
        UserError: anything the user can mend: a run folder that cannot be written, is in use or,
            with resume, is not there; a changed configuration, a damaged checkpoint, a full disk
            or memory, data that cannot be read, a loss that is not finite. What was saved before
            stays; a folder made by a run that never did a step goes again.
    """
    if config.run.dir is None:
        raise ValueError("config.run.dir: expected the name of the run folder, got None")
    return _Trainer(task, config, Path(config.run.dir)).run()


class _Trainer:
    """What `train` needs in several places, held together for one call."""

    def __init__(self, task: Task, config: TrainConfig, folder: Path):
        self.task, self.config, self.folder = task, config, folder
        self.leader = jax.process_index() == 0
        self.runner = StepRunner(task, config)
        self.window = Window(config.replicates)
        self.best: float | None = None
        self.metrics: dict[str, float] = {}
        self.step = 0
        self.began = False
        self.last_good: int | None = None
        write_record = must_write_record(folder, task, config)
        self.lock = take(folder)
        try:
            if self.leader:
                # Another writer may have come and gone before the folder was ours.
                write_record = must_write_record(folder, task, config)
            self._open(write_record)
        except OSError as error:
            self._let_go()
            raise cannot_write(folder, error) from error
        except BaseException:
            self._let_go()
            raise

    def _open(self, write_record: bool) -> None:
        """Restore or begin; config.json changes only once all of it went well."""
        task, config, folder = self.task, self.config, self.folder
        self.checkpoints = Checkpoints(
            folder / "checkpoints", keep=config.run.keep_checkpoints, monitor=task.monitor
        )
        barrier("damaged checkpoints set aside at opening")
        with memory_explained(self.config, self._standing):
            state, messages = self._restore() if config.run.resume else (None, [])
            # What is wrong with the data is said before the time that compiling takes.
            self._read_data()
            if state is None:
                state = self.runner.init()
            self.step = int(state.step)
            self.state = self.runner.place(state)
        self.refitted: int | None = None
        self.last_good = self.step if self.checkpoints.steps() else None
        silent = not self.leader
        if write_record and self.leader:
            run_folder.write_config(folder, task, config)
        self.logger = Logger(folder, config, first_step=self.step, silent=silent)
        self.progress = Progress(config, first_step=self.step, silent=silent)
        for message in [*config.remarks(), *messages]:
            self.progress.say(message)

    def _let_go(self) -> None:
        """Leave the folder to others; one that this run made and never used, to nobody."""
        if self.lock is not None and self.lock.made_folder and not self.began:
            shutil.rmtree(self.folder, ignore_errors=True)
        if self.lock is not None:
            self.lock.release()

    def _read_data(self) -> None:
        """Read the task's data set in all processes, or refuse in all."""
        refusal = None
        try:
            self.runner.read_data()
        except UserError as error:
            refusal = error
        except (OSError, ValueError) as error:
            refusal = UserError(f"the data cannot be read: {error}{origin(error)}")
            refusal.__cause__ = error
        refused, _ = agree(int(refusal is not None), 0)
        if refused:
            raise refusal or UserError("another process of this run cannot read its data")
        with explained(self.config, self._standing):
            self.runner.place_data()

    def _restore(self) -> tuple[TrainState | None, list[str]]:
        """The newest state that is kept, if there is one, and what to say of it."""
        messages = [
            f"damaged, set aside in {kept}: {reason}"
            for kept, reason in self.checkpoints.set_aside_at_opening
        ]
        restored = self.checkpoints.read_latest(self.runner.empty_state())
        if restored is None:
            if messages:
                raise UserError("no checkpoint can be read:\n  " + "\n  ".join(messages))
            aside = self.folder / DAMAGED
            if aside.is_dir() and any(aside.iterdir()):
                raise UserError(
                    f"no checkpoint is left but damaged ones, in {aside}: begin another run, or"
                    " remove that folder to begin this one anew"
                )
            if self.leader:
                run_folder.truncate_metrics(self.folder, -1)
            return None, ["nothing to resume: starting at step 0"]
        for path, reason in restored.damaged:
            if self.leader:
                kept = self.checkpoints.set_aside(path)
                messages.append(f"damaged, set aside in {kept}: {reason}")
        barrier("damaged checkpoints set aside")
        self.window.restore(restored.notes["window"])
        self.best = restored.notes["best"]
        # Those of 0.1.0 hold no record; config.json says at least how the run was begun.
        record = restored.notes.get("record") or run_folder.read_record(self.folder)
        messages += [
            f"warning: the numbers may differ in their last bits from here on: {change}"
            for change in run_folder.environment_changes(record)
        ]
        if self.leader:
            run_folder.truncate_metrics(self.folder, restored.step)
        if restored.step < self.config.steps:
            messages.append(f"resuming at step {restored.step}")
        else:
            messages.append(
                f"finished: all {restored.step} steps are done; to train longer: --steps N"
                " --allow-config-change"
            )
        return restored.state, messages

    # --- the loop ---

    def run(self) -> Outcome:
        with ExitStack() as at_the_end:
            # The last first, and each whatever becomes of the others. What is being saved in the
            # background must reach the disk before the process ends.
            at_the_end.callback(self._let_go)
            at_the_end.callback(self.checkpoints.settle)
            at_the_end.callback(self.logger.close)
            at_the_end.callback(self.progress.close)
            with collected_signals() as received, explained(self.config, self._standing):
                caught = self._steps(received)
                if self.step == 0 and caught is None:  # --steps 0
                    self._save(self._evaluate())
                self.checkpoints.wait()
                if caught is None and self.leader:
                    self._draw_all()
            self.began = True
        return Outcome(self.folder, self.runner.fetch(self.state), self.metrics, caught)

    def _steps(self, received: list[int]) -> int | None:
        """Train to the end (returns None) or to a signal (returns it, with everything saved)."""
        config = self.config
        compiled: set[Any] = set()
        pace = np.inf
        while self.step < config.steps:
            stage = self.task.stage(self.step)
            fresh = stage not in compiled
            count = 1 if fresh else max(1, int(SECONDS_PER_DISPATCH / pace))
            caught, count = agree(received[-1] if received else 0, count)
            if caught:
                self._save(None, wait=True)
                self.progress.say(
                    f"{signal.Signals(caught).name}: saved at step {self.step}; go on with --resume"
                )
                return caught
            count = min(count, self._steps_to_boundary(), config.devices.steps_per_dispatch)
            started = time.monotonic()
            batches = self.runner.load(self.step, count)
            chunk = self.runner.run(self.state, self.step, count, batches)
            self.state = chunk.state
            if fresh:
                compiled.add(stage)
                self.progress.leave_out(time.monotonic() - started, steps=chunk.done)
            else:
                self.window.took(time.monotonic() - started, chunk.done)
            self._account(chunk)
            pace = max((time.monotonic() - started) / chunk.done, 1e-6)
            self._at_boundary()
        return None

    def _steps_to_boundary(self) -> int:
        """Steps until something other than a step is due, or the stage changes."""
        config, step = self.config, self.step
        every = [config.run.log_every, config.run.evaluate_every, config.run.checkpoint_every]
        if config.run.figures_every:
            every.append(config.run.figures_every)
        count = min([config.steps - step] + [n - step % n for n in every])
        stage = self.task.stage(step)
        for ahead in range(1, min(count, config.devices.steps_per_dispatch)):
            if self.task.stage(step + ahead) != stage:
                return ahead
        return count

    def _account(self, chunk: Chunk) -> None:
        """Take in a chunk's metrics; stop if a step was refused that may not be skipped."""
        self.began = True
        self.window.add(chunk.metrics, chunk.status)
        first, self.step = self.step, self.step + chunk.done
        bad = np.flatnonzero(chunk.status.any(axis=1))
        if len(bad):
            skipped = int(np.max(self.runner.fetch(self.state).skipped))
            for i in bad:
                metrics = {k: v[i] for k, v in chunk.metrics.items()}
                reason = refusal_of_step(chunk.status[i], metrics, self.config)
                if i == chunk.done - 1 and skipped > self.config.safety.skip_bad_steps:
                    raise UserError(
                        f"step {first + i}: {reason} {self._standing().saved} A smaller"
                        " --learning-rate or inner step size may help; --skip-bad-steps N leaves"
                        " single bad batches out."
                    )
                self.progress.say(f"step {first + i}: {reason} Left out.")
        last = {k: float(v[-1].mean()) for k, v in chunk.metrics.items()}
        self.progress.update(self.step, last)

    def _standing(self) -> Standing:
        if self.last_good is None:
            saved = "No checkpoint was saved before."
        else:
            kept = self.folder / "checkpoints" / str(self.last_good)
            saved = f"The last good checkpoint is that of step {self.last_good} ({kept})."
        return Standing(self.folder, self.step, saved)

    def _at_boundary(self) -> None:
        config, step = self.config, self.step
        last = step == config.steps
        if step % config.run.log_every == 0 or last:
            values = self.window.summary()
            if values:
                values["steps_per_second"] = self.window.rate()
                self.logger.metrics(step, "train", values)
            self.window = Window(config.replicates)
        evaluated = None
        if step % config.run.evaluate_every == 0 or last:
            evaluated = self._evaluate()
        improved = evaluated is not None and self._improves(evaluated)
        if step % config.run.checkpoint_every == 0 or last or improved:
            self._save(evaluated)
        if (config.run.figures_every and step % config.run.figures_every == 0) and not last:
            self._draw()

    def _variables(self) -> list[Variables]:
        state, count = self.runner.fetch(self.state), self.config.replicates
        device = jax.local_devices()[0]
        return [
            jax.device_put(replicate_of(state, count, r).variables_to_keep, device)
            for r in range(count)
        ]

    def _refit(self) -> None:
        """Before averaged weights are evaluated or saved; once a step."""
        if self.refitted != self.step:
            self.state = self.runner.refit(self.state, self.step)
            self.refitted = self.step

    def _evaluate(self) -> dict[str, float]:
        self._refit()
        started, first = time.monotonic(), not self.metrics
        try:
            scores = by_seed(self.task, self.step, self._variables(), "val", self.config.seed)
        except OSError as error:
            raise UserError(
                f"step {self.step}: validation failed: {error}\n{self._standing().saved}"
            ) from error
        name = self.task.monitor[0]
        if name not in scores:
            raise UserError(
                f"monitor: expected a metric that evaluate returns, {', '.join(scores)}, got {name}"
            )
        for taken in {"step", "split"} & scores.keys():
            raise UserError(f"evaluate: expected no metric called {taken!r}, a field of the log")
        values = summarise(scores)
        self.metrics = values
        self.logger.metrics(self.step, "val", values)
        self.progress.evaluated(self.step, "val", values)
        if first:
            self.progress.leave_out(time.monotonic() - started)
        return values

    def _improves(self, values: dict[str, float]) -> bool:
        name, mode = self.task.monitor
        value = values[name]
        if not np.isfinite(value):
            return False
        better = self.best is None or (value < self.best if mode == "min" else value > self.best)
        if better:
            self.best = value
        return better

    def _save(self, metrics: dict[str, float] | None, wait: bool = False) -> None:
        self._refit()
        state = self.runner.fetch(self.state)
        self.logger.flush()
        if metrics is not None and not np.isfinite(metrics.get(self.task.monitor[0], np.nan)):
            metrics = None
        record = run_folder.record_of(self.task, self.config)
        notes = {"window": self.window.record(), "best": self.best, "record": record}
        self.began = True
        self.checkpoints.save(state, self.step, notes, metrics)
        self.last_good = self.step
        if wait:
            self.checkpoints.wait()

    def _draw(self) -> None:
        if self.task.figures is None or not self.leader:
            return
        folder = self.folder / "figures"
        folder.mkdir(exist_ok=True)
        try:
            self.task.figures(self._variables()[0], folder)
        except Exception as error:  # A picture is no reason to lose a training.
            if is_disk_full(error):
                raise
            self.progress.say(f"no figures at step {self.step}: {type(error).__name__}: {error}")
        self.logger.images(self.step, folder)

    def _draw_all(self) -> None:
        if importlib.util.find_spec("matplotlib") is None:
            self.progress.say("no figures: matplotlib is not installed")
            return
        from msdspn_jax import plots

        self._draw()
        (self.folder / "figures").mkdir(exist_ok=True)
        plots.save(
            plots.training_curves(run_folder.read_metrics(self.folder)),
            self.folder / "figures" / "curves.png",
        )
