"""A trained model is found again wherever it is kept, and without the data it was trained on."""

import inspect
import json

import jax
import numpy as np
import pytest
from PIL import Image

from msdspn_jax import cli, trained
from msdspn_jax.clevr import cache, files, procedural, tfds
from msdspn_jax.clevr.render import trace
from msdspn_jax.errors import UserError
from msdspn_jax.tasks.clevr import data as clevr_data
from msdspn_jax.tasks.clevr import task as clevr
from msdspn_jax.trained import program, weights
from msdspn_jax.training import run_folder
from msdspn_jax.training.checkpoints import Checkpoints
from msdspn_jax.training.state import init_states
from msdspn_jax.training.task import Task

SMALL = {"model": "slot-mlp", "size": 16, "slot_dim": 4, "hidden_dim": 4, "steps": 7}


def write_run(folder, config):
    """A run folder as training leaves it behind, without the training."""
    predictor, optimizer = clevr.build_predictor(config), clevr.outer_optimizer(config)
    shapes = jax.eval_shape(
        lambda: init_states(predictor.init, optimizer, config.seed, config.replicates)
    )
    rng = np.random.default_rng(0)
    state = jax.tree.map(lambda x: rng.uniform(0, 0.1, x.shape).astype(x.dtype), shapes)
    checkpoints = Checkpoints(folder / "checkpoints", monitor=clevr.MONITOR)
    for step, score in ((2, 0.1), (5, 0.3), (7, 0.2)):
        params = jax.tree.map(lambda x, step=step: x + np.float32(step / 100), state.params)
        checkpoints.save(state._replace(params=params), step, {}, {"ap_mean": score})
    checkpoints.wait()

    unused = {"sample": print, "loss": print, "evaluate": print}
    task = Task(name="clevr", init=predictor.init, optimizer=optimizer, **unused)
    run_folder.write_config(folder, task, config)
    return folder


@pytest.fixture
def without_data(monkeypatch):
    """Whatever reads or renders data raises."""

    def poisoned(*args, **kwargs):
        raise AssertionError("data was touched")

    for module in (cache, procedural, tfds):
        for name, thing in vars(module).items():
            own = getattr(thing, "__module__", None) == module.__name__
            if own and (inspect.isfunction(thing) or inspect.isclass(thing)):
                monkeypatch.setattr(module, name, poisoned)
    monkeypatch.setattr(files, "ClevrFolder", poisoned)
    monkeypatch.setattr(trace, "render", poisoned)
    for module in (clevr, clevr_data):
        monkeypatch.setattr(module, "load_split", poisoned)


DATA = {
    "procedural": {"data": "procedural", "train_size": 8},
    "fresh": {"data": "procedural", "fresh": True},
    "folder": {"data": "folder", "data_dir": "/no/such/folder"},
    "tfds": {"data": "tfds", "data_dir": "/no/such/folder"},
}


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(flags, id=name, marks=() if name == "folder" else pytest.mark.slow)
        for name, flags in DATA.items()
    ],
)
def test_no_data_is_touched_to_predict_with_a_run_and_to_export_it(
    data, tmp_path, without_data, capsys
):
    config = clevr.Config(**SMALL, **data, cache_dir=str(tmp_path / "cache"))
    run = write_run(tmp_path / "run", config)
    copy, image = tmp_path / "w.safetensors", tmp_path / "image.png"
    Image.new("RGB", (16, 16), (9, 99, 199)).save(image)
    for flags in (["--run", run], ["--run", run, "--checkpoint", "7"]):
        argv = ["export", *flags, "--weights", copy, "--out", tmp_path / "p.zip", "--overwrite"]
        argv += ["--platforms", "cpu"]
        assert cli.main([*map(str, argv)]) == 0, capsys.readouterr().err
        found = []
        for source in (flags, ["--weights", copy], ["--program", tmp_path / "p.zip"]):
            argv = ["predict", image, *source, "--out", tmp_path / "out", "--overwrite"]
            if "--program" not in source:
                argv += ["--threshold", "0.5"]
            assert cli.main([*map(str, argv), "--no-pictures"]) == 0, capsys.readouterr().err
            written = json.loads((tmp_path / "out" / "predictions.json").read_text())
            assert written["info"]["step"] == (7 if "--checkpoint" in flags else 5)
            found.append(written["scenes"][0]["objects"])
        assert [len(x) for x in found] == [len(found[0])] * 3
        scores = [[o["score"] for o in objects] for objects in found]
        np.testing.assert_allclose(scores[1:], [scores[0]] * 2, atol=1e-5)
    assert not (tmp_path / "cache").exists()


def test_find_says_what_it_found(tmp_path, monkeypatch, capsys):
    config = clevr.Config(**SMALL, replicates=2)
    run = write_run(tmp_path / "run", config)
    with pytest.warns(UserWarning, match="a run of 2 seeds; the model is the first one's, seed 0"):
        model = trained.find(run=run)
    assert isinstance(model, weights.Model)
    assert (model.step, model.source, model.task_name) == (5, str(run), "clevr")
    expected = jax.eval_shape(clevr.build_predictor(config).init, jax.random.key(0))
    assert jax.tree.map(np.shape, model.variables) == jax.tree.map(np.shape, expected)
    capsys.readouterr()
    argv = ["export", "--run", str(run), "--checkpoint", "latest", "--weights"]
    assert cli.main([*argv, str(tmp_path / "latest.safetensors")]) == 0
    said = f"msdspn export: {run}: a run of 2 seeds; the model is the first one's, seed 0\n"
    assert capsys.readouterr().err == said
    assert trained.find(weights=tmp_path / "latest.safetensors").step == 7
    path = tmp_path / "w.safetensors"
    weights.save_model(path, config, model.variables, step=3)
    assert trained.find(weights=path).source == str(path)
    monkeypatch.setattr(weights, "box_model_path", lambda: path)
    assert trained.find().source == "w.safetensors"
    zip_path = tmp_path / "p.zip"
    program.save_program(
        zip_path, lambda x: jax.numpy.zeros((x.shape[0], 2, 19)), size=4, platforms=("cpu",)
    )
    found = trained.find(program=zip_path)
    assert isinstance(found, program.Program)
    assert (found.source, found.settings["set_size"]) == (str(zip_path), 2)


def test_what_is_not_a_model_of_images_is_refused(tmp_path):
    with pytest.raises(UserError, match="give only one of --run, --program"):
        trained.find(run="a", program="b")
    with pytest.raises(
        UserError, match="--checkpoint latest: expected --run FOLDER with it, got none"
    ):
        trained.find(checkpoint="latest")
    with pytest.raises(UserError, match="is not a run folder"):
        trained.find(run=tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"task": "digits", "config": {}}))
    with pytest.raises(UserError, match="a run of the task digits, expected clevr"):
        trained.find(run=tmp_path)
    for text in ("[]", "{", '{"task": "digits"}', '{"task": 3, "config": {}}'):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match=r"config\.json is damaged"):
            trained.find(run=tmp_path)
