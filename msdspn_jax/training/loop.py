"""The training loop: from a `Task` and a `TrainConfig` to a run folder."""

from __future__ import annotations

import importlib.util
import re
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from msdspn_jax.errors import UserError
from msdspn_jax.training import run_folder
from msdspn_jax.training.checkpoints import Checkpoints, is_disk_full
from msdspn_jax.training.config import TrainConfig
from msdspn_jax.training.lock import Lock
from msdspn_jax.training.logging import Logger, Progress, summarise
from msdspn_jax.training.parallel import Chunk, StepRunner, agree
from msdspn_jax.training.state import (
    GRADIENT_NOT_FINITE,
    INNER_ENERGY_EXPLODED,
    LOSS_NOT_FINITE,
    TrainState,
    replicate_of,
    run_keys,
)
from msdspn_jax.training.supervise import GO_ON
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


def train(task: Task, config: TrainConfig, *, saved: TrainConfig | None = None) -> Outcome:
    """Train ``task`` in the run folder ``config.run.dir``; with ``config.run.resume``, go on there.

    Args:
        task: what to train.
        config: how.
        saved: the configuration that the run folder was begun with, for who has read it already.
            Default: what its config.json makes of the type of ``config``.

    Raises:
        UserError: anything the user can mend: a run folder that cannot be written, is in use or,
            with resume, is not there; a changed configuration, a damaged checkpoint, a full disk
            or memory, data that cannot be read, a loss that is not finite. What was saved before
            stays; a folder made by a run that never did a step goes again.
    """
    if config.run.dir is None:
        raise ValueError("config.run.dir: expected the name of the run folder, got None")
    return _Trainer(task, config, Path(config.run.dir), saved).run()


class _Trainer:
    """What `train` needs in several places, held together for one call."""

    def __init__(
        self, task: Task, config: TrainConfig, folder: Path, saved: TrainConfig | None = None
    ):
        self.task, self.config, self.folder = task, config, folder
        self.leader = jax.process_index() == 0
        self.runner = StepRunner(task, config)
        self.window = _Window(config.replicates)
        self.best: float | None = None
        self.metrics: dict[str, float] = {}
        self.step = 0
        self.began = False
        write_record = _must_write_record(folder, task, config, saved)
        self.lock = _take(folder, self.leader)
        try:
            if self.leader:
                # Another writer may have come and gone before the folder was ours.
                write_record = _must_write_record(folder, task, config, saved)
            self._open(write_record)
        except OSError as error:
            self._let_go()
            raise _cannot_write(folder, error) from error
        except BaseException:
            self._let_go()
            raise

    def _open(self, write_record: bool) -> None:
        """Restore or begin; config.json changes only once all of it went well."""
        task, config, folder = self.task, self.config, self.folder
        self.checkpoints = Checkpoints(
            folder / "checkpoints", keep=config.run.keep_checkpoints, monitor=task.monitor
        )
        _barrier("damaged checkpoints set aside at opening")
        with _memory_explained(self):
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
        for message in messages:
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
            refusal = UserError(f"the data cannot be read: {error}")
            refusal.__cause__ = error
        refused, _ = agree(int(refusal is not None), 0)
        if refused:
            raise refusal or UserError("another process of this run cannot read its data")
        with _explained(self):
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
            if self.leader:
                run_folder.truncate_metrics(self.folder, -1)
            return None, ["nothing to resume: starting at step 0"]
        for path, reason in restored.damaged:
            if self.leader:
                kept = self.checkpoints.set_aside(path)
                messages.append(f"damaged, set aside in {kept}: {reason}")
        _barrier("damaged checkpoints set aside")
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
        try:
            with _signals() as received, _explained(self):
                caught = self._steps(received)
                if caught is None:
                    self._finish()
                self.checkpoints.wait()
            self.began = True
        finally:
            self.progress.close()
            self.logger.close()
            self.checkpoints.settle()
            self._let_go()
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
            try:
                batches = self.runner.load(self.step, count)
            except (OSError, ValueError) as error:
                raise UserError(
                    f"step {self.step}: the data cannot be read: {error}\n{self._advice_saved()}"
                ) from error
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
                reason = _reason(chunk.status[i], metrics, self.config)
                if i == chunk.done - 1 and skipped > self.config.safety.skip_bad_steps:
                    raise UserError(f"step {first + i}: {reason} {self._advice()}")
                self.progress.say(f"step {first + i}: {reason} Left out.")
        last = {k: float(v[-1].mean()) for k, v in chunk.metrics.items()}
        self.progress.update(self.step, last)

    def _advice_saved(self) -> str:
        if self.last_good is None:
            return "No checkpoint was saved before."
        return (
            "The last good checkpoint is that of step"
            f" {self.last_good} ({self.folder / 'checkpoints' / str(self.last_good)})."
        )

    def _advice(self) -> str:
        return (
            f"{self._advice_saved()} A smaller --learning-rate or inner step size may help;"
            " --skip-bad-steps N leaves single bad batches out."
        )

    def _at_boundary(self) -> None:
        config, step = self.config, self.step
        last = step == config.steps
        if step % config.run.log_every == 0 or last:
            values = self.window.summary()
            if values:
                values["steps_per_second"] = self.window.rate()
                self.logger.metrics(step, "train", values)
            self.window = _Window(config.replicates)
        evaluated = None
        if step % config.run.evaluate_every == 0 or last:
            evaluated = self._evaluate()
        if (config.run.figures_every and step % config.run.figures_every == 0) and not last:
            self._draw()
        improved = evaluated is not None and self._improves(evaluated)
        if step % config.run.checkpoint_every == 0 or last or improved:
            self._save(evaluated)

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
        results = [
            self.task.evaluate_at(
                self.step, variables, "val", run_keys(self.config.seed + r).evaluation
            )
            for r, variables in enumerate(self._variables())
        ]
        values = summarise({k: [float(x[k]) for x in results] for k in results[0]})
        self.metrics = values
        self.logger.metrics(self.step, "val", values)
        self.progress.evaluated(self.step, "val", values)
        if first:
            self.progress.leave_out(time.monotonic() - started)
        return values

    def _improves(self, values: dict[str, float]) -> bool:
        name, mode = self.task.monitor
        value = values.get(name)
        if value is None or not np.isfinite(value):
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
        self.task.figures(self._variables()[0], folder)
        self.logger.images(self.step, folder)

    def _finish(self) -> None:
        if self.step == 0:  # --steps 0
            self._save(self._evaluate())
        self.checkpoints.wait()
        if self.leader:
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


class _Window:
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
        with np.errstate(invalid="ignore"):
            return summarise({k: v / self.count for k, v in self.sums.items()})

    def record(self) -> dict[str, Any]:
        return {
            "count": self.count.tolist(),
            "sums": {k: v.tolist() for k, v in self.sums.items()},
        }

    def restore(self, record: dict[str, Any]) -> None:
        self.count = np.array(record["count"], np.int64)
        self.sums = {k: np.array(v) for k, v in record["sums"].items()}


def _reason(status: np.ndarray, metrics: dict[str, np.ndarray], config: TrainConfig) -> str:
    """Why a step was refused, in words; ``status`` and metrics of one step, per replicate."""
    replicate = int(np.flatnonzero(status)[0])
    code = int(status[replicate])
    if code & LOSS_NOT_FINITE:
        what = f"the loss is not finite ({metrics['loss'][replicate]})"
    elif code & INNER_ENERGY_EXPLODED:
        what = (
            f"the inner minimisation diverges: energy {metrics['inner_energy'][replicate]:.3g} is"
            f" above --max-inner-energy {config.safety.max_inner_energy:.3g}"
        )
    else:
        assert code & GRADIENT_NOT_FINITE
        what = f"the gradient is not finite (loss {metrics['loss'][replicate]:.4g})"
    return what + (f" in replicate {replicate}." if config.replicates > 1 else ".")


def _must_write_record(
    folder: Path, task: Task, config: TrainConfig, saved: TrainConfig | None
) -> bool:
    """Check that a run may be begun or gone on with; whether its config.json must change."""
    if not run_folder.is_run(folder):
        if config.run.resume is True:
            run_folder.require_run(folder)
        return True
    if not config.run.resume:
        raise UserError(
            f"{folder} holds a run already; go on with it by --resume, or choose another --run-dir"
        )
    name = run_folder.read_record(folder)["task"]
    if name != task.name:
        raise UserError(f"{folder} is a run of {name}, not of {task.name}")
    saved = saved or run_folder.read_config(folder, type(config))
    difference = run_folder.config_difference(saved, config)
    if difference and not config.run.allow_config_change:
        raise UserError(
            f"the flags differ from those {folder} was begun with:\n  "
            + "\n  ".join(difference)
            + "\nUse the same flags, or --allow-config-change to go on with these."
        )
    return bool(difference) or not (folder / "config.json").exists()


def _take(folder: Path, leader: bool) -> Lock | None:
    """The right to write in the folder, which process 0 takes for all."""
    _barrier("looked at the run folder")
    lock, refusal = None, None
    if leader:
        try:
            lock = Lock(folder)
        except UserError as error:
            refusal = error
        except OSError as error:
            refusal = _cannot_write(folder, error)
    refused, _ = agree(int(refusal is not None), 0)
    if refused:
        raise refusal or UserError(f"process 0 cannot write to the run folder {folder}")
    return lock


def _cannot_write(folder: Path, error: OSError) -> UserError:
    return UserError(
        f"cannot write to the run folder {folder}: {error.strerror or error}."
        " Choose another with --run-dir."
    )


def _barrier(name: str) -> None:
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect SIGTERM and the first SIGINT instead of dying of them; a second SIGINT interrupts."""
    received: list[int] = []
    previous: dict[int, Any] = {}

    def remember(number, frame):
        del frame
        received.append(number)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, previous[signal.SIGINT])

    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            previous[number] = signal.signal(number, remember)
    except ValueError:
        pass  # not the main thread: someone else handles signals
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def _memory_explained(trainer: _Trainer) -> Iterator[None]:
    """Turn running out of memory into an error that says what to do."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        detail = (str(error).strip() or "MemoryError").splitlines()[0][:200]
        many = trainer.config.replicates > 1
        raise UserError(
            f"out of memory at step {trainer.step}: {detail}\n"
            f"A smaller --batch-size (now {trainer.config.batch_size})"
            + (f" or fewer --replicates (now {trainer.config.replicates})" if many else "")
            + f" needs less. {trainer._advice_saved() if trainer.began else ''}".rstrip()
        ) from error


def out_of_memory(error: BaseException) -> bool:
    """Whether an error is that there is not enough memory, of the machine or of a device."""
    text = str(error)
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text or "Out of memory" in text


@contextmanager
def _explained(trainer: _Trainer) -> Iterator[None]:
    """Turn failures from outside the program into errors that say what to do."""
    try:
        with _memory_explained(trainer):
            yield
    except UserError:
        # What is being saved in the background must reach the disk before the process ends.
        trainer.checkpoints.settle()
        raise
    except OSError as error:
        trainer.checkpoints.settle()
        if is_disk_full(error):
            raise UserError(
                f"the disk is full: could not write to {trainer.folder} at step {trainer.step}."
                f" {trainer._advice_saved()} Make room, then go on with --resume."
            ) from error
        raise UserError(f"could not write to {trainer.folder}: {error}") from error
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        # Where dispatch itself meets the broken connection, JAX raises ValueError.
        of_jax = isinstance(error, jax.errors.JaxRuntimeError) or re.match(r"[A-Z_]+: ", str(error))
        if jax.process_count() == 1 or not of_jax:
            raise
        raise LostPeer(
            f"another process is gone (at step {trainer.step}):"
            f" {str(error).strip().splitlines()[0][:200]}\n"
            f"{GO_ON}"
        ) from error


class LostPeer(UserError):
    """Another process of this run has died; this one cannot leave in an orderly way."""
