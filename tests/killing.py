"""Kill runs of the toy task at random times, over and over: ``killing.py FOLDER KILLS SEED``.

A process that has imported everything, but not started JAX, forks one that trains and kills it:
every other time at any moment, otherwise while it does steps. So a kill takes seconds and not ten.
The runs go to FOLDER/whole (never
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
from msdspn_jax.training.run_folder import read_metrics

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
    killed, finished, failures, amid_steps = 0, 0, [], 0
    while killed < kills or not finished:
        folder = root / str(finished)
        before = last_step(folder)
        child = forked(folder, 0.005, log)
        began, amid = time.monotonic(), killed % 2 == 1
        wait = chance.uniform(0, 0.7 if amid else 4.0) if killed < kills else float("inf")
        while True:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                break
            if amid and last_step(folder) <= before:
                began = time.monotonic()
            if time.monotonic() - began > wait:
                os.kill(child, signal.SIGKILL)
                _, status = os.waitpid(child, 0)
                break
            time.sleep(0.002)
        if os.WIFSIGNALED(status):
            killed += 1
            amid_steps += last_step(folder) > before
        elif os.WEXITSTATUS(status):
            failures.append(log.read_text()[-500:])
            break
        else:
            finished += 1
        for step in steps_in(folder / "checkpoints"):
            reason = damage(folder / "checkpoints" / str(step))
            if reason is not None:
                failures.append(f"{folder} {step}: {reason}")
    return {"kills": killed, "amid_steps": amid_steps, "runs": finished, "failures": failures}


def last_step(folder: Path) -> int:
    return max((x["step"] for x in read_metrics(folder)), default=0)


if __name__ == "__main__":
    training_tasks.draw_nothing(pytest.MonkeyPatch())
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
