import json
import os
import subprocess
import sys
import zipfile
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

from msdspn_jax import cli
from msdspn_jax.clevr import objects as layout
from msdspn_jax.errors import UserError
from msdspn_jax.models.inner import Inner
from msdspn_jax.tasks.clevr import model as clevr_model
from msdspn_jax.tasks.clevr import task as clevr
from msdspn_jax.trained import program as programs
from msdspn_jax.trained import weights as weights_files
from msdspn_jax.training.config import TrainConfig

# What a machine without the model's code is like: nothing of it can be imported.
BLOCK = """
import sys, types

class Blocked:
    def __init__(self, names):
        self.names = names
    def find_spec(self, name, path=None, target=None):
        if name in self.names or name.startswith(tuple(n + "." for n in self.names)):
            raise ModuleNotFoundError(f"{name} is blocked", name=name)

"""
ALONE = (
    BLOCK
    + """
sys.meta_path.insert(0, Blocked(["msdspn_jax", "flax", "optax", "safetensors"]))
exec(compile(open(sys.argv.pop(1)).read(), "predict.py", "exec"))
"""
)
WITHOUT_MODELS = (
    BLOCK
    + """
# The package's front door names a few classes of this module; here they are names alone.
stub = types.ModuleType("msdspn_jax.models.set_predictor")
stub.SetDecoder = stub.SetPredictor = stub.random_initial_sets = stub.set_autoencoder = None
sys.modules[stub.__name__] = stub
blocked = ["msdspn_jax.models.resnet", "msdspn_jax.models.slot_attention"]
blocked += ["msdspn_jax.tasks.clevr.model"]
sys.meta_path.insert(0, Blocked(blocked))
from msdspn_jax import cli
sys.exit(cli.main(sys.argv[1:]))
"""
)


def random_variables(config, scale=0.1):
    """Variables of the right shapes; drawn here because the network's own init compiles long."""
    shapes = jax.eval_shape(clevr.build_predictor(config).init, jax.random.key(0))
    rng = np.random.default_rng(0)
    # Not negative: variances are among them.
    return jax.tree.map(lambda x: rng.uniform(0, scale, x.shape).astype(x.dtype), shapes)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Weights of a small model by its name."""
    folder = tmp_path_factory.mktemp("weights")
    for name in ("slot-mlp", "slot-attention"):
        config = clevr.Config(model=name, size=16, slot_dim=4, slot_iterations=1, hidden_dim=4)
        variables = random_variables(config)
        weights_files.save_model(folder / f"{name}.safetensors", config, variables, step=3)
    return lambda name: folder / f"{name}.safetensors"


@pytest.fixture
def box(weights, monkeypatch):
    """Puts one of them into the box; gives its file."""

    def put(name):
        monkeypatch.setattr(weights_files, "box_model_path", lambda: weights(name))
        return weights(name)

    return put


def run(code, cache, *argv):
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, argv)],
        capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip


def test_a_program_runs_without_the_model(box, tmp_path):
    weights, path = box("slot-mlp"), tmp_path / "model.zip"
    argv = ["export", "--out", str(path), "--threshold", "-10", "--no-check"]
    assert cli.main(argv) == 0
    image = tmp_path / "image.png"
    pixels = np.random.default_rng(1).integers(0, 256, (16, 16, 3), np.uint8)
    Image.fromarray(pixels).save(image)

    model = weights_files.load_model(weights)
    keys = jax.random.key(0)[None]
    predict = jax.jit(model.predictor.predict)
    expected = np.asarray(predict(model.variables, pixels[None], keys).objects[0])
    found = layout.decode(expected, threshold=-10)
    assert len(found) == 10

    with zipfile.ZipFile(path) as archive:
        (tmp_path / "predict.py").write_bytes(archive.read("predict.py"))
        settings = json.loads(archive.read("settings.json"))
    assert settings["model"] == "slot-mlp"
    assert (settings["size"], settings["step"], settings["seed"]) == (16, 3, 0)
    assert settings["threshold"] == -10
    assert settings["platforms"] == ["cpu", "cuda", "rocm", "tpu"]
    alone = run(ALONE, tmp_path / "cache", tmp_path / "predict.py", path, image)
    assert alone.returncode == 0, alone.stderr
    lines = alone.stdout.splitlines()
    assert len(lines) == 10
    for line, o in zip(lines, found, strict=True):
        words, numbers = line.split("[")
        assert words.split() == [o.material, o.color, o.shape, o.size]
        np.testing.assert_allclose(np.fromstring(numbers[:-1], sep=" "), o.position, atol=1e-4)

    out = tmp_path / "out"
    argv = ["predict", "--program", path, image, "--out", out, "--no-pictures"]
    verb = run(WITHOUT_MODELS, tmp_path / "cache", *argv)
    assert verb.returncode == 0, verb.stderr
    (scene,) = json.loads((out / "predictions.json").read_text())["scenes"]
    scores = sorted((o.score for o in found), reverse=True)
    np.testing.assert_allclose([o["score"] for o in scene["objects"]], scores, atol=1e-5)


def test_weights_and_program_predict_the_same_for_any_batch(box, tmp_path, capsys):
    weights = box("slot-attention")
    path, copy = tmp_path / "model.zip", tmp_path / "copy.safetensors"
    flags = ["--out", str(path), "--weights", str(copy), "--seed", "4", "--no-check"]
    flags += ["--platforms", "cpu"]
    assert cli.main(["export", *flags]) == 0
    assert copy.read_bytes() == weights.read_bytes()
    assert cli.main(["export", *flags]) == 2
    assert "--overwrite" in capsys.readouterr().err
    bytes_before = path.read_bytes()
    assert cli.main(["export", *flags, "--overwrite"]) == 0
    assert path.read_bytes() == bytes_before
    with zipfile.ZipFile(path) as archive:
        program = archive.read("model.jax_export")
    assert b"conv1" in program
    assert b".py" not in program  # Nothing of the machine that exported.

    images = []
    for i in range(5):
        images.append(str(tmp_path / f"{i}.png"))
        pixels = np.random.default_rng(i).integers(0, 256, (16, 16, 3), np.uint8)
        Image.fromarray(pixels).save(images[-1])
    found = []
    # Slots are drawn anew by every program: from the seed, and not from an image's place.
    for source in (["--program", str(path)], ["--weights", str(copy), "--seed", "4"]):
        out = tmp_path / f"out{len(found)}"
        batch = ("2", "8")[len(found)]
        argv = [*images, "--out", str(out), "--batch-size", batch, "--threshold", "-10"]
        assert cli.main(["predict", *source, *argv, "--no-pictures"]) == 0
        scenes = json.loads((out / "predictions.json").read_text())["scenes"]
        found.append([[o["score"] for o in s["objects"]] for s in scenes])
    np.testing.assert_allclose(*found, atol=1e-5)


# jaxtyping cannot tell whether shapes of unknown size broadcast.
@pytest.mark.usefixtures("without_hook")
def test_a_minimiser_is_exported_with_its_inner_steps(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(clevr_model.STAGES, "resnet18", (1, 1, 1, 1))
    config = clevr.Config(
        model="idspn", size=64, encoder_width=2, latent_dim=4, hidden_dim=4,
        inner=Inner(eval_num_steps=3),
    )  # fmt: skip
    path = tmp_path / "m.safetensors"
    weights_files.save_model(path, config, random_variables(config, 0.3), step=1)
    monkeypatch.setattr(weights_files, "box_model_path", lambda: path)
    out, asked = tmp_path / "m.zip", []
    predict = clevr_model.Predictor.predict

    def spy(self, *args, inner_steps=None):
        asked.append(inner_steps)
        return predict(self, *args, inner_steps=inner_steps)

    monkeypatch.setattr(clevr_model.Predictor, "predict", spy)
    argv = ["export", "--out", str(out), "--platforms", "cpu", "--inner-steps", "2"]
    assert cli.main(argv) == 0
    assert set(asked) == {2}
    # It was run beside the model, which is where a program that does something else is noticed.
    printed = capsys.readouterr().out
    assert float(printed.split("differs from the model by at most ")[1].split()[0]) < 1e-4
    assert programs.load_program(out).settings["inner_steps"] == 2
    monkeypatch.setattr(programs, "difference", lambda *_: 0.1)
    assert cli.main([*argv, "--overwrite"]) == 2
    assert "predictions differ from the model's by 1.0e-01" in capsys.readouterr().err


def test_every_image_has_the_key_of_the_seed():
    class Predictor:
        def predict(self, variables, images, keys, *, inner_steps):
            objects = (variables, jax.random.key_data(keys), inner_steps)
            return SimpleNamespace(objects=objects)

    model = weights_files.Model(TrainConfig(), {}, 0, Predictor(), {})
    objects: Any = model.predict({"v": 1}, np.zeros((3, 2)), inner_steps=7, seed=4)
    variables, keys, steps = objects
    assert (variables, steps) == ({"v": 1}, 7)
    np.testing.assert_array_equal(keys, [jax.random.key_data(jax.random.key(4))] * 3)


def test_a_run_is_exported(weights, tmp_path, monkeypatch, capsys):
    model, asked = weights_files.load_model(weights("slot-mlp")), []

    def load_predictor(folder, *, checkpoint):
        asked.append(checkpoint)
        return model._replace(step=9, source=str(folder))

    monkeypatch.setattr("msdspn_jax.trained.run.load_predictor", load_predictor)
    out = tmp_path / "w.safetensors"
    argv = ["export", "--run", str(tmp_path), "--weights", str(out), "--overwrite"]
    for flags in ([], ["--checkpoint", "latest"], ["--checkpoint", "9"]):
        assert cli.main([*argv, *flags]) == 0
    assert asked == ["best", "latest", 9]
    assert weights_files.load_model(out).step == 9
    assert cli.main([*argv, "--checkpoint", "newest"]) == 2
    assert "--checkpoint: expected best, latest or a step, got 'newest'" in capsys.readouterr().err


def test_bad_flags_are_told(box, tmp_path, capsys):
    box("slot-attention")

    def message(*argv):
        assert cli.main(["export", *map(str, argv)]) == 2
        return capsys.readouterr().err

    assert "give --out FILE" in message()
    a = tmp_path / "a"
    assert "name the same file" in message("--out", a, "--weights", tmp_path / "x" / ".." / "a")
    assert "is a folder" in message("--out", tmp_path)
    assert "--inner-steps: expected at least 1" in message("--out", a, "--inner-steps", 0)
    assert "slot-attention has no inner loop" in message("--out", a, "--inner-steps", 3)
    assert "is not a run folder" in message("--out", a, "--run", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"task": "digits", "config": {}}))
    assert "a run of the task digits, expected clevr" in message("--out", a, "--run", tmp_path)
    assert not a.exists()


def constant(images):
    return jax.numpy.zeros((images.shape[0], 10, 19)) + images.mean()


def test_damaged_and_foreign_programs_are_refused(tmp_path):
    path = tmp_path / "a.zip"
    programs.save_program(path, constant, size=4, platforms=("tpu",))
    with pytest.raises(UserError, match="the program is for tpu, this machine has cpu"):
        programs.load_program(path)
    good = path.read_bytes()

    def rewritten(**changes):
        with zipfile.ZipFile(path) as archive:
            parts = {name: archive.read(name) for name in archive.namelist()}
        settings = json.loads(parts["settings.json"]) | changes
        with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
            archive.writestr("settings.json", json.dumps(settings))
            archive.writestr("model.jax_export", changes.get("program", b"nonsense"))
        return tmp_path / "b.zip"

    for changes, words in (
        ({"format": 99}, "of format 99, which a newer"),
        ({"presence": 3}, "features are not laid out as"),
        ({}, "does not read this program"),
    ):
        with pytest.raises(UserError, match=words):
            programs.load_program(rewritten(**changes))
    for place in (0, len(good) // 2, len(good) - 5):
        path.write_bytes(good[:place] + bytes([good[place] ^ 0xFF]) + good[place + 1 :])
        with pytest.raises(UserError, match=r"a\.zip"):
            programs.load_program(path)
    path.write_bytes(good[: len(good) // 2])
    with pytest.raises(UserError, match="not an exported program, or damaged"):
        programs.load_program(path)
    with pytest.raises(UserError, match="no such file"):
        programs.load_program(tmp_path / "none.zip")


@pytest.mark.usefixtures("without_hook")
def test_only_sets_of_objects_are_exported(tmp_path):
    with pytest.raises(ValueError, match="predict: expected it to return float32"):
        programs.save_program(tmp_path / "a", lambda x: x, size=4)
    with pytest.raises(ValueError, match="platforms: expected some of cpu"):
        programs.save_program(tmp_path / "a", constant, size=4, platforms=("abacus",))
    assert not (tmp_path / "a").exists()
