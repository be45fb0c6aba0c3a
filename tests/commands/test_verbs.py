"""The command line: dispatch, help, train, resume, evaluate, show, grid, report, demo."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest
import training_tasks
from training_tasks import compiled_once, configured, no_figures  # noqa: F401

import msdspn_command
from msdspn_jax import cli, tasks
from msdspn_jax.adjoints import neumann
from msdspn_jax.commands import grid
from msdspn_jax.commands import train as train_command
from msdspn_jax.errors import UserError
from msdspn_jax.models.inner import Inner
from msdspn_jax.tasks import summary
from msdspn_jax.training import run_folder
from msdspn_jax.training.config import as_flags

training_tasks.register()
SMALL = ["--steps", "2", "--evaluate-every", "1", "--no-progress"]


def test_help_names_every_verb_and_every_verb_exists(capsys):
    import importlib.util

    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    for verb in msdspn_command.VERBS:
        assert f"\n  {verb} " in text
        assert importlib.util.find_spec(f"msdspn_jax.commands.{verb}") is not None, verb


def test_help_does_not_wait_for_jax():
    code = "import sys, msdspn_command; msdspn_command.main(); sys.exit('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout == msdspn_command.usage()


def test_a_reader_that_leaves_early_gets_no_traceback():
    # `true` is gone long before Python has started; `head` might read it all.
    command = "train clevr --help | true; exit ${PIPESTATUS[0]}"
    script = f"{sys.executable} -m msdspn_command {command}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (141, "")


def test_unknown_words_are_answered_with_the_nearest(capsys):
    assert cli.main(["trian"]) == 2
    assert "Did you mean 'train'?" in capsys.readouterr().err
    assert cli.main(["train", "no-such-task"]) == 2
    assert "task: expected one of random-sets, digits" in capsys.readouterr().err
    assert cli.main([]) == 2


@pytest.mark.parametrize("task", ["random-sets", "digits", "numbering", "clevr", "sets"])
def test_every_flag_has_help(task, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", task, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    # From one flag to the next: its name, its value, what it is for.
    helps = re.split(r"\n\W*(?=--[a-z])", text)
    shown = as_flags(tasks.load(task).Config().to_dict())
    for flag in [x for x in shown if not x.startswith("--form.")]:
        (found,) = [x for x in helps if re.match(rf"{flag}\b(?![.-])", x)]
        about = re.sub(r"--[\w.-]+|\(default.*|\b[A-Z]+\b|{[^}]*}", "", found)
        assert len(re.findall(r"[a-z]{2,}", about)) >= 2, found


def test_help_of_a_task_shows_groups_and_defaults(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "digits", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    groups = ["run options", "devices options", "safety options", "inner options"]
    where = [text.index(words) for words in groups]
    assert where == sorted(where)
    assert "Training steps (one step: one batch). (default: 5000)" in text
    assert "--run-dir STR" in text
    assert "--inner.adjoint ADJOINT" in text


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--batch-size", "0"], "batch_size: expected an integer >= 1, got 0"),
        (["--set-size", "0"], "set_size: expected an integer >= 1, got 0"),
        (["--inner.num-steps", "0"], "num_steps: expected an integer >= 1, got 0"),
        (["--inner.adjoint", "sideways"], "adjoint: expected 'identity', 'identity:straight"),
        (["--model", "dspn", "--inner.adjoint", "identity"], "expected unrolled for model dspn"),
        (["--resume"], "--resume needs --run-dir"),
        (["--num-processes", "2"], "need --coordinator"),
        (["--coordinator", "here:1"], "several machines need --run-dir"),
        (["--coordinator", "here:1", "--run-dir", "x"], "needs --num-processes and --process-id"),
        # Flags of 0.1.0.
        (["--inner-steps", "3"], "--inner-steps: expected its name since version 0.2, --inner.num"),
        (["--backward=identity"], "--backward: expected its name since version 0.2, --inner.adj"),
        (["--max_grad_norm", "1"], "since version 0.2, --inner.max-grad-norm"),
    ],
)
def test_flags_that_make_no_sense(argv, words, capsys):
    assert cli.main(["train", "random-sets", *argv]) == 2
    assert words in capsys.readouterr().err


def test_flags_of_groups():
    argv = [
        "--inner.num-steps",
        "3",
        "--inner.adjoint",
        "neumann:2",
        "--inner.max-grad-norm",
        "inf",
    ]
    argv += ["--run-dir", "x", "--parallel", "pmap", "--skip-bad-steps", "4", "--no-tensorboard"]
    config = train_command.parse("random-sets", argv)
    assert config.inner == Inner(num_steps=3, adjoint=neumann(2), max_grad_norm=math.inf)
    assert (config.run.dir, config.run.tensorboard) == ("x", False)
    assert (config.devices.parallel, config.safety.skip_bad_steps) == ("pmap", 4)


def test_resume_takes_what_is_not_given_from_the_run(tmp_path, capsys):
    folder = str(tmp_path / "run")
    assert cli.main(["train", "toy", "--run-dir", folder, "--noise", "0.25", *SMALL]) == 0
    config = train_command.parse("toy", ["--run-dir", folder, "--resume"])
    assert config.noise == 0.25
    assert config.steps == 2
    assert config.run.resume
    assert not config.run.progress
    assert cli.main(["train", "toy", "--run-dir", folder, "--resume"]) == 0
    assert cli.main(["train", "toy", "--run-dir", folder, "--resume", "--noise", "0.5"]) == 2
    capsys.readouterr()
    assert cli.main(["evaluate", folder, "--inner.num-steps", "9"]) == 2
    assert "--inner.num-steps: expected a task whose Config is derived" in capsys.readouterr().err


def test_random_sets_from_training_to_figures(tmp_path, capsys, monkeypatch):
    folder = tmp_path / "run"
    size = ["--set-size", "2", "--set-dim", "2", "--inner.num-steps", "2", "--hidden-dim", "8"]
    size += ["--latent-dim", "8", "--batch-size", "4", "--val-size", "10", "--test-size", "6"]
    size += ["--inner.eval-num-steps", "3"]
    assert cli.main(["train", "random-sets", "--run-dir", str(folder), *size, *SMALL]) == 0
    for name in ("predictions", "inner_loop", "strip", "curves"):
        assert (folder / "figures" / f"{name}.png").stat().st_size > 2000
    (folder / "figures" / "strip.png").unlink()
    capsys.readouterr()
    assert cli.main(["evaluate", str(folder)]) == 0
    assert "test" in capsys.readouterr().out
    found = json.loads((folder / "evaluation.json").read_text())["metrics"]
    assert not run_folder.read_metrics(folder, "test")
    assert found["val"]["loss"] == pytest.approx(run_folder.read_metrics(folder, "val")[-1]["loss"])
    assert (folder / "figures" / "strip.png").exists()
    assert cli.main(["evaluate", str(folder), "--checkpoint", "77"]) == 2
    # Decoded otherwise: kept apart, a record for each set of flags.
    for flags in (["9"], ["3"], ["9", "--inner.momentum", "0.5"]):
        more = ["evaluate", str(folder), "--inner.num-steps", *flags]
        assert cli.main([*more, "--split", "val"]) == 0
    assert cli.main([*more, "--split", "test"]) == 0
    records = run_folder.read_decodings(folder)
    assert [x["inner"] for x in records] == [
        {"num_steps": 9},
        {"num_steps": 3},
        {"num_steps": 9, "momentum": 0.5},
    ]
    assert set(records[2]["metrics"]) == {"val", "test"}
    losses = [x["metrics"]["val"]["loss"][0] for x in records]
    assert len(set(losses)) == 3
    assert losses[1] == found["val"]["loss"]  # The run's own number of steps.
    assert json.loads((folder / "evaluation.json").read_text())["metrics"] == found
    capsys.readouterr()
    assert cli.main(["evaluate", str(folder), "--inner.num-starts", "0"]) == 2
    assert "--inner.num-starts: expected an integer >= 1, got 0" in capsys.readouterr().err
    assert cli.main(["show", str(folder)]) == 0
    shown = capsys.readouterr().out
    for word in ("random-sets", "--set-size", "finished", "strip.png", "checkpoints: 1, 2"):
        assert word in shown.replace("\n", "")
    opened = []
    monkeypatch.setattr(subprocess, "Popen", lambda command, **_: opened.append(command[-1]))
    assert cli.main(["show", str(folder), "--open"]) == 0
    assert {Path(path).name for path in opened} >= {"strip.png", "curves.png"}
    assert cli.main(["show", str(tmp_path)]) == 0
    assert cli.main(["show", str(folder / "figures")]) == 2


# --- grids ---


def test_grid_expands_commas():
    cells = grid.expand(
        "random-sets", ["--set-size", "2,4", "--set-dim=3", "--variant", "idspn,dspn"]
    )
    assert [cell.name for cell in cells] == [
        "set-size-2_variant-idspn",
        "set-size-2_variant-dspn",
        "set-size-4_variant-idspn",
        "set-size-4_variant-dspn",
    ]
    assert (
        " ".join(cells[3].arguments) == "--set-size 4 --set-dim 3 --model dspn --inner.momentum 0"
    )


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--set-size 2,0", "set_size: expected an integer >= 1, got 0"),
        ("--set-size 2,2", "names a value twice"),
        ("--variant best", "--variant: expected one of"),
        ("--run-dir x", "grid's own affair"),
        ("--inner-steps 3", "--inner.num-steps"),
        ("set-size 3", "expected a flag"),
    ],
)
def test_grid_refuses_before_its_first_cell(argv, words):
    with pytest.raises(UserError, match=words):
        grid.expand("random-sets", argv.split())


def test_grid_skips_finished_resumes_unfinished_and_refuses_others(tmp_path, monkeypatch, capsys):
    argv = ["grid", "toy", "--noise", "0.1,0.2", "--grid-dir", str(tmp_path), *SMALL]
    assert cli.main([*argv, "--max-cells", "1"]) == 0
    trained = []
    real = grid.train_cell
    monkeypatch.setattr(
        grid, "train_cell", lambda t, cell, f: trained.append(cell.name) or real(t, cell, f)
    )
    first, second = tmp_path / "noise-0.1", tmp_path / "noise-0.2"
    assert run_folder.is_finished(first)
    assert not second.exists()
    # An unfinished cell: begun, then its last step forgotten.
    assert cli.main(argv) == 0
    assert trained == ["noise-0.2"]
    run_folder.truncate_metrics(second, 1)
    import shutil

    shutil.rmtree(second / "checkpoints" / "2")
    assert cli.main([*argv, "--dry-run"]) == 0
    assert "unfinished  noise-0.2" in capsys.readouterr().out
    assert cli.main(argv) == 0
    assert trained == ["noise-0.2", "noise-0.2"]
    assert run_folder.is_finished(second)
    assert cli.main([*argv, "--seed", "3"]) == 2
    assert "--seed: the run has 0, asked for 3" in capsys.readouterr().err


def test_one_diverging_cell_does_not_stop_the_grid(tmp_path, capsys):
    argv = ["grid", "toy", "--bad-step", "1,5", "--grid-dir", str(tmp_path), *SMALL]
    assert cli.main(argv) == 1
    assert run_folder.is_finished(tmp_path / "bad-step-5")
    assert "bad-step-1: step 1: the loss is not finite" in capsys.readouterr().err


def test_cells_that_differ_in_another_flag_are_told_apart(tmp_path):
    from msdspn_jax.tasks.autoencoding import report
    from msdspn_jax.trained import run

    for i, (starts, rate, loss) in enumerate([(None, None, 0.5), (4, None, 0.4), (4, 1e-4, None)]):
        config = configured(
            tasks.load("random-sets").Config, set_size=8, steps=5, learning_rate=rate,
            inner=Inner(num_steps=10, eval_num_starts=starts),
        ).to_dict()  # fmt: skip
        record = {"task": "random-sets", "config": config, "devices": ["cpu"], "num_devices": 1}
        (tmp_path / str(i)).mkdir()
        (tmp_path / str(i) / "config.json").write_text(json.dumps(record))
        line = {"step": 5, "split": "val", "loss": loss}  # None: it was not finite.
        (tmp_path / str(i) / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    rows = report.collect(tmp_path, run)
    losses = {row.variant: row.loss for row in rows}
    name = "iDSPN, momentum, --inner.eval-num-starts {}, --learning-rate {}"
    diverged = name.format(4, 0.0001)
    assert list(losses) == [name.format(1, 0.001), diverged, name.format(4, 0.001)]
    assert math.isnan(losses.pop(diverged))
    assert list(losses.values()) == [0.5, 0.4]
    assert not any(row.comparable for row in rows)


@pytest.mark.parametrize("steps", [5, 20_000])
def test_report_makes_tables_and_charts(tmp_path, steps):
    for n, model, momentum, loss in (
        (8, "idspn", None, 0.01),
        (8, "dspn", 0.9, 0.04),
        (4, "idspn", 0.0, 0.02),
        (4, "dspn", 0.9, 0.02),
    ):
        folder = tmp_path / "grid" / f"{n}-{model}"
        folder.mkdir(parents=True)
        config = configured(
            tasks.load("random-sets").Config, set_size=n, model=model, steps=steps, replicates=3,
            inner=Inner(num_steps=10, momentum=momentum),
        ).to_dict()  # fmt: skip
        record = {"task": "random-sets", "config": config, "devices": ["cpu"], "num_devices": 1}
        (folder / "config.json").write_text(json.dumps(record))
        for number, value in ((10, loss), (20, loss / 4)):
            found = {"val": {"loss": [value] * 3}}
            run_folder.write_decoding(folder, steps, {"num_steps": number}, found)
        line = {"step": steps, "split": "val", "loss": loss, "loss_std": loss / 10}
        (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    out = tmp_path / "out"
    argv = ["report", "random-sets", "--runs", str(tmp_path / "grid"), "--out", str(out)]
    assert cli.main(argv) == 0
    text = (out / "grid.md").read_text()
    assert "| 8 | 8 | 10 | 0.0400 ± 0.0040 |  | 0.0100 ± 0.0010 |" in text
    assert "| 8 | 1.00 |" in text
    assert "0.25" in text  # 0.01 ÷ 0.04
    for name in ("by_n", "by_d", "by_inner_steps"):
        assert (out / f"{name}.png").stat().st_size > 2000
    # What was trained for five steps does not stand beside what was trained for 20,000.
    cell = "0.0100 ± 0.0010 (20,000 steps, 0.0 h, 3 seeds)"
    row = f"| iDSPN, momentum | 10 |  | {cell} | 0.0100 | 0.0025 |\n"
    row += "| iDSPN, momentum | 20 | 0.003 |  |  |  |"
    assert (row in text) == (steps == 20_000)
    for name in ("by_decoding.png", "learning.png"):
        assert (out / name).exists() == (steps == 20_000)
    assert cli.main([*argv[:3], str(tmp_path / "nothing")]) == 2
    # The summary holds what is comparable, and other experiments' rows as they stand.
    (tmp_path / "benchmarks").mkdir()
    other = summary.Result("speed", "", "", "3 | 4", "small", "0.1", "msdspn bench layer")
    summary.write_results(tmp_path / "benchmarks", [other], "layer")
    page = tmp_path / "README.md"
    argv = ["report", "all", "--runs", str(tmp_path / "grid"), "--experiments", str(tmp_path)]
    page.write_text("before\n")
    assert cli.main([*argv, "--readme", str(page)]) == 2
    begin, end = summary.marks()
    page.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    assert cli.main([*argv, "--readme", str(page)]) == 0
    text = page.read_text()
    assert text.startswith(f"before\n{begin}\n| experiment |")
    assert text.endswith("| `msdspn bench layer` |\n" + end + "\nafter\n")
    assert "old" not in text
    assert "3 \\| 4" in text
    row = (
        "| 20 inner steps: 0.003; 40 inner steps: 0.002 | 10 inner steps: 0.0100, decoded with 20: "
    )
    row += "0.0025 |"
    assert (row in text) == (steps == 20_000)


def test_report_all_runs_the_scripts_of_the_experiments(tmp_path, capsys):
    page = tmp_path / "README.md"
    page.write_text("{}\n{}\n".format(*summary.marks()))
    (tmp_path / "digits").mkdir()
    script = tmp_path / "digits" / "report.py"
    row = summary.Result("digits", "", "", "0.25", "small", "0.1", "run.sh")
    script.write_text(
        "from pathlib import Path\n"
        "from msdspn_jax.tasks.summary import Result, write_results\n"
        f"write_results(Path(__file__).parent, [{row!r}])\n"
    )
    argv = ["report", "all", "--experiments", str(tmp_path), "--readme", str(page)]
    assert cli.main(argv) == 0
    assert "| 0.25 |" in page.read_text()
    # A script that fails is named with its last words, and the page stays.
    script.write_text("raise SystemExit('no records here')\n")
    before = page.read_text()
    assert cli.main(argv) == 2
    assert page.read_text() == before
    said = " ".join(capsys.readouterr().err.split())
    assert "report.py ended with 1: no records here" in said.replace(str(tmp_path), "")


@pytest.mark.slow
def test_the_demo_shows_what_it_says(tmp_path, capsys):
    folder = tmp_path / "demo"
    assert cli.main(["demo", "--folder", str(folder)]) == 0
    text = capsys.readouterr().out
    accuracy = {
        name: float(share)
        for name, share in re.findall(r"(\w+): ([\d.]+)% of 512 unseen multisets", text)
    }
    assert accuracy["iDSPN"] > 80
    assert accuracy["DeepSets"] == 0
    assert "no two differ" in text
    (few, few_unrolled), (many, many_unrolled) = re.findall(r"(\d+) MiB .* (\d+) MiB", text)
    assert few == many
    assert int(many_unrolled) > 3 * int(few_unrolled) > 3 * int(few)
    found = re.findall(r"Scene \d: (\d+) of (\d+) objects", text)
    assert sum(int(right) for right, _ in found) >= sum(int(total) for _, total in found) / 2
    assert (folder / "demo.png").stat().st_size > 50_000


def test_compilation_cache_can_be_moved_and_turned_off(tmp_path, monkeypatch):
    from msdspn_jax import _cache as cache

    before = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        monkeypatch.setenv(cache.VARIABLE, "off")
        assert cache.enable_compilation_cache() is None
        monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "xla"))
        assert cache.enable_compilation_cache() == tmp_path / "xla"
        assert Path(jax.config.jax_compilation_cache_dir).is_dir()  # type: ignore[attr-defined]
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
