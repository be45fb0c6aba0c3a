"""What may end a run early (signals, memory, the disk, other machines), and what to do then."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from msdspn_jax.errors import DataError, UserError
from msdspn_jax.training.checkpoints import is_disk_full
from msdspn_jax.training.config import TrainConfig
from msdspn_jax.training.state import (
    GRADIENT_NOT_FINITE,
    INNER_ENERGY_EXPLODED,
    LOSS_NOT_FINITE,
)
from msdspn_jax.training.supervise import GO_ON


class Standing(NamedTuple):
    """Where a run stands: its folder, the steps done, and what is saved of them, in words."""

    folder: Path
    step: int
    saved: str


class LostPeer(UserError):
    """Another process of this run has died; this one cannot leave in an orderly way."""


@contextmanager
def collected_signals() -> Iterator[list[int]]:
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


def out_of_memory(error: BaseException) -> bool:
    """Whether an error is that there is not enough memory, of the machine or of a device."""
    text = str(error)
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text or "Out of memory" in text


@contextmanager
def memory_explained(config: TrainConfig, standing: Callable[[], Standing]) -> Iterator[None]:
    """Turn running out of memory into an error that says what to do."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        detail = (str(error).strip() or "MemoryError").splitlines()[0][:200]
        many = config.replicates > 1
        raise UserError(
            f"out of memory at step {standing().step}: {detail}\n"
            f"A smaller --batch-size (now {config.batch_size})"
            + (f" or fewer --replicates (now {config.replicates})" if many else "")
            + f" needs less. {standing().saved}".rstrip()
        ) from error


@contextmanager
def explained(config: TrainConfig, standing: Callable[[], Standing]) -> Iterator[None]:
    """Turn failures from outside the program into errors that say what to do."""
    try:
        with memory_explained(config, standing):
            yield
    except DataError as error:
        raise UserError(f"{error}\n{standing().saved}") from error.__cause__
    except OSError as error:
        folder, step, saved = standing()
        if is_disk_full(error):
            raise UserError(
                f"the disk is full: could not write to {folder} at step {step}."
                f" {saved} Make room, then go on with --resume."
            ) from error
        raise UserError(f"could not write to {folder}: {error}") from error
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        # Where dispatch itself meets the broken connection, JAX raises ValueError.
        of_jax = isinstance(error, jax.errors.JaxRuntimeError) or re.match(r"[A-Z_]+: ", str(error))
        if jax.process_count() == 1 or not of_jax:
            raise
        raise LostPeer(
            f"another process is gone (at step {standing().step}):"
            f" {str(error).strip().splitlines()[0][:200]}\n"
            f"{GO_ON}"
        ) from error


def refusal_of_step(status: np.ndarray, metrics: dict[str, np.ndarray], config: TrainConfig) -> str:
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
