"""Damaged checkpoints are set aside or refused in words, whatever is damaged; kills at any time."""

from __future__ import annotations

import collections
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import chex
import pytest
import training_tasks
from processes import environment
from training_tasks import compiled_once, configured, no_figures  # noqa: F401

from msdspn_jax import cli
from msdspn_jax.errors import UserError
from msdspn_jax.training import checkpoints, loop, run_folder
from msdspn_jax.training.checkpoints import Checkpoints

training_tasks.register()
KILLING = Path(__file__).parents[1] / "killing.py"


def train(folder: Path, **flags) -> loop.Outcome:
    config = configured(run_dir=str(folder), **flags)
    return loop.train(training_tasks.build(config), config)


def history(folder: Path) -> list[dict]:
    lines = run_folder.read_metrics(folder)
    return [{k: v for k, v in x.items() if not k.startswith("steps_per_second")} for x in lines]


def harm(path: Path, chance: random.Random) -> str:
    """Flip, cut or delete something in a checkpoint; says what was done."""
    files = sorted(p for p in path.rglob("*") if p.is_file())
    how = chance.choice(["flip", "flip", "cut", "delete", "half"])
    file = chance.choice(files)
    content = bytearray(file.read_bytes())
    if how in ("flip", "cut") and not content:
        how = "delete"
    if how == "flip":
        content[chance.randrange(len(content))] ^= chance.randrange(1, 256)
        file.write_bytes(content)
    elif how == "cut":
        file.write_bytes(content[: chance.randrange(len(content))])
    elif how == "delete":
        file.unlink()
    else:
        for doomed in chance.sample(files, max(1, len(files) // 2)):
            doomed.unlink()
    return how


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        training_tasks.draw_nothing(patch)
        return train(tmp_path_factory.mktemp("damage") / "run", batch_norm=True)


def test_every_byte_of_the_notes_and_the_seal_counts(trained, tmp_path):
    path = tmp_path / "20"
    shutil.copytree(trained.folder / "checkpoints" / "20", path)
    assert checkpoints.damage(path) is None
    for name in (checkpoints.NOTES, checkpoints.SEAL):
        content = (path / name).read_bytes()
        for i in range(0, len(content), 3):
            for bit in (1, 32, 128):
                changed = bytearray(content)
                changed[i] ^= bit
                (path / name).write_bytes(changed)
                assert checkpoints.damage(path) is not None, (name, i, bit)
        (path / name).write_bytes(content)
    (path / "stray").write_text("")
    assert checkpoints.damage(path) == "stray does not belong to it"


@pytest.mark.parametrize("name", ["notes.json", "seal.json"])
@pytest.mark.parametrize("how", ["flip", "cut", "delete"])
def test_damaged_notes_are_set_aside_and_change_nothing(trained, tmp_path, name, how, capfd):
    folder = tmp_path / "run"
    shutil.copytree(trained.folder, folder)
    file = folder / "checkpoints" / "20" / name
    content = file.read_bytes()
    if how == "flip":  # a digit of a sum behind the history
        at = content.index(b"best" if name == "notes.json" else b"notes.json") + 8
        file.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    elif how == "cut":
        file.write_bytes(content[: len(content) // 2])
    else:
        file.unlink()
    resumed = train(folder, batch_norm=True, resume=True)
    assert "resuming at step 15" in capfd.readouterr().err
    assert (folder / "damaged_checkpoints" / "20").is_dir()
    chex.assert_trees_all_equal(resumed.state, trained.state)
    assert history(folder) == history(trained.folder)


def test_half_deleted_older_checkpoints_do_not_stop_evaluate(trained, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(trained.folder, folder)
    shutil.rmtree(folder / "checkpoints" / "15" / "state")
    (folder / "checkpoints" / "7").mkdir()
    assert cli.main(["evaluate", str(folder)]) == 0
    out, err = capsys.readouterr()
    assert "step 20" in " ".join(out.split())
    assert "left out: checkpoint 7: " in err
    assert "left out: checkpoint 15: state/" in err
    # It is a reader: nothing is moved.
    assert (folder / "checkpoints" / "7").is_dir()
    assert cli.main(["evaluate", str(folder), "--checkpoint", "15"]) == 2
    assert "is missing" in capsys.readouterr().err


@pytest.mark.slow
def test_five_hundred_damaged_checkpoints(trained, tmp_path, capsys):
    chance = random.Random(0)
    like = trained.state
    before = Checkpoints(trained.folder / "checkpoints", read_only=True).read(15, like)
    counts = collections.Counter()
    for trial in range(500):
        folder = tmp_path / str(trial)
        shutil.copytree(trained.folder, folder)
        how = harm(folder / "checkpoints" / "20", chance)
        if trial % 5 == 0:  # Both: there is nothing left to read.
            harm(folder / "checkpoints" / "15", chance)
            before_bytes = (folder / "metrics.jsonl").read_bytes()
            with pytest.raises(UserError, match="no checkpoint can be read"):
                train(folder, batch_norm=True, resume=True)
            assert (folder / "metrics.jsonl").read_bytes() == before_bytes
            counts[how, "refused in words"] += 1
        elif trial % 5 == 1:  # The whole way.
            resumed = train(folder, batch_norm=True, resume=True)
            chex.assert_trees_all_equal(resumed.state, trained.state)
            assert history(folder) == history(trained.folder)
            assert (folder / "damaged_checkpoints" / "20").is_dir()
            counts[how, "set aside, the run goes on to the same end"] += 1
        else:
            read = Checkpoints(folder / "checkpoints", read_only=True).read_latest(like)
            assert read is not None
            assert read.step == 15
            chex.assert_trees_all_equal(read.state, before.state)
            assert read.notes == before.notes
            ((_, reason),) = read.damaged
            assert str(folder / "checkpoints" / "20") in reason
            counts[how, "left out, the one before read"] += 1
        shutil.rmtree(folder)
    with capsys.disabled():
        print("\n" + "\n".join(f"{n:4} {how}: {what}" for (how, what), n in sorted(counts.items())))
    assert sum(counts.values()) == 500


@pytest.mark.slow
def test_two_hundred_kills_at_random_times(tmp_path, capsys):
    done = subprocess.run(
        [sys.executable, str(KILLING), str(tmp_path), "200", "0"],
        env=environment() | {"PYTHONPATH": str(Path(loop.__file__).parents[2])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout)
    with capsys.disabled():
        print("\n", report)
    assert report["failures"] == []
    assert report["kills"] == 200
    assert report["runs"] >= 1
    config = configured(batch_norm=True)
    like = loop.StepRunner(training_tasks.build(config), config).init()
    whole = Checkpoints(tmp_path / "whole" / "checkpoints", read_only=True).read_latest(like)
    assert whole is not None
    for number in range(report["runs"]):
        folder = tmp_path / str(number)
        end = Checkpoints(folder / "checkpoints", read_only=True).read_latest(like)
        assert end is not None
        assert (end.step, end.damaged) == (whole.step, [])
        chex.assert_trees_all_equal(end.state, whole.state)
        assert history(folder) == history(tmp_path / "whole")
        assert not (folder / "damaged_checkpoints").exists()
