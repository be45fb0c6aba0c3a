import dataclasses
import json
import os

import chex
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save

from msdspn_jax.errors import UserError
from msdspn_jax.tasks.clevr import task as clevr
from msdspn_jax.trained import weights

CONFIG = clevr.Config(
    model="slot-mlp", size=16, slot_dim=4, hidden_dim=4, cache_dir="/home/someone/cache", steps=7
)


@pytest.fixture(scope="module")
def variables():
    shapes = jax.eval_shape(clevr.build_predictor(CONFIG).init, jax.random.key(1))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: rng.normal(0, 0.1, x.shape).astype(x.dtype), shapes)


@pytest.fixture
def path(tmp_path, variables):
    weights.save_model(tmp_path / "a.safetensors", CONFIG, variables, step=5)
    return tmp_path / "a.safetensors"


def rewrite(path, change):
    """Write the file anew with its arrays and its record changed in place."""
    arrays = load_file(path)
    header = path.read_bytes()
    size = int.from_bytes(header[:8], "little")
    record = json.loads(json.loads(header[8 : 8 + size])["__metadata__"]["msdspn_jax"])
    change(arrays, record)
    path.write_bytes(save(arrays, metadata={"msdspn_jax": json.dumps(record)}))


def test_what_is_saved_is_loaded(path, variables, tmp_path):
    model = weights.load_model(path)
    assert jax.tree.structure(model.variables) == jax.tree.structure(variables)
    jax.tree.map(np.testing.assert_array_equal, model.variables, variables)
    assert (model.step, model.task_name) == (5, "clevr")
    assert (model.config.model, model.config.size, model.config.steps) == ("slot-mlp", 16, 7)
    assert model.versions["jax"] == jax.__version__
    assert model.predictor == clevr.build_predictor(model.config)
    # The same model, the same bytes; and nothing of the machine that trained it.
    weights.save_model(tmp_path / "b.safetensors", model.config, model.variables, step=5)
    assert (tmp_path / "b.safetensors").read_bytes() == path.read_bytes()
    assert b"/home/someone" not in path.read_bytes()


def lack(arrays, record):
    del arrays["params/features/conv1/kernel"]


def more(arrays, record):
    arrays["params/other"] = np.zeros(1, np.float32)


def other_shape(arrays, record):
    arrays["params/features/conv1/kernel"] = np.zeros((5, 5, 3, 9), np.float32)


def other_type(arrays, record):
    arrays["params/features/conv1/kernel"] = arrays["params/features/conv1/kernel"].astype(
        np.float64
    )


def not_a_number(arrays, record):
    arrays["params/features/conv1/kernel"][0, 0, 0, 0] = np.nan


def unknown_field(arrays, record):
    record["config"]["flux"] = 1


def bad_value(arrays, record):
    record["config"]["size"] = -1


def newer(arrays, record):
    record["format"] = 99


def no_step(arrays, record):
    del record["step"]


def another_task(arrays, record):
    record["task"] = "digits"


def no_task(arrays, record):
    record["task"] = "no such task"


def energy(**inner):
    def change(arrays, record):
        record["config"] |= {"model": "idspn", "size": 64, "inner": inner}

    return change


def with_value(name, value):
    def change(arrays, record):
        record["config"][name] = value

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lack, "lacks params/features/conv1/kernel"),
        (more, "the model does not, params/other"),
        (
            other_shape,
            r"params/features/conv1/kernel: expected float32 \(5, 5, 3, 4\), got float32",
        ),
        (other_type, "expected float32 .* got float64"),
        (not_a_number, "params/features/conv1/kernel holds a NaN"),
        (unknown_field, "fields that this version of msdspn_jax knows, got flux"),
        (bad_value, "configuration is not valid: size: expected an integer >= 1, got -1"),
        (newer, "format 99, which a newer msdspn_jax wrote"),
        (another_task, "a model of the task digits, expected clevr"),
        (no_task, "a model of the task no such task, expected clevr"),
        # A prediction must end, and fit.
        (energy(eval_num_steps=10**9), "eval_num_steps: expected at most 10000, got 1000000000"),
        (energy(late_num_steps=10**9), "eval_num_steps: expected at most 10000"),
        (energy(eval_num_starts=10**9), "eval_num_starts . eval_num_steps: expected at most 10000"),
        (energy(eval_num_steps="9"), "eval_num_steps: expected an integer"),
        (with_value("slot_iterations", 10**9), "slot_iterations: expected at most 100"),
        (with_value("size", 10**6), "size: expected at most 1024"),
        (with_value("hidden_dim", 10**30), "hidden_dim: expected at most 16384"),
        (with_value("inner", [1]), "configuration is not valid"),
        (with_value("run", {"dir": {"a": {}}}), "configuration is not valid"),
        (with_value("model", ["idspn"]), "configuration is not valid: model"),
        (with_value("model", "gpt"), "configuration"),
        (no_step, r"damaged metadata \(KeyError\('step'\)\)"),
    ],
)
@pytest.mark.usefixtures("without_hook")
def test_a_file_that_does_not_fit_is_refused(path, change, words):
    rewrite(path, change)
    with pytest.raises(UserError, match=words) as caught:
        weights.load_model(path)
    assert str(path) in str(caught.value)


def test_other_files_are_refused(path, tmp_path, variables):
    with pytest.raises(UserError, match="no such file"):
        weights.load_model(tmp_path / "no.safetensors")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match="not a readable safetensors file"):
        weights.load_model(cut)
    cut.write_bytes(save({"a": np.zeros(2)}))
    with pytest.raises(UserError, match="no model of msdspn_jax"):
        weights.load_model(cut)
    bad = jax.tree.map(lambda x: np.full(x.shape, np.inf, x.dtype), variables)
    with pytest.raises(ValueError, match="expected finite numbers"):
        weights.save_model(tmp_path / "bad", CONFIG, bad, step=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="expected a place that can be written"):
        weights.save_model(tmp_path / "file" / "x", CONFIG, variables, step=0)
    assert not (tmp_path / "bad").exists()


def raw(header, data=b""):
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def test_types_that_numpy_lacks_are_refused_in_words(path):
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    name = "params/features/conv1/kernel"
    for dtype in ("BF16", "F8_E4M3", "F8_E5M2", "I8", "BOOL", "F4", "NONE", "F32x"):
        changed = json.loads(json.dumps(header))
        changed[name]["dtype"] = dtype
        path.write_bytes(raw(changed, data[8 + size :]))
        with pytest.raises(UserError, match=r"a\.safetensors: "):
            weights.load_model(path)
    # With as many bytes as the type needs, so that the reader itself has nothing to say.
    count = int(np.prod(header[name]["shape"]))
    others = {k: v for k, v in header.items() if k == "__metadata__"}
    for dtype, width in (("BF16", 2), ("F8_E4M3", 1), ("I8", 1), ("U64", 8)):
        start, offset, parts = 0, 0, {}
        for key in sorted(
            header.keys() - {"__metadata__"}, key=lambda k: header[k]["data_offsets"]
        ):
            begin, end = header[key]["data_offsets"]
            length = count * width if key == name else end - begin
            parts[key] = {**header[key], "data_offsets": [start, start + length]}
            start, offset = start + length, end
        parts[name]["dtype"] = dtype
        path.write_bytes(raw({**others, **parts}, bytes(start)))
        with pytest.raises(UserError, match=rf"{name}: expected float32 \(5, 5, 3, 4\), got"):
            weights.load_model(path)
    assert offset == len(data) - 8 - size


def test_what_is_no_file_is_refused(tmp_path):
    if not hasattr(os, "mkfifo"):
        pytest.skip("no pipes with names here")
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path / "pipe", tmp_path, "/dev/zero"):
        with pytest.raises(UserError, match="not a regular file"):
            weights.load_model(place)
    with pytest.raises(UserError, match="no such file"):
        weights.load_model(tmp_path / ("n" * 300))
    path = tmp_path / "deep"
    path.write_bytes(raw({"__metadata__": {"msdspn_jax": "[" * 100_000}}))
    with pytest.raises(UserError, match="damaged metadata"):
        weights.load_model(path)


def test_weights_of_16_bits_are_half_as_large_and_read_as_32(path, variables, tmp_path):
    small = tmp_path / "half.safetensors"
    weights.save_model(small, CONFIG, variables, step=5, half=True)
    assert small.stat().st_size < 0.7 * path.stat().st_size
    found = weights.load_model(small).variables

    def check(x, like):
        assert x.dtype == like.dtype
        np.testing.assert_allclose(x, like, rtol=1e-3, atol=1e-6)

    jax.tree.map(check, found, variables)
    large = jax.tree.map(lambda x: x + np.float32(1e5), variables)
    with pytest.raises(ValueError, match="expected finite numbers"):
        weights.save_model(small, CONFIG, large, step=5, half=True)


def test_with_weights_of_16_bits_statistics_are_kept_as_they_are(tmp_path):
    config = clevr.Config(size=64, encoder_width=1, latent_dim=2, hidden_dim=2)
    shapes = jax.eval_shape(clevr.build_predictor(config).init, jax.random.key(1))
    # 1e6 is too large for 16 bits.
    variables = jax.tree.map(lambda x: np.full(x.shape, 0.1, x.dtype), shapes)
    variables["state"] = jax.tree.map(lambda x: x * np.float32(1e7), variables["state"])
    weights.save_model(tmp_path / "half.safetensors", config, variables, step=5, half=True)
    found = weights.load_model(tmp_path / "half.safetensors").variables
    chex.assert_trees_all_equal(found["state"], variables["state"])


def test_the_model_in_the_box():
    path = weights.box_model_path()
    assert path.stat().st_size <= 25e6
    assert path.with_suffix(".md").exists()
    assert weights.load_model(path).step > 0


def test_a_missing_model_in_the_box_is_told(monkeypatch):
    monkeypatch.setattr(weights, "_BOX_MODEL", "none.safetensors")
    with pytest.raises(UserError, match=r"no model in the box.*none\.safetensors"):
        weights.box_model_path()


def test_training_starts_from_weights_where_shapes_agree(path, variables):
    wider = dataclasses.replace(CONFIG, hidden_dim=8)
    task = clevr.build(wider)
    task, left = weights.start_from(task, path)
    begun = task.init(jax.random.key(7))
    flat = weights._by_name(begun)
    old = weights._by_name(variables)
    assert left
    for name, value in flat.items():
        assert (name in left) == (old[name].shape != value.shape)
        if name not in left:
            np.testing.assert_array_equal(value, old[name])


def test_weights_of_another_model_are_no_start(path):
    task = clevr.build(dataclasses.replace(CONFIG, model="idspn", size=64, encoder_width=2))
    with pytest.raises(UserError, match="none of its weights"):
        weights.start_from(task, path)
