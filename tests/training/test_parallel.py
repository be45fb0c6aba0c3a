"""Many devices and many processes give the numbers of one."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import chex
import jax
import numpy as np
import pytest
import training_tasks
from processes import environment, wait_for, wait_for_step
from training_tasks import compiled_once, configured, no_figures  # noqa: F401

from msdspn_jax.training import failures, loop, run_folder
from msdspn_jax.training.checkpoints import Checkpoints
from msdspn_jax.training.supervise import FATE_SHARED, GO_ON, explained

training_tasks.register()
HERE = Path(__file__).parents[1]


MANY_DEVICES = """
import sys, json
sys.path.insert(0, sys.argv[1])
import jax, numpy as np, training_tasks
from training_tasks import configured
from msdspn_jax.training.parallel import StepRunner

def after_20_steps(devices, **flags):
    config = configured(batch_norm=True, **flags)
    runner = StepRunner(training_tasks.build(config), config, jax.devices()[:devices])
    state = runner.place(runner.init())
    step = 0
    for count in (3, 17):
        chunk = runner.run(state, step, count, runner.load(step, count))
        state, step = chunk.state, step + count
    state = runner.fetch(state)
    return state.params, state.model_state, chunk.metrics["loss"] / 10

def difference(a, b):
    return max(float(np.abs(x - y).max()) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)))

assert jax.device_count() == 4
one = after_20_steps(1)
found = {"moved": difference(one[0], after_20_steps(1, seed=1)[0])}
for devices in (2, 4):
    for parallel in ("shard-map", "pmap"):
        found[f"{parallel} {devices}"] = difference(one, after_20_steps(devices, parallel=parallel))
found["host data, pmap"] = difference(one, after_20_steps(2, parallel="pmap", host_data=True))
placed = after_20_steps(2, parallel="pmap", data_argument=True)
found["data argument, pmap"] = difference(one, placed)
seeds = after_20_steps(1, replicates=2)
both = after_20_steps(4, parallel="shard-map", replicates=2, host_data=True)
found["host data, replicates"] = difference(seeds, both)
print(json.dumps(found))
"""


def test_two_and_four_devices_equal_one():
    done = subprocess.run(
        [sys.executable, "-c", MANY_DEVICES, str(HERE)],
        # Eight programs to compile: quickly, here, rather than well.
        env=environment(
            "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
        ),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found.pop("moved") > 1e-2
    assert len(found) == 7
    for how, difference in found.items():
        assert difference < 1e-6, how


def start(folder: Path, process: int, port: int, *flags: str) -> subprocess.Popen:
    command = [sys.executable, str(HERE / "training_tasks.py"), "train", "toy"]
    command += ["--run-dir", str(folder), "--coordinator", f"localhost:{port}"]
    command += ["--num-processes", "2", "--process-id", str(process), *flags]
    return subprocess.Popen(
        command,
        env=environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def final_state(folder: Path):
    config = configured(run_dir=str(folder), batch_norm=True)
    like = loop.StepRunner(training_tasks.build(config), config).init()
    restored = Checkpoints(folder / "checkpoints", read_only=True).read_latest(like)
    assert restored is not None
    return restored.state


def test_two_processes_equal_one(tmp_path):
    port = free_port()
    flags = ["--batch-norm"]
    both = [start(tmp_path / "two", i, port, *flags) for i in (0, 1)]
    for process in both:
        out, err = process.communicate(timeout=240)
        assert process.returncode == 0, (out + err)[-3000:]
    config = configured(run_dir=str(tmp_path / "one"), batch_norm=True)
    one = loop.train(training_tasks.build(config), config)
    chex.assert_trees_all_close(final_state(tmp_path / "two"), one.state, atol=1e-6)
    assert run_folder.read_record(tmp_path / "two")["num_processes"] == 2
    # Process 0 alone writes the logs.
    lines = [(x["step"], x["split"]) for x in run_folder.read_metrics(tmp_path / "two")]
    assert lines == [(x["step"], x["split"]) for x in run_folder.read_metrics(tmp_path / "one")]


# Each joins the other and then does nothing: JAX's abort alone can tell that the other is gone.
IDLE = """
import sys, time
from msdspn_jax.training.supervise import supervise

code = supervise("idle")
if code is not None:
    sys.exit(code)
import jax

jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]), heartbeat_timeout_seconds=10)
print("joined", flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="supervised on Linux only")
def test_abort_by_jax_becomes_words():
    address = f"localhost:{free_port()}"
    both = [
        subprocess.Popen(
            [sys.executable, "-c", IDLE, address, str(i)],
            env=environment(),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for i in (0, 1)
    ]
    try:
        for process in both:
            assert process.stdout is not None
            assert process.stdout.readline() == "joined\n"
        both[0].kill()
        _, err = both[1].communicate(timeout=60)
    finally:
        for process in both:
            process.kill()
            process.communicate()
    assert both[1].returncode == 2, err
    assert "idle: another process is gone: UNAVAILABLE: " in err
    assert err.endswith("Start all processes again with --resume.\n")
    assert "stack trace" not in err
    assert "Terminating process" not in err


@pytest.mark.parametrize(
    ("number", "log", "code", "words"),
    [
        (
            signal.SIGABRT,
            FATE_SHARED + b" absl::Status: A: gone:\n1\nmore\n",
            2,
            "gone: A: gone: 1\n",
        ),
        (signal.SIGABRT, FATE_SHARED + b" absl::Status: B: closed\nmore\n", 2, "gone: B: closed\n"),
        (signal.SIGABRT, b"", 134, "ended by SIGABRT"),
        (signal.SIGKILL, b"", 137, "ended by SIGKILL"),
        (signal.SIGSEGV, FATE_SHARED, 139, "ended by SIGSEGV"),
    ],
    ids=["peers", "coordinator", "abort", "killed", "crash"],
)
def test_ends_by_signals_in_words(number, log, code, words):
    found, message = explained(number, log)
    assert found == code
    assert words in message
    assert message.endswith(GO_ON)


@pytest.mark.parametrize("kind", [jax.errors.JaxRuntimeError, ValueError])
def test_broken_collective_is_a_lost_process(tmp_path, monkeypatch, kind):
    config = configured(run_dir=str(tmp_path), steps=2)
    trainer = loop._Trainer(training_tasks.build(config), config, tmp_path)

    def agree(*_):
        raise kind("UNKNOWN: Gloo AllGather failed: Connection reset by peer")

    monkeypatch.setattr(loop, "agree", agree)
    with pytest.raises(kind):  # alone, it is some other error
        trainer.run()
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(
        failures.LostPeer, match=r"another process is gone \(at step 0\): UNKNOWN: Gl"
    ):
        trainer.run()
    monkeypatch.setattr(loop, "agree", lambda *_: int("a bug"))
    with pytest.raises(ValueError, match="invalid literal"):
        trainer.run()


@pytest.mark.slow
@pytest.mark.parametrize("victim", [1, 0])
def test_killed_process_ends_the_other_and_the_run_resumes(tmp_path, victim):
    port, folder = free_port(), tmp_path / "run"
    flags = ["--batch-norm", "--host-data", "--delay", "0.05", "--steps", "400"]
    flags += ["--heartbeat-timeout", "10", "--log-every", "1", "--steps-per-dispatch", "2"]
    both = [start(folder, i, port, *flags) for i in (0, 1)]
    survivor = both[1 - victim]
    try:
        wait_for_step(folder, 12, both[0])
        # Saves are asynchronous: that of step 10 may still be under way.
        wait_for(lambda: saved_steps(folder)[-1:] >= [10], both[0], "the checkpoint of step 10")
        both[victim].send_signal(signal.SIGKILL)
        killed = time.monotonic()
        _, err = survivor.communicate(timeout=90)
        assert time.monotonic() - killed < 60
    finally:
        for process in both:
            process.kill()
            process.communicate()
    assert survivor.returncode == 2, err[-3000:]
    assert "another process is gone" in err
    assert "Start all processes again with --resume" in err
    assert "Traceback" not in err
    assert "stack trace" not in err
    # On a slow machine the run has got further than step 12 before the kill arrives.
    end = saved_steps(folder)[-1] + 20
    assert 30 <= end < 400
    config = configured(
        run_dir=str(folder), batch_norm=True, host_data=True, steps=end, resume=True,
        allow_config_change=True,
    )  # fmt: skip
    resumed = loop.train(training_tasks.build(config), config)
    assert int(resumed.state.step) == end
    assert np.isfinite(resumed.metrics["loss"])


def saved_steps(folder: Path) -> list[int]:
    return list(Checkpoints(folder / "checkpoints", read_only=True).steps())
