"""CLEVR on several machines, rehearsed as several processes on this one.

Each process reads its own share of every batch of images; one of them is killed, and the run goes
on with another number of processes, to the numbers of a single one.
"""

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
from processes import environment, wait_for

from msdspn_jax import cli
from msdspn_jax.clevr.cache import cache_folder, prepare_cache
from msdspn_jax.models.resnet import STAGES
from msdspn_jax.tasks.clevr import data
from msdspn_jax.trained.run import load_run
from msdspn_jax.training import run_folder
from msdspn_jax.training.checkpoints import Checkpoints
from msdspn_jax.training.state import run_keys
from msdspn_jax.training.task import epoch_positions

BATCH, IMAGES, STEPS, SIZE = 4, 19, 20, 64
BLOCKS = (1, 1, 1, 1)
FLAGS = f"""--data folder --images-on host --size {SIZE} --batch-size {BATCH} --steps {STEPS}
    --val-size 5 --test-size 7 --encoder-width 2 --latent-dim 4 --hidden-dim 4
    --learning-rate 1e-4 --inner.num-steps 2 --inner.late-num-steps 2 --checkpoint-every 2
    --keep-checkpoints 30 --log-every 1 --heartbeat-timeout 200 --no-tensorboard --no-progress
    --no-compilation-cache""".split()


# --- what the processes run ---


class Read:
    """Images that write down which of them are read, and take their time."""

    def __init__(self, images, log: str, delay: float):
        self.images, self.log, self.delay = images, log, delay

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        with open(self.log, "a") as file:
            file.write(json.dumps(np.asarray(index).tolist()) + "\n")
        time.sleep(self.delay)
        return self.images[index]


def main(log: str, delay: str, *arguments: str) -> int:
    """``msdspn`` with the training images watched, and no pictures at the end."""
    from training_tasks import draw_nothing

    # Half of the blocks: most of the time goes into compiling, once in every process.
    STAGES["resnet18"] = BLOCKS
    load = data.load_split

    def watched(config, split):
        images, objects = load(config, split)
        return (Read(images, log, float(delay)) if split == "train" else images), objects

    patch = pytest.MonkeyPatch()
    patch.setattr(data, "load_split", watched)
    draw_nothing(patch)
    return cli.main(list(arguments))


def start(folder: Path, images: Path, number: int, *, delay: float = 0) -> list[subprocess.Popen]:
    """A run of so many processes, each with its log beside the run folder."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        coordinator = f"localhost:{s.getsockname()[1]}"
    processes = []
    for i in range(number):
        log = folder.with_name(f"{folder.name}.{number}.{i}")
        command = [sys.executable, __file__, str(log), str(delay), "train", "clevr", *FLAGS]
        command += ["--data-dir", str(images), "--run-dir", str(folder), "--resume", "auto"]
        if number > 1:
            command += ["--coordinator", coordinator, "--num-processes", str(number)]
            command += ["--process-id", str(i)]
        # Programs that run for a moment: compiled quickly rather than well.
        flags = environment("--xla_backend_optimization_level=0")
        flags["PYTHONPATH"] = f"{Path(__file__).parents[1]}:{flags.get('PYTHONPATH', '')}"
        processes.append(
            subprocess.Popen(
                command, env=flags, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
        )
    return processes


def finish(processes: list[subprocess.Popen]) -> None:
    try:
        for process in processes:
            out, err = process.communicate(timeout=1800)
            assert process.returncode == 0, (out + err)[-3000:]
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def reads(folder: Path, number: int) -> list[list[list[int]]]:
    """By process, by step: which images were read."""
    logs = [folder.with_name(f"{folder.name}.{number}.{i}") for i in range(number)]
    return [[json.loads(line) for line in log.read_text().splitlines()] for log in logs]


# --- the tests ---


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    sys.path.insert(0, str(Path(__file__).parent))
    from test_clevr import MadeUp

    sys.path.pop(0)
    folder = tmp_path_factory.mktemp("clevr")
    for split, num in (("train", IMAGES + 5), ("val", 7)):
        prepare_cache(MadeUp(num, 0), cache_folder(folder, split, SIZE), size=SIZE)
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory, images):
    """The run of a single process that nobody killed."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    finish(start(folder, images, 1))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("first", "then"), [(4, 2), (2, 4)])
def test_killed_and_resumed_with_another_number_of_processes(
    tmp_path, images, alone, monkeypatch, first, then
):
    monkeypatch.setitem(STAGES, "resnet18", BLOCKS)
    folder = tmp_path / "run"
    processes = start(folder, images, first, delay=0.2)
    saved = Checkpoints(folder / "checkpoints", read_only=True)
    try:
        wait_for(lambda: saved.steps()[-1:] >= [4], processes[0], "step 4", seconds=1800)
        processes[-1].send_signal(signal.SIGKILL)
        for process in processes[:-1]:
            _, err = process.communicate(timeout=600)
            assert process.returncode == 2, err[-3000:]
            assert "another process is gone" in err
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    begun = saved.steps()[-1]
    assert 4 <= begun < STEPS

    finish(start(folder, images, then))
    record = run_folder.read_record(folder)
    assert record["num_processes"] == first  # as it was begun
    one, many = (load_run(run, checkpoint="latest") for run in (alone, folder))
    assert many.step == STEPS
    chex.assert_trees_all_close(many.variables, one.variables, atol=1e-6, rtol=1e-5)
    losses = [
        [x["loss"] for x in run_folder.read_metrics(run) if x["split"] == "train"]
        for run in (alone, folder)
    ]
    assert len(losses[0]) == STEPS
    np.testing.assert_allclose(losses[1], losses[0], atol=1e-5)

    # Every image of every step is read once, by the process whose share it is.
    data_key = run_keys(0).data
    for number, steps in ((first, range(begun)), (then, range(begun, STEPS))):
        by_process = reads(folder, number)
        for i, step in enumerate(steps):
            slots = jax.numpy.arange(BATCH)
            expected = epoch_positions(data_key, step, slots, batch_size=BATCH, size=IMAGES)
            shares = [process[i] for process in by_process]
            assert [len(share) for share in shares] == [BATCH // number] * number
            assert [image for share in shares for image in share] == np.asarray(expected).tolist()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
