import dataclasses
import functools
import json
import os
import subprocess
import sys
import tracemalloc
import zipfile
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from jax import export
from PIL import Image, ImageOps, UnidentifiedImageError

from msdspn_jax import cli
from msdspn_jax.clevr import objects as layout
from msdspn_jax.clevr.files import read_image
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
    argv = ["export", "--out", str(path), "--threshold", "0", "--no-check"]
    assert cli.main(argv) == 0
    image = tmp_path / "image.png"
    pixels = np.random.default_rng(1).integers(0, 256, (16, 16, 3), np.uint8)
    Image.fromarray(pixels).save(image)

    model = weights_files.load_model(weights)
    keys = jax.random.key(0)[None]
    predict = jax.jit(model.predictor.predict)
    expected = np.asarray(predict(model.variables, pixels[None], keys).objects[0])
    found = layout.decode(expected, threshold=0)
    assert found

    with zipfile.ZipFile(path) as archive:
        (tmp_path / "predict.py").write_bytes(archive.read("predict.py"))
        settings = json.loads(archive.read("settings.json"))
    assert settings["model"] == "slot-mlp"
    assert (settings["size"], settings["step"], settings["seed"]) == (16, 3, 0)
    assert settings["threshold"] == 0
    assert settings["platforms"] == ["cpu", "cuda", "rocm", "tpu"]
    alone = run(ALONE, tmp_path / "cache", tmp_path / "predict.py", path, image)
    assert alone.returncode == 0, alone.stderr
    lines = alone.stdout.splitlines()
    assert len(lines) == len(found)
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
        argv = [*images, "--out", str(out), "--batch-size", batch, "--threshold", "0"]
        assert cli.main(["predict", *source, *argv, "--no-pictures"]) == 0
        scenes = json.loads((out / "predictions.json").read_text())["scenes"]
        found.append([[o["score"] for o in s["objects"]] for s in scenes])
    assert sum(map(len, found[0])) > 0
    for ours, theirs in zip(*found, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


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
    argv = ["export", "--out", str(out), "--platforms", "cpu", "--inner.num-steps", "2"]
    assert cli.main(argv) == 0
    assert set(asked) == {2}
    # It was run beside the model, which is where a program that does something else is noticed.
    printed = capsys.readouterr().out
    assert float(printed.split("differs from the model by at most ")[1].split()[0]) < 1e-4
    assert programs.load_program(out).settings["inner_steps"] == 2
    elsewhere = ["export", "--out", str(tmp_path / "tpu.zip"), "--platforms", "tpu"]
    assert cli.main(elsewhere) == 0
    assert "not checked: this machine has cpu" in capsys.readouterr().out
    monkeypatch.setattr(programs, "difference", lambda *_: np.array([0.0, 0.1]))
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
    assert "--inner.num-steps: expected at least 1" in message("--out", a, "--inner.num-steps", 0)
    for threshold in (2, -1, "nan"):
        assert "--threshold: expected a number from 0 to 1" in message(
            "--out", a, "--threshold", threshold
        )
    assert "slot-attention has no inner loop" in message("--out", a, "--inner.num-steps", 3)
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
        ({"size": 10**9}, "size: expected 1 to 4096, got 1000000000"),
        ({"size": "4"}, "size: expected 1 to 4096, got 4"),
        ({"set_size": True}, "set_size: expected 1 to 1000, got True"),
        ({"threshold": 2}, "threshold: expected a number from 0 to 1, got 2"),
        ({"threshold": float("nan")}, "threshold: expected a number from 0 to 1, got nan"),
        ({"versions": []}, r"versions: expected an object, got \[\]"),
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
    with pytest.raises(ValueError, match="threshold: expected a number from 0 to 1, got 2"):
        programs.save_program(tmp_path / "a", constant, size=4, threshold=2)


# Programs from elsewhere ------------------------------------------------------------------------


def put(path, program, **changes):
    """A program as an attacker would write it: no check of ours at the time of writing."""
    settings = {
        "format": 1, "size": 4, "set_size": 10, "threshold": 0.5, "platforms": ["cpu"],
        "versions": {}, **programs.layout_settings(), **changes,
    }  # fmt: skip
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("settings.json", json.dumps(settings))
        archive.writestr("model.jax_export", program)
    return path


def exported(function, shape=("b", 4, 4, 3), dtype="uint8", **options):
    shape = export.symbolic_shape(", ".join(map(str, shape)))
    like = jax.ShapeDtypeStruct(shape, np.dtype(dtype))
    return bytes(export.export(jax.jit(function), **options)(like).serialize())


def calls_out(images):
    zero = jax.ffi.ffi_call("launch_missiles", jax.ShapeDtypeStruct((), np.float32))()
    return constant(images) + zero


def solves(images):
    x = images[:, :3, :3, 0].astype(np.float32) + jax.numpy.eye(3)
    return jax.numpy.zeros((images.shape[0], 10, 19)) + jax.numpy.linalg.qr(x)[1].sum()


@pytest.mark.parametrize(
    ("program", "words"),
    [
        (lambda: exported(lambda x: x[:, 0, 0, 0] * 1.0), "the output float32"),
        (lambda: exported(constant, ("b", 5, 5, 3)), r"uint8 \[batch, 4, 4, 3\]"),
        (lambda: exported(constant, dtype="float32"), "the input float32"),
        (lambda: exported(constant, (2, 4, 4, 3)), "which is of one batch size"),
        (lambda: exported(lambda x: constant(x)[:, :9]), r"float32 \[batch, 10, 19\]"),
        (lambda: exported(lambda x: (constant(x), x)), "so many inputs"),
        (lambda: exported(lambda x: {"a": constant(x)}), "the arguments"),
        (lambda: exported(solves), "the custom call 'lapack_"),
    ],
)
def test_what_no_export_of_ours_does_is_refused(program, words, tmp_path):
    path = put(tmp_path / "a.zip", program())
    with pytest.raises(UserError, match=rf"a\.zip: refused, no export .*{words}"):
        programs.load_program(path)


def test_calls_of_other_native_code_are_refused(tmp_path):
    checks = [export.DisabledSafetyCheck.custom_call("launch_missiles")]
    program = exported(calls_out, disabled_checks=checks)
    with pytest.raises(UserError, match=r"refused, .* safety checks turned off"):
        programs.load_program(put(tmp_path / "a.zip", program))
    # A forger would not leave that written in it.
    forged = dataclasses.replace(export.deserialize(bytearray(program)), disabled_safety_checks=[])
    with pytest.raises(UserError, match=r"refused, .* the custom call 'launch_missiles'"):
        programs.load_program(put(tmp_path / "a.zip", bytes(forged.serialize())))


@pytest.mark.usefixtures("without_hook")
def test_what_our_exports_call_is_known(weights, tmp_path, monkeypatch):
    monkeypatch.setitem(clevr_model.STAGES, "resnet18", (1, 1, 1, 1))
    small = {"size": 64, "encoder_width": 2, "latent_dim": 4, "hidden_dim": 4}
    kinds = [Inner(eval_num_steps=2, pool="relation", tolerance=1e-3)]
    kinds += [Inner(eval_num_steps=2, projection="simplex")]
    for inner in kinds:
        config = clevr.Config(model="idspn", **small, inner=inner)
        predictor = clevr.build_predictor(config)
        model = weights_files.Model(config, random_variables(config), 0, predictor, {})
        predict = functools.partial(model.predict, model.variables)
        programs.save_program(tmp_path / "a.zip", predict, size=64)
        programs.load_program(tmp_path / "a.zip")


SETS = {
    "task": "sets", "kind": "sets", "input_shape": [5, 2], "names": ["x", "y"], "presence": True,
    "set_size": 3,
}  # fmt: skip


def exported_sets(function):
    (b,) = export.symbolic_shape("b")
    shapes = (jax.ShapeDtypeStruct((b, 5, 2), np.float32), jax.ShapeDtypeStruct((b, 5), np.bool_))
    return bytes(export.export(jax.jit(function))(*shapes).serialize())


def three(sets, mask):
    return jax.numpy.zeros((sets.shape[0], 3, 3)) + (sets * mask[..., None]).sum()


@pytest.mark.usefixtures("without_hook")
def test_programs_of_sets_are_checked_as_well(tmp_path, capsys):
    path = put(tmp_path / "a.zip", exported_sets(three), **SETS)
    sets = np.arange(20, dtype=np.float32).reshape(2, 5, 2)
    found = programs.load_program(path, task="sets").predict(sets, np.ones((2, 5), bool))
    np.testing.assert_allclose(found, np.full((2, 3, 3), sets.sum()))
    with pytest.raises(UserError, match=r"a program of msdspn train sets, .* predict --data FILE"):
        programs.load_program(path)
    with pytest.raises(UserError, match=r"a program of msdspn train clevr, .* predict IMAGE"):
        programs.load_program(put(tmp_path / "b.zip", exported(constant)), task="sets")
    for changes, words in (
        ({"kind": "graphs"}, "kind: expected images, vectors or sets, got graphs"),
        ({"kind": ["sets"]}, "kind: expected images"),
        ({"kind": "images"}, "input_shape: not one of images"),
        ({"input_shape": [0, 2]}, "input_shape: expected a list of numbers"),
        ({"names": []}, "names: expected a list of words"),
        ({"presence": 1}, "presence: expected true or false, got 1"),
        ({"presence": False}, r"the output float32\[b, ?3, ?3\]; expected float32 \[batch, 3, 2\]"),
        ({"input_shape": [4, 2]}, r"the input float32.* expected float32 \[batch, 4, 2\]"),
        ({"kind": "vectors", "input_shape": [5]}, "so many inputs"),
    ):
        path = put(tmp_path / "c.zip", exported_sets(three), **(SETS | changes))
        with pytest.raises(UserError, match=words):
            programs.load_program(path, task="sets")
    argv = ["predict", "--program", str(path), "--data", "x.npz", "--out", "y.npz"]
    assert cli.main([*argv, "--inner.num-steps", "3"]) == 2
    assert "--inner.num-steps: fixed in a program" in capsys.readouterr().err


def test_zips_that_unpack_to_gigabytes_are_refused(tmp_path, monkeypatch):
    path = put(tmp_path / "a.zip", exported(constant))
    programs.load_program(path)
    monkeypatch.setitem(programs._MAX_BYTES, "model.jax_export", 10**6)
    tracemalloc.start()
    with pytest.raises(UserError, match=r"model\.jax_export unpacks to more than 1000000 bytes"):
        programs.load_program(put(path, bytes(10**8)))
    tracemalloc.stop()
    with pytest.raises(UserError, match=r"settings\.json unpacks to more than 1048576 bytes"):
        programs.load_program(put(path, b"", more=" " * 2**21))
    path.write_bytes(os.urandom(10**6 + 1))
    with pytest.raises(UserError, match="larger than the 1000000 bytes that are read"):
        programs.load_program(path)
    assert programs.EXAMPLE.startswith("# A program is native code")


def test_the_little_script_sees_images_as_the_library_does(tmp_path):
    """Up to where it predicts: every kind of pixel, and no other formats."""
    code = programs.EXAMPLE
    lines = code[code.index("image = ") : code.index("image = image.resize")]
    rng = np.random.default_rng(0)
    for mode, shape, dtype in (
        ("RGB", (5, 4, 3), np.uint8), ("RGBA", (5, 4, 4), np.uint8), ("I;16", (5, 4), np.uint16),
        ("LA", (5, 4, 2), np.uint8), ("L", (5, 4), np.uint8),
    ):  # fmt: skip
        pixels = rng.integers(0, np.iinfo(dtype).max, shape).astype(dtype)
        image = Image.fromarray(pixels)
        assert image.mode == mode
        exif = Image.Exif()
        exif[0x0112] = 6
        image.save(tmp_path / "a.png", exif=exif)
        names = {"Image": Image, "ImageOps": ImageOps, "np": np}
        names["sys"] = SimpleNamespace(argv=["predict.py", "", tmp_path / "a.png"])
        exec(lines, names)
        np.testing.assert_array_equal(np.asarray(names["image"]), read_image(tmp_path / "a.png"))
    Image.new("L", (3, 3)).save(tmp_path / "a.png", "GIF")
    with pytest.raises(UnidentifiedImageError):
        exec(lines, names)
