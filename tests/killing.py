"""Kill runs of the toy task at random times, over and over: ``killing.py FOLDER KILLS SEED``.

A process that has imported everything, but not started JAX, forks one that trains and kills it
after a random time. So a kill takes a second and not ten. The runs go to FOLDER/whole (never
killed) and FOLDER/0, FOLDER/1, … What happened is printed as JSON.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import orbax.checkpoint  # noqa: F401
import pytest
import training_tasks

from msdspn_jax.training import loop
from msdspn_jax.training.checkpoints import damage, steps_in

STEPS = 120


def train(folder: Path, delay: float) -> None:
    flags = {"batch_norm": True, "host_data": True, "steps": STEPS, "log_every": 1}
    flags |= {"checkpoint_every": 3, "evaluate_every": 10, "steps_per_dispatch": 2}
    config = training_tasks.configured(
        run_dir=str(folder), resume="auto", delay=delay, allow_config_change=True, **flags
    )
    loop.train(training_tasks.build(config), config)


def forked(folder: Path, delay: float, log: Path) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        with log.open("a") as file:
            os.dup2(file.fileno(), 2)
        train(folder, delay)
        code = 0
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    finally:
        os._exit(code)


def main(root: Path, kills: int, seed: int) -> dict:
    chance = random.Random(seed)
    log = root / "log.txt"
    if os.waitpid(forked(root / "whole", 0.0, log), 0)[1]:
        raise SystemExit(log.read_text())
    killed, finished, failures, partial, longest = 0, 0, [], 0, 4.0
    while killed < kills or not finished:
        folder = root / str(finished)
        began = time.monotonic()
        child = forked(folder, 0.005, log)
        wait = chance.uniform(0, longest) if killed < kills else float("inf")
        while True:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                break
            if time.monotonic() - began > wait:
                os.kill(child, signal.SIGKILL)
                _, status = os.waitpid(child, 0)
                break
            time.sleep(0.002)
        if os.WIFSIGNALED(status):
            killed += 1
            partial += bool(steps_in(folder / "checkpoints"))
        elif os.WEXITSTATUS(status):
            failures.append(log.read_text()[-500:])
            break
        else:
            finished += 1
        for step in steps_in(folder / "checkpoints"):
            reason = damage(folder / "checkpoints" / str(step))
            if reason is not None:
                failures.append(f"{folder} {step}: {reason}")
    return {"kills": killed, "with_checkpoints": partial, "runs": finished, "failures": failures}


if __name__ == "__main__":
    training_tasks.draw_nothing(pytest.MonkeyPatch())
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
