"""The commands for the day with an accelerator: what they keep, and a rehearsal of all of them."""

import argparse
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "experiments" / "accelerator"


@pytest.fixture
def modules(monkeypatch):
    """`day` and `table`, which find each other as neighbours."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import day
    import table

    yield day, table
    for name in ("day", "table"):
        sys.modules.pop(name)


@pytest.fixture
def one_day(modules, tmp_path):
    options = argparse.Namespace(results=tmp_path, rehearse=False, only=None, minutes=10)
    return modules[0].Day(options)


def run(one_day, name, code, **options):
    command = [sys.executable, "-c", code]
    return one_day.part(name, command, lambda out: json.loads(out.splitlines()[-1]), **options)


def test_what_fails_is_kept_and_the_rest_goes_on(one_day, modules, tmp_path):
    _, table = modules
    assert run(one_day, "bad", "raise SystemExit('out of luck')") == "failed"
    assert run(one_day, "mute", "print('no JSON')") == "failed"
    assert run(one_day, "good", 'print(\'{"result": {"a": {"b": 1.5}}}\')') == "done"
    assert table.last_line(tmp_path / "bad.jsonl")["error"] == "out of luck"
    assert table.last_line(tmp_path / "good.jsonl")["result"] == {"a": {"b": 1.5}}
    page = (tmp_path / "table.md").read_text()
    assert "| a/b | 1.5 |" in page
    assert "out of luck" in page
    # Once more: what is done is left alone, what failed is tried again; both lines stay.
    assert run(one_day, "good", "raise SystemExit('never runs')") == "done"
    assert run(one_day, "bad", "print('{}')") == "done"
    assert len((tmp_path / "bad.jsonl").read_text().splitlines()) == 2


def test_a_torn_line_is_left_out(modules, tmp_path):
    _, table = modules
    (tmp_path / "x.jsonl").write_text('{"part": "x", "status": "done"}\n{"part": "x", "sta')
    assert table.last_line(tmp_path / "x.jsonl")["status"] == "done"
    assert table.last_line(tmp_path / "y.jsonl") is None


def test_limits(one_day, modules, monkeypatch):
    day, _ = modules
    monkeypatch.setattr(day, "LIMIT", 1)
    monkeypatch.setattr(day, "LIMITS", {"train": 5})
    monkeypatch.setattr(day, "LEAST", 0.1)
    assert run(one_day, "slow", "import time; time.sleep(60)") == "timeout"
    # A training is told to save, and says how far it came.
    waits = "import signal, sys, time; signal.signal(15, lambda *_: (print('{}'), sys.exit(143)));"
    assert run(one_day, "train-x", waits + "time.sleep(60)") == "stopped"
    assert 128 + signal.SIGTERM == 143
    # No more is begun than there is time for.
    one_day.ends = 0
    assert run(one_day, "late", "print('{}')") == "left out"


def test_what_is_for_now_is_made_anew(one_day):
    assert run(one_day, "evaluate-x", "print('{}')", final=False) == "done"
    assert run(one_day, "evaluate-x", "raise SystemExit('runs')") == "failed"


def test_only(one_day):
    one_day.only = ["matching", "device"]
    assert run(one_day, "matching-10", "print('{}')") == "done"
    assert run(one_day, "golden", "print('{}')") == "left out"


def test_trainings_are_plain_command_lines(modules):
    day, _ = modules
    trainings = day.read_trainings(FOLDER / "trainings.txt")
    assert trainings["published"].startswith("clevr --model idspn")


@pytest.mark.slow
def test_rehearsal_of_every_part(tmp_path):
    command = [str(FOLDER / "run.sh"), "--rehearse", "--minutes", "60", "--results", str(tmp_path)]
    environment = os.environ | {"PYTHON": sys.executable}
    for _ in range(2):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    # The second time there was nothing left to do.
    lines = {p.stem: p.read_text().splitlines() for p in tmp_path.glob("*.jsonl")}
    assert {name for name, of in lines.items() if len(of) != 1} == set()
    kinds = {name.split("-")[0] for name in lines}
    assert kinds == {
        "device", "golden", "step", "matching", "train", "evaluate", "export", "layer", "torch",
        "precision", "ranks", "memory", "render", "replicates",
    }  # fmt: skip
    assert {"evaluate-published", "evaluate-fast"} <= lines.keys()
    golden = json.loads(lines["golden"][0])["result"]
    assert golden["float64_within"] == golden["float64_files"] > 0
    assert golden["float32_within"] == golden["float32_files"] > 0
    evaluated = json.loads(lines["evaluate-published"][0])["result"]
    assert "test" in json.dumps(evaluated)
    assert (tmp_path / "runs" / "published.zip").exists()
    assert "A rehearsal" in (tmp_path / "table.md").read_text()
