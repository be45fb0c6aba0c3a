"""The pages about one's own data and task: blocks and commands run, in their order."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from training_tasks import compiled_once, no_figures  # noqa: F401

from msdspn_jax import cli, tasks
from msdspn_jax.errors import UserError
from msdspn_jax.training import run_folder

DOCS = Path(__file__).parents[1] / "docs"
SMALL = ["--steps", "2", "--inner.num-steps", "2", "--batch-size", "4", "--no-progress"]
SMALL += ["--no-tensorboard"]


def blocks(page):
    """Kind and text of every block that is run."""
    return re.findall(r"^```(python|sh)\n(.*?)^```", (DOCS / page).read_text(), re.M | re.S)


def run_page(page, small, replacements):
    for number, (kind, text) in enumerate(blocks(page)):
        if kind == "python":
            for old, new in replacements.items():
                text = text.replace(old, new)
            exec(compile(text, f"{page}, block {number + 1}", "exec"), {})
            continue
        for line in text.replace("\\\n", "").splitlines():
            program, *argv = shlex.split(line)
            assert program == "msdspn"
            assert cli.main([*argv, *(small if argv[0] == "train" else ())]) == 0, line


@pytest.mark.slow
def test_figures_of_the_page_about_data(tmp_path, monkeypatch):
    """Small; named so that figures are drawn."""
    monkeypatch.chdir(tmp_path)
    small = [*SMALL, "--encoder-width", "2", "--hidden-dim", "4", "--latent-dim", "4"]
    run_page("own_data.md", small, {"num, n = 2000, 5": "num, n = 12, 5"})
    for name in ("boxes.png", "boxes-run/figures/predictions.png"):
        assert Path(name).stat().st_size > 2000


@pytest.mark.slow
def test_figures_of_the_page_about_data_as_it_stands(tmp_path, monkeypatch):
    """Verbatim; minutes on one core. It must have learned something."""
    monkeypatch.chdir(tmp_path)
    run_page("own_data.md", [], {})
    found = json.loads(Path("boxes-run/evaluation.json").read_text())["metrics"]["test"]
    # What the mean of all boxes would reach: about 0.2, as positions are uniform.
    assert found["error_x"] < 0.15
    assert found["size_right"] > 0.5
    data, predictions = np.load("boxes.npz"), np.load("predictions.npz")
    assert abs(predictions["mask"].sum(1) - data["mask"].sum(1)).mean() < 1


def test_the_page_about_data_makes_what_the_task_reads(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = blocks("own_data.md")[0][1].replace("num, n = 2000, 5", "num, n = 12, 5")
    exec(text, {})
    config = tasks.load("sets").Config(data="boxes.npz").completed()
    assert config.form.names == ("x", "y", "w", "h", "red", "green", "blue")
    assert (config.form.kind, config.form.presence) == ("images", True)


# --- a task in a file ---


@pytest.fixture
def boxes(tmp_path, monkeypatch):
    """The file of the page, in a folder of its own, which is not the current one."""
    kind, text = blocks("own_task.md")[0]
    assert kind == "python"
    assert len(text.splitlines()) < 40
    (tmp_path / "project").mkdir()
    path = tmp_path / "project" / "boxes.py"
    path.write_text(text)
    monkeypatch.chdir(tmp_path)
    return path


@pytest.mark.slow
def test_the_commands_of_the_page_about_tasks_run(boxes, monkeypatch, capsys):
    monkeypatch.chdir(boxes.parent)
    for line in blocks("own_task.md")[1][1].splitlines():
        argv = shlex.split(line)[1:]
        if argv[-1] == "--help":
            with pytest.raises(SystemExit):
                cli.main(argv)
            assert "Boxes in an image. (default: 3)" in capsys.readouterr().out
            continue
        small = SMALL if argv[0] in ("train", "grid") and "--resume" not in argv else []
        assert cli.main([*(x for x in argv if x not in ("--steps", "2000")), *small]) == 0, line
    assert run_folder.is_finished(boxes.parent / "runs" / "boxes-grid" / "num-boxes-2")


def test_a_task_of_ones_own_is_found_again_from_anywhere(boxes, tmp_path, monkeypatch, capsys):
    assert cli.main(["train", "project/boxes.py", "--run-dir", "run", *SMALL]) == 0
    record = run_folder.read_record("run")
    assert record["task"] == str(boxes)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert cli.main(["evaluate", "../run"]) == 0
    assert cli.main(["show", "../run"]) == 0
    assert cli.main(["train", str(boxes), "--run-dir", "../run", "--resume"]) == 0
    capsys.readouterr()
    assert cli.main(["train", "digits", "--run-dir", "../run", "--resume"]) == 2
    assert f"is a run of {boxes}, not of digits" in capsys.readouterr().err
    assert cli.main(["predict", "x.png", "--run", "../run", "--out", "out"]) == 2


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("missing.py", None, "missing.py: expected the file of a task, got nothing there"),
        ("empty.py", "", "empty.py: expected a class Config, derived from"),
        (
            "half.py",
            "class Config: ...\ndef build(c): ...",
            "half.py: expected a class Config",
        ),
        ("no.such.module", None, "task: expected a module that can be imported from here"),
        ("nothing", None, "task: expected one of random-sets, .* or a module such as"),
    ],
)
def test_what_is_no_task_is_refused(name, text, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=words):
        tasks.load(name)


def test_modules_are_tasks_and_their_own_errors_are_shown(boxes, monkeypatch):
    package = boxes.parent / "my_tasks_for_a_test"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "boxes.py").write_text(boxes.read_text())
    (package / "broken.py").write_text("import no_such_package_at_all")
    monkeypatch.chdir(boxes.parent)
    module = tasks.load("my_tasks_for_a_test.boxes")
    assert tasks.build("my_tasks_for_a_test.boxes", module.Config()).name == (
        "my_tasks_for_a_test.boxes"
    )
    assert tasks.word("my_tasks_for_a_test.boxes") == tasks.word(str(boxes)) == "boxes"
    assert tasks.load(str(boxes)) is tasks.load("boxes.py")
    with pytest.raises(ModuleNotFoundError, match="no_such_package_at_all"):
        tasks.load("my_tasks_for_a_test.broken")


@pytest.mark.parametrize(
    ("instead", "words"),
    [
        (("raise ValueError('wrong here')", "encoder ="), "msdspn train: wrong here"),
        (("def data(): raise ValueError('wrong here')", "encoder ="), "cannot be read: wrong here"),
    ],
)
def test_errors_of_a_task_of_ones_own_name_its_line(instead, words, boxes, capsys):
    text = boxes.read_text().replace("encoder =", "\n    ".join(instead))
    if "def data" in text:
        text = text.replace('Task(name="boxes"', 'Task(name="boxes", data=data')
    boxes.write_text(text)
    line = next(i for i, x in enumerate(text.splitlines(), 1) if "wrong here" in x)
    assert cli.main(["train", "project/boxes.py", "--run-dir", "run", *SMALL]) == 2
    assert f"{words} (boxes.py, line {line})" in capsys.readouterr().err
