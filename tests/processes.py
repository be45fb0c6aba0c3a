"""Processes that tests start, and waiting for what they do."""

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from msdspn_jax.training import run_folder


def environment(flags: str = "") -> dict[str, str]:
    flags = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
    return os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}


def wait_for_step(folder: Path, step: int, process: subprocess.Popen) -> None:
    """Until a line of metrics.jsonl has at least this step."""

    def reached():
        lines = run_folder.read_metrics(folder)
        return bool(lines) and lines[-1]["step"] >= step

    wait_for(reached, process, f"step {step}")


def wait_for(
    happened: Callable[[], bool], process: subprocess.Popen, what: str, seconds: float = 120
) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if happened():
            return
        if process.poll() is not None:
            raise AssertionError("ended early: " + process.communicate()[1][-3000:])
        time.sleep(0.05)
    raise AssertionError(f"did not reach {what}")
