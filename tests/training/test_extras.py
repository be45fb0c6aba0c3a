"""What optional packages do for a run: Weights & Biases (offline), submitit (local jobs)."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import training_tasks
from training_tasks import compiled_once, no_figures  # noqa: F401

from msdspn_jax import cli
from msdspn_jax.training import run_folder

training_tasks.register()
SMALL = ["--steps", "2", "--evaluate-every", "1", "--no-progress"]


def test_wandb_offline_gets_settings_and_metrics(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="Weights & Biases is not installed: the wandb extra")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    folder = tmp_path / "run"
    assert cli.main(["train", "toy", "--run-dir", str(folder), "--wandb", *SMALL]) == 0
    (events,) = (folder / "wandb").glob("offline-run-*/*.wandb")
    content = events.read_bytes()
    for word in (b"train/loss", b"val/loss", b"learning_rate"):
        assert word in content, word


def test_wandb_that_is_not_installed_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    folder = str(tmp_path / "run")
    assert cli.main(["train", "toy", "--run-dir", folder, "--wandb", *SMALL]) == 2
    assert "pip install 'msdspn-jax[wandb]'" in capsys.readouterr().err


@pytest.mark.slow
def test_grid_of_local_jobs_trains_every_cell_and_reports_the_bad_one(tmp_path):
    pytest.importorskip("submitit", reason="submitit is not installed: the slurm extra")
    grid_dir = tmp_path / "grid"
    size = ["--set-size", "2", "--set-dim", "2", "--inner.num-steps", "1", "--hidden-dim", "4"]
    size += ["--latent-dim", "4", "--batch-size", "2", "--val-size", "4", "--test-size", "4"]
    argv = ["grid", "random-sets", "--grid-dir", str(grid_dir), "--executor", "local"]
    argv += [*size, *SMALL, "--seed", "0,1"]

    def grid():
        # A process of its own, as jobs are: submitit closes streams that pytest would capture.
        return subprocess.run(
            [sys.executable, "-m", "msdspn_jax.cli", *argv],
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
            timeout=300,
        )

    # A folder in the way of the second cell.
    grid_dir.mkdir()
    (grid_dir / "seed-1").write_text("")
    first = grid()
    assert first.returncode == 1, first.stderr
    assert run_folder.is_finished(grid_dir / "seed-0")
    assert "seed-1: " in first.stderr
    (grid_dir / "seed-1").unlink()
    second = grid()
    assert second.returncode == 0, second.stderr
    assert run_folder.is_finished(grid_dir / "seed-1")
    assert list((grid_dir / "jobs").glob("*_log.out"))


def test_submitit_that_is_not_installed_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "submitit", None)
    argv = ["grid", "toy", "--grid-dir", str(tmp_path), "--executor", "local", *SMALL]
    assert cli.main(argv) == 2
    assert "pip install 'msdspn-jax[slurm]'" in capsys.readouterr().err
