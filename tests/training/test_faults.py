"""Faults from outside: signals, kills, full disks. Runs are processes of their own."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import chex
import pytest
import training_tasks
from processes import environment, wait_for_step
from training_tasks import compiled_once, configured, no_figures  # noqa: F401

from msdspn_jax import cli
from msdspn_jax.errors import UserError
from msdspn_jax.training import checkpoints, loop, run_folder

training_tasks.register()
HERE = Path(__file__).parents[1]
FLAGS = {
    "batch_norm": True,
    "host_data": True,
    "steps": 60,
    "log_every": 1,
    "checkpoint_every": 3,
    "evaluate_every": 10,
    "steps_per_dispatch": 2,
}


def start(folder: Path, **flags) -> subprocess.Popen:
    command = [sys.executable, str(HERE / "training_tasks.py"), "train", "toy"]
    command += ["--run-dir", str(folder), "--resume", "auto"]
    for name, value in (FLAGS | flags).items():
        flag = "--" + name.replace("_", "-")
        command += [flag] if value is True else [flag, str(value)]
    return subprocess.Popen(
        command, env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def train_here(folder: Path, **flags) -> loop.Outcome:
    config = configured(run_dir=str(folder), resume="auto", **(FLAGS | flags))
    return loop.train(training_tasks.build(config), config)


def history(folder: Path) -> list[dict]:
    lines = run_folder.read_metrics(folder)
    return [{k: v for k, v in x.items() if not k.startswith("steps_per_second")} for x in lines]


def assert_killing_changes_nothing(tmp_path: Path, steps: list[int], total: int) -> None:
    whole = train_here(tmp_path / "whole", steps=total)
    folder = tmp_path / "killed"
    for step in steps:
        process = start(folder, steps=total, delay=0.02)
        try:
            wait_for_step(folder, step, process)
        finally:
            process.kill()
            process.communicate()
    # The delay is not a number of the run's result, but it is a flag.
    resumed = train_here(folder, steps=total, allow_config_change=True)
    chex.assert_trees_all_equal(resumed.state, whole.state)
    assert history(folder) == history(whole.folder)


def test_killed_twice_and_resumed_equals_never_killed(tmp_path):
    assert_killing_changes_nothing(tmp_path, [13, 31], total=60)


@pytest.mark.slow
def test_killed_twenty_times_at_random_steps_equals_never_killed(tmp_path):
    steps = sorted(random.Random(0).sample(range(5, 480), 22))
    assert_killing_changes_nothing(tmp_path, steps, total=500)


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_signal_saves_says_so_and_resumes(tmp_path, number):
    folder = tmp_path / "run"
    process = start(folder, delay=0.05, checkpoint_every=1000)
    try:
        wait_for_step(folder, 5, process)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 128 + number
    assert f"{number.name}: saved at step" in err
    assert "go on with --resume" in err
    assert "Traceback" not in err
    (saved,) = checkpoints.Checkpoints(folder / "checkpoints", read_only=True).steps()
    assert saved >= 5
    resumed = train_here(folder, checkpoint_every=1000, allow_config_change=True)
    whole = train_here(tmp_path / "whole")
    chex.assert_trees_all_equal(resumed.state, whole.state)
    assert history(folder) == history(whole.folder)


# --- a full disk ---


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 400 kB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(folder)]
    if os.name != "posix" or shutil.which("mount") is None:
        pytest.skip("no mount")
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("not permitted to mount a tmpfs")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("foreseen", [True, False])
def test_full_disk_stops_with_advice_and_loses_nothing(small_disk, monkeypatch, foreseen):
    if not foreseen:
        # As on a network disk whose quota cannot be asked for.
        usage = shutil._ntuple_diskusage(10**12, 0, 10**12)
        monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda _: usage)
    folder = small_disk / "run"
    with pytest.raises(UserError, match="disk is full") as stopped:
        train_here(folder, keep_checkpoints=1000, checkpoint_every=2, log_every=1)
    assert "--resume" in str(stopped.value)
    room = shutil.disk_usage(folder).free
    steps = checkpoints.Checkpoints(folder / "checkpoints", read_only=True).steps()
    assert steps, room
    # Room again: the run goes on from what was saved.
    subprocess.run(["mount", "-o", "remount,size=20m", str(small_disk)], check=True)
    resumed = train_here(folder, keep_checkpoints=1000, checkpoint_every=2)
    whole = train_here(small_disk / "whole", keep_checkpoints=1)
    chex.assert_trees_all_equal(resumed.state, whole.state)
    assert history(folder) == history(whole.folder)


def test_errors_of_the_command_line_have_no_traceback(tmp_path, capsys):
    flags = ["--run-dir", str(tmp_path / "run"), "--steps", "5", "--bad-step", "3"]
    assert cli.main(["train", "toy", *flags]) == 2
    err = capsys.readouterr().err
    assert "msdspn train: step 3: the loss is not finite" in err
    assert "Traceback" not in err
    assert not history(tmp_path / "run")
