"""What version 0.1.0 wrote still loads; see data/v0_1_0/README.md."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from msdspn_jax import cli, trained
from msdspn_jax.training import run_folder
from msdspn_jax.training.state import run_keys

OLD = Path(__file__).parents[1] / "data" / "v0_1_0"
IMAGES = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)


@pytest.fixture
def expected():
    with np.load(OLD / "clevr_idspn_predictions.npz") as arrays:
        return arrays["objects"]


@pytest.mark.parametrize("name", ["random_sets", "numbering"])
def test_a_run_folder_scores_as_it_did(name):
    from msdspn_jax.trained.run import load_run

    record = json.loads((OLD / name / "evaluation.json").read_text())
    run = load_run(OLD / name)
    assert (run.task_name, run.step) == (name.replace("_", "-"), 6)
    for split, scores in record["metrics"].items():
        found = run.task.evaluate(run.variables[0], split, run_keys(run.config.seed).evaluation)
        assert found.keys() == scores.keys()
        for metric, value in scores.items():
            assert float(found[metric]) == pytest.approx(value, rel=1e-4, abs=1e-6), metric


@pytest.mark.parametrize("name", ["random_sets", pytest.param("numbering", marks=pytest.mark.slow)])
def test_a_run_is_shown_evaluated_and_gone_on_with(name, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(OLD / name, folder)
    assert run_folder.is_finished(folder)
    assert cli.main(["show", str(folder)]) == 0
    assert cli.main(["evaluate", str(folder), "--no-figures"]) == 0
    # With the flags that it was begun with, as far as no others are given.
    argv = ["train", name.replace("_", "-"), "--run-dir", str(folder), "--resume", "--steps", "8"]
    assert cli.main([*argv, "--no-progress"]) == 2
    differences = [x for x in capsys.readouterr().err.splitlines() if x.startswith("  --")]
    assert differences == ["  --steps: the run has 6, asked for 8"]
    assert cli.main([*argv, "--no-progress", "--allow-config-change"]) == 0
    assert "resuming at step 6" in capsys.readouterr().err
    assert run_folder.read_metrics(folder, "val")[-1]["step"] == 8


def test_a_weights_file_predicts_as_it_did(expected):
    model = trained.find(weights=OLD / "clevr_idspn.safetensors")
    assert (model.step, model.num_inner_steps(), model.config.size) == (3, 3, 64)
    objects = jax.jit(model.predict)(model.variables, IMAGES)
    np.testing.assert_allclose(objects, expected, atol=1e-3, rtol=1e-3)


def test_a_program_predicts_as_it_did(expected):
    program = trained.find(program=OLD / "clevr_idspn.zip")
    assert (program.settings["step"], program.settings["inner_steps"]) == (3, 3)
    np.testing.assert_allclose(jax.jit(program.predict)(IMAGES), expected, atol=1e-3, rtol=1e-3)
