"""Resuming: what is refused, what a refusal leaves as it was, and who may write."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import errno
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import training_tasks
from processes import environment, wait_for_step
from training_tasks import compiled_once, configured, no_figures  # noqa: F401

from msdspn_jax import cli
from msdspn_jax.commands import grid as grid_command
from msdspn_jax.commands import train as train_command
from msdspn_jax.errors import UserError
from msdspn_jax.trained import run
from msdspn_jax.training import lock, logging, loop, run_folder
from msdspn_jax.training.checkpoints import Checkpoints

training_tasks.register()
SCRIPT = Path(__file__).parents[1] / "training_tasks.py"


def train(folder: Path, **flags) -> loop.Outcome:
    config = configured(run_dir=str(folder), **flags)
    return loop.train(training_tasks.build(config), config)


def start(folder: Path, *flags: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), "train", "toy", "--run-dir", str(folder), *flags],
        env=environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def unwrapped(text: str) -> str:
    """A text without what rich puts between its words."""
    return "".join(text.split())


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a run folder but for the lock, which says who was there last."""
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file() and p.name != lock.NAME
    }


# --- a run that is not there (point 13) ---


def test_resume_without_a_run_is_refused_and_names_near_misses(tmp_path, capsys):
    train(tmp_path / "digits-dspn", steps=1)
    (tmp_path / "digits-dspm-notes").mkdir()
    missing = tmp_path / "digits-dpsn"
    with pytest.raises(UserError, match=r"holds no run to go on with\. Did you mean .*digits-dspn"):
        train(missing, resume=True)
    argv = ["train", "toy", "--run-dir", str(missing)]
    assert cli.main([*argv, "--resume"]) == 2
    said = capsys.readouterr().err
    assert f"Did you mean {tmp_path / 'digits-dspn'}?" in said
    assert "notes" not in said
    assert not missing.exists()
    assert cli.main([*argv, "--resume", "auto", "--steps", "2", "--no-progress"]) == 0
    assert cli.main([*argv, "--resume=yes"]) == 0


@pytest.mark.parametrize(
    ("words", "value"),
    [([], False), (["--resume"], True), (["--resume", "yes"], True), (["--resume=no"], False),
     (["--resume", "auto"], "auto"), (["--resume=auto"], "auto"),
     (["--resume", "--seed", "3"], True)],
)  # fmt: skip
def test_resume_is_no_yes_or_auto_and_yes_alone(tmp_path, words, value):
    (tmp_path / "run").mkdir()
    train(tmp_path / "run", steps=1)
    config = train_command.parse("toy", ["--run-dir", str(tmp_path / "run"), *words])
    assert config.run.resume == value
    assert isinstance(value, str) or config.run.resume is value
    assert (config.steps == 1) == bool(words), "flags that are not given are the run's"


def test_resume_says_that_there_is_no_run_before_anything_else(tmp_path, capsys):
    argv = ["train", "sets", "--run-dir", str(tmp_path / "none"), "--resume"]
    assert cli.main(argv) == 2  # And not that --data is missing.
    assert "holds no run to go on with" in capsys.readouterr().err


def test_a_finished_run_says_so_and_how_to_train_longer(tmp_path, capsys):
    argv = ["train", "toy", "--run-dir", str(tmp_path / "run"), "--no-progress"]
    assert cli.main([*argv, "--steps", "2"]) == 0
    capsys.readouterr()
    assert cli.main([*argv, "--resume"]) == 0
    out, err = capsys.readouterr()
    assert "finished: all 2 steps are done; to train longer: --steps N --allow-config-change" in err
    assert "validation" not in out
    assert cli.main([*argv, "--resume", "--steps", "3", "--allow-config-change"]) == 0
    assert "resuming at step 2" in capsys.readouterr().err


@pytest.mark.usefixtures("without_hook")
def test_resume_refuses_other_words(tmp_path, capsys):
    with pytest.raises(SystemExit):
        train_command.parse("toy", ["--run-dir", str(tmp_path), "--resume", "sometimes"])
    assert "expected nothing, yes, no or auto" in capsys.readouterr().err
    with pytest.raises(ValueError, match="resume: expected one of 'auto', True, False, got 'yes'"):
        configured(resume="yes")


def test_the_grid_begins_cells_and_goes_on_with_them(tmp_path):
    cell = grid_command.Cell("a", ())
    assert grid_command._config("toy", cell, tmp_path).run.resume == "auto"


# --- a run that never began (point 13) ---


class Unlucky:
    """Parts of a task that go wrong."""

    @staticmethod
    def no_memory(*_, **__):
        raise jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: Out of memory allocating 123 bytes.\nAllocator: …"
        )

    @staticmethod
    def no_host_memory(*_, **__):
        raise MemoryError("Unable to allocate 1.0 TiB for an array")

    @staticmethod
    def no_file(*_, **__):
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", "scenes.json")

    @staticmethod
    def bad_data(*_, **__):
        raise ValueError("scene 3 has 12 objects, expected at most 10")


UNLUCKY = [
    (
        "no_memory",
        r"out of memory at step 0: RESOURCE_EXHAUSTED: .* 123 bytes\.\nA smaller --b",
    ),
    ("no_host_memory", r"out of memory at step 0: Unable to allocate 1\.0 TiB"),
    ("no_file", r"data cannot be read: .*scenes\.json"),
    ("bad_data", r"data cannot be read: scene 3 has 12 objects"),
]


@pytest.mark.parametrize(("fault", "words"), UNLUCKY)
@pytest.mark.parametrize("host", [False, True])
def test_a_run_that_never_began_ends_in_words_and_leaves_no_folder(tmp_path, fault, words, host):
    config = configured(run_dir=str(tmp_path / "run"), host_data=host)
    goes_wrong = getattr(Unlucky, fault)
    changed = {"sample": goes_wrong} if host else {"data": goes_wrong}
    task = dataclasses.replace(training_tasks.build(config), **changed)
    with pytest.raises(UserError, match=words):
        loop.train(task, config)
    assert list(tmp_path.iterdir()) == []
    # What was there before stays: here, the folder and a file of the user's.
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(UserError):
        loop.train(task, config)
    assert (tmp_path / "run" / "notes.txt").exists()


def test_a_step_without_memory_ends_in_words_and_leaves_no_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(loop.StepRunner, "run", Unlucky.no_memory)
    with pytest.raises(UserError, match=r"out of memory.*\n.*fewer --replicates \(now 3\)"):
        train(tmp_path / "run", replicates=3)
    assert not (tmp_path / "run").exists()


def test_a_batch_beyond_all_counting_is_refused():
    with pytest.raises(ValueError, match=r"batch_size: expected less than 2³¹, got 5000000000"):
        configured(batch_size=5_000_000_000)


def test_evaluation_meets_a_best_checkpoint_that_training_has_just_replaced(tmp_path, monkeypatch):
    train(tmp_path / "run")
    real, asked = Checkpoints.read, []

    def read(self, step, like):
        asked.append(step)
        if len(asked) == 1:
            shutil.rmtree(self.folder / str(step))
        return real(self, step, like)

    monkeypatch.setattr(Checkpoints, "read", read)
    assert run.load_run(tmp_path / "run").step == asked[1] < asked[0]


def test_a_run_that_began_is_kept_when_memory_ends(tmp_path, monkeypatch):
    real, calls = loop.StepRunner.run, []

    def run(self, state, step, *args):
        calls.append(step)
        return Unlucky.no_memory() if step >= 12 else real(self, state, step, *args)

    monkeypatch.setattr(loop.StepRunner, "run", run)
    with pytest.raises(UserError, match=r"out of memory at step 1\d: .*\n.*checkpoint .* step 10 "):
        train(tmp_path / "run", steps_per_dispatch=2)
    monkeypatch.undo()
    training_tasks.draw_nothing(monkeypatch)
    resumed = train(tmp_path / "run", resume=True)
    chex.assert_trees_all_equal(resumed.state, train(tmp_path / "whole").state)


def test_evaluation_without_memory_ends_in_words(tmp_path, monkeypatch, capsys):
    train(tmp_path / "run", steps=1)
    real = training_tasks.build
    monkeypatch.setattr(
        training_tasks, "build", lambda c: dataclasses.replace(real(c), evaluate=Unlucky.no_memory)
    )
    assert cli.main(["evaluate", str(tmp_path / "run")]) == 2
    assert "out of memory: RESOURCE_EXHAUSTED" in capsys.readouterr().err


# --- progress and advice (point 13) ---


def test_rate_counts_neither_compilation_nor_its_steps(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(logging.time, "monotonic", lambda: clock[0])
    progress = logging.Progress(configured(steps=100), first_step=40)
    clock[0] = 30.0
    progress.leave_out(30.0, steps=1)
    assert progress.rate(41) == 0
    clock[0] = 35.0
    assert progress.rate(51) == 2.0
    # The program of another stage is compiled, and the first evaluation.
    clock[0] = 75.0
    progress.leave_out(40.0, steps=1)
    assert progress.rate(52) == 2.0
    clock[0] = 80.0
    assert progress.rate(62) == 2.0


def test_steps_per_second_of_a_run_leaves_compilation_out(tmp_path, monkeypatch):
    real = loop.StepRunner.run
    clock = [0.0]
    seen = set()

    def run(self, state, step, count, batches):
        clock[0] += count if step in seen or seen else 1000.0
        seen.add(step)
        return real(self, state, step, count, batches)

    monkeypatch.setattr(loop.StepRunner, "run", run)
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    train(tmp_path / "run", log_every=1)
    rates = [x["steps_per_second"] for x in run_folder.read_metrics(tmp_path / "run", "train")]
    assert rates[0] is None
    assert rates[1:] == pytest.approx([1.0] * 19)


def test_steps_per_second_of_a_line_are_those_since_the_last_without_evaluation(
    tmp_path, monkeypatch
):
    real, clock = loop.StepRunner.run, [0.0]

    def run(self, state, step, count, batches):
        clock[0] += count * (1.0 if step < 10 else 4.0)
        return real(self, state, step, count, batches)

    def evaluate(self):
        clock[0] += 1000.0
        return real_evaluate(self)

    real_evaluate = loop._Trainer._evaluate
    monkeypatch.setattr(loop.StepRunner, "run", run)
    monkeypatch.setattr(loop._Trainer, "_evaluate", evaluate)
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    train(tmp_path / "run", log_every=5, evaluate_every=5)
    rates = [x["steps_per_second"] for x in run_folder.read_metrics(tmp_path / "run", "train")]
    assert rates == pytest.approx([1.0, 1.0, 0.25, 0.25])
    assert run_folder.training_hours(tmp_path / "run") == pytest.approx(50 / 3600)


def test_remaining_time_of_the_bar_leaves_compilation_out(monkeypatch):
    import io

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    progress = logging.Progress(configured(steps=100, progress=True), first_step=0)
    bar = progress._bar._bar
    now = [100.0]
    bar.get_time = lambda: now[0]
    bar.reset(progress._bar._task)
    now[0] += 1000.0
    progress.update(1, {})
    progress.leave_out(1000.0, steps=1)
    now[0] += 1.0
    progress.update(2, {})
    now[0] += 1.0
    progress.update(3, {})
    (task,) = bar.tasks
    progress.close()
    assert task.time_remaining == pytest.approx(97, abs=2)


@pytest.mark.parametrize("there", [True, False])
def test_tensorboard_is_advised_only_where_it_is_installed(monkeypatch, capsys, there):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if there else None)
    assert cli.main(["train", "--help"]) == 0
    text = capsys.readouterr().out
    assert ("tensorboard --logdir" in text) == there
    assert "msdspn show RUN" in text


# --- one writer at a time (point 14) ---

SLOW = ["--host-data", "--delay", "0.02", "--steps", "200", "--log-every", "1"]
SLOW += ["--steps-per-dispatch", "2"]


def test_a_second_writer_is_told_who_holds_the_folder_and_harms_nothing(tmp_path):
    folder = tmp_path / "run"
    first = start(folder, *SLOW)
    try:
        wait_for_step(folder, 20, first)
        config = configured(
            run_dir=str(folder), resume=True, host_data=True, delay=0.02, steps=200, log_every=1
        )
        held = rf"is being written by process {first.pid} on .* since"
        for resume in (True, "auto"):
            with pytest.raises(UserError, match=held):
                train(folder, **{"resume": resume, **_numbers(config)})
        # Readers may read, and nothing of theirs is in the writer's way.
        assert cli.main(["evaluate", str(folder), "--no-figures"]) == 0
        assert cli.main(["show", str(folder)]) == 0
        _, err = first.communicate(timeout=120)
        assert first.returncode == 0, err
    finally:
        first.kill()
        first.communicate()
    lines = [(x["step"], x["split"]) for x in run_folder.read_metrics(folder)]
    assert [step for step, split in lines if split == "train"] == list(range(1, 201))
    assert run_folder.is_finished(folder)
    assert len(lines) == len(set(lines))


def _numbers(config) -> dict:
    return {"host_data": True, "delay": config.delay, "steps": config.steps}


def test_processes_started_together_make_one_run(tmp_path):
    folder = tmp_path / "run"
    processes = [start(folder, "--resume", "auto", *SLOW) for _ in range(4)]
    try:
        said = [process.communicate(timeout=300)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    codes = sorted(process.returncode for process in processes)
    assert codes[0] == 0, said
    for process, err in zip(processes, said, strict=True):
        assert process.returncode == 0 or "is being written by" in err, err
        assert "Traceback" not in err
    steps = [x["step"] for x in run_folder.read_metrics(folder, "train")]
    assert steps == list(range(1, 201))


def test_the_lock_goes_with_its_holder_however_it_ends(tmp_path):
    folder = tmp_path / "run"
    process = start(folder, *SLOW)
    try:
        wait_for_step(folder, 3, process)
    finally:
        process.kill()
        process.communicate()
    assert (folder / lock.NAME).exists()
    config = {"host_data": True, "delay": 0.02, "steps": 200, "log_every": 1}
    train(folder, resume=True, allow_config_change=True, **config | {"steps": 30, "delay": 0.0})


def test_a_failed_run_gives_the_lock_back(tmp_path):
    with pytest.raises(UserError, match="step 13"):
        train(tmp_path / "run", bad_step=13)
    lock.Lock(tmp_path / "run").release()


def test_where_there_are_no_locks_a_warning_says_so(tmp_path, monkeypatch):
    class NoLocks:
        LOCK_EX = LOCK_NB = 0

        @staticmethod
        def flock(*_):
            raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock, "fcntl", NoLocks)
    with pytest.warns(UserWarning, match=r"cannot be locked \(No locks available\)"):
        train(tmp_path / "run", steps=1)
    monkeypatch.setattr(lock, "fcntl", None)
    with pytest.warns(UserWarning, match=r"cannot be locked"):
        train(tmp_path / "run", resume=True, steps=1)


def test_a_lock_on_a_folder_that_was_just_removed_is_taken_anew(tmp_path, monkeypatch):
    folder, real = tmp_path / "run", lock.Lock._take
    removed = []

    def take(self, file):
        if not removed:
            (folder / lock.NAME).unlink()
            folder.rmdir()
            removed.append(True)
        real(self, file)

    monkeypatch.setattr(lock.Lock, "_take", take)
    held = lock.Lock(folder)
    assert (folder / lock.NAME).exists()
    with pytest.raises(UserError, match="is being written by"):
        lock.Lock(folder)
    held.release()


def test_evaluation_keeps_other_splits_of_the_same_step(tmp_path, capsys):
    train(tmp_path / "run", steps=5)
    history = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    for split in ("test", "val"):
        assert cli.main(["evaluate", str(tmp_path / "run"), "--split", split]) == 0
    record = run_folder.read_evaluation(tmp_path / "run")
    assert record is not None
    assert record["metrics"].keys() == {"val", "test"}
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == history
    capsys.readouterr()
    assert cli.main(["show", str(tmp_path / "run")]) == 0
    assert "evaluated:checkpointbest,step5" in unwrapped(capsys.readouterr().out)
    # Those of another step are of another model.
    run_folder.write_evaluation(tmp_path / "run", 6, "latest", {"val": {"loss": 1.0}})
    record = run_folder.read_evaluation(tmp_path / "run")
    assert record is not None
    assert record["metrics"] == {"val": {"loss": 1.0}}


def test_evaluations_at_the_same_time_lose_nothing(tmp_path):
    splits = [f"split{i}" for i in range(20)]

    def evaluated(split):
        run_folder.write_evaluation(tmp_path, 1, "best", {split: {"loss": 1.0}})

    with concurrent.futures.ThreadPoolExecutor(20) as pool:
        list(pool.map(evaluated, splits))
    record = run_folder.read_evaluation(tmp_path)
    assert record is not None
    assert sorted(record["metrics"]) == sorted(splits)


# --- names (point 15) ---

NAMES = ["run[1]", "[/oops]", "a*b?", "[bold]x", "{y} %s", "ü [ü]"]


@pytest.mark.parametrize("name", NAMES)
def test_any_name_of_a_run_folder_can_be_trained_resumed_and_shown(
    tmp_path, name, capsys, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "300")
    folder = tmp_path / name
    assert cli.main(["train", "toy", "--run-dir", str(folder), "--steps", "5"]) == 0
    argv = ["train", "toy", "--run-dir", str(folder), "--resume", "--steps", "8"]
    assert cli.main([*argv, "--allow-config-change"]) == 0
    assert "resuming at step 5" in capsys.readouterr().err
    assert cli.main(["evaluate", str(folder)]) == 0
    assert cli.main(["show", str(folder), "--all"]) == 0
    assert cli.main(["show", str(tmp_path)]) == 0
    assert unwrapped(capsys.readouterr().out).count(unwrapped(name)) >= 3
    whole = train(tmp_path / "whole", steps=8)
    like = whole.state
    found = Checkpoints(folder / "checkpoints", read_only=True).read_latest(like)
    assert found is not None
    chex.assert_trees_all_equal(found.state, like)


def test_the_first_save_is_read_back(tmp_path, monkeypatch):
    def nothing_found(self, *_, **__):
        raise ValueError("NOT_FOUND: it went elsewhere")

    from orbax.checkpoint import Checkpointer

    monkeypatch.setattr(Checkpointer, "restore", nothing_found)
    with pytest.raises(UserError, match=r"cannot be read back \(.*\)\. Choose another --run-dir"):
        train(tmp_path / "run", steps=1)


# --- the record (point 17) ---


def test_a_failed_resume_leaves_the_record_whole_and_names_the_parameter(tmp_path, monkeypatch):
    train(tmp_path / "run")
    before = contents(tmp_path / "run")
    real = training_tasks.build

    def wider(config):
        def init(key):
            return {"params": {"w": jax.random.normal(key, (64,)), "b": jnp.zeros(())}}

        return dataclasses.replace(real(config), init=init)

    config = configured(
        run_dir=str(tmp_path / "run"), resume=True, allow_config_change=True, noise=0.5
    )
    with pytest.raises(UserError) as refused:
        loop.train(wider(config), config)
    assert "params/w: the checkpoint has float32[4], asked for float32[64]" in str(refused.value)
    assert contents(tmp_path / "run") == before
    # As is it after a failure later on, such as data that are not there.
    task = dataclasses.replace(real(config), data=Unlucky.no_file)
    with pytest.raises(UserError, match="data cannot be read"):
        loop.train(task, config)
    assert run_folder.read_record(tmp_path / "run")["config"]["noise"] == 0.1
    train(tmp_path / "run", resume=True)
    assert run_folder.is_finished(tmp_path / "run")


def test_without_its_record_a_run_goes_on_as_its_checkpoint_says(tmp_path, capsys):
    folder = tmp_path / "run"
    train(folder, noise=0.25)
    (folder / "config.json").unlink()
    argv = ["train", "toy", "--run-dir", str(folder)]
    assert cli.main([*argv, "--resume", "--seed", "7"]) == 2
    assert "--seed: the run has 0, asked for 7" in capsys.readouterr().err
    assert not (folder / "config.json").exists()
    # Nor is it begun anew in the folder that still holds it.
    for resume in ([], ["--resume", "no"]):
        assert cli.main([*argv, *resume]) == 2
        assert "holds a run already" in capsys.readouterr().err
    assert cli.main(["evaluate", str(folder)]) == 0
    assert run.load_run(folder).config.noise == 0.25
    assert cli.main([*argv, "--resume"]) == 0
    record = json.loads((folder / "config.json").read_text())
    assert (record["config"]["seed"], record["config"]["noise"]) == (0, 0.25)


def test_without_its_record_an_old_run_is_refused(tmp_path):
    folder = tmp_path / "run"
    train(folder)
    for path in (folder / "checkpoints").iterdir():
        notes = json.loads((path / "notes.json").read_text())
        for name in ("record", "shapes"):
            del notes[name]
        (path / "notes").mkdir()
        (path / "notes" / "metadata").write_text(json.dumps(notes))
        (path / "notes.json").unlink()
        (path / "seal.json").unlink()
    train(folder, resume=True)
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"none of its checkpoints says .* put config\.json back"):
        train(folder, resume=True, seed=7)


# --- another environment (point 25) ---


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"versions": {"jax": "0.1.2"}}, f"JAX 0.1.2 then, {jax.__version__} now"),
        ({"devices": ["TPU v9"]}, "device TPU v9 then, cpu now"),
        ({"precision": "64 bits"}, "precision 64 bits then, 32 bits now"),
    ],
)
def test_resuming_elsewhere_warns_and_names_both(tmp_path, monkeypatch, capsys, changed, words):
    real = run_folder.record_of
    monkeypatch.setattr(run_folder, "record_of", lambda *a: real(*a) | changed)
    train(tmp_path / "run", steps=5)
    monkeypatch.setattr(run_folder, "record_of", real)
    capsys.readouterr()
    train(tmp_path / "run", steps=5, resume=True)
    (line,) = [x for x in capsys.readouterr().err.splitlines() if "warning" in x]
    assert line.endswith(words)


def test_resuming_in_another_precision_warns(tmp_path, capsys):
    train(tmp_path / "run", steps=5)
    with jax.default_matmul_precision("highest"):
        train(tmp_path / "run", steps=5, resume=True)
    assert "precision 32 bits then, 32 bits, matmul highest now" in capsys.readouterr().err


def test_resuming_in_the_same_place_does_not_warn(tmp_path, capsys):
    train(tmp_path / "run", steps=5)
    train(tmp_path / "run", steps=5, resume=True)
    assert "warning" not in capsys.readouterr().err


# --- saved means on the disk (point 18) ---


def test_a_checkpoint_has_its_name_only_once_all_of_it_is_synced(tmp_path, monkeypatch):
    synced: set[str] = set()
    renamed: list[set[str]] = []
    real_sync, real_rename = os.fsync, Path.rename

    def sync(handle):
        synced.add(os.readlink(f"/proc/self/fd/{handle}"))
        real_sync(handle)

    def rename(self, target):
        if Path(target).name.isdigit():
            files = {str(p) for p in self.rglob("*")} | {str(self)}
            renamed.append(files - synced)
        return real_rename(self, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(Path, "rename", rename)
    store = Checkpoints(tmp_path / "checkpoints")
    store.save({"x": np.zeros(3)}, 1, {}, None)
    store.wait()
    assert renamed == [set()]
    assert str(tmp_path / "checkpoints") in synced
