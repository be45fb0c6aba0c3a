"""Checkpoints of the authors' code: read as torch.save writes them, and no code of theirs run."""

import argparse
import collections
import io
import json
import os
import pickle
import sys
import types
import zipfile
from pathlib import Path

import chex
import numpy as np
import pytest

from msdspn_jax.commands import export
from msdspn_jax.errors import UserError
from msdspn_jax.models.authors import from_pytorch
from msdspn_jax.trained import weights
from msdspn_jax.trained.pytorch import clevr_model, read_checkpoint

GOLDEN = Path(__file__).parent.parent / "golden" / "image_model.npz"
SETTINGS = {"decoder_iters": 6, "decoder_it_schedule": True, "decoder_grad_clip": None}


class Storage:
    def __init__(self, numbers):
        self.numbers = numbers


class Offset:
    """A tensor that says it begins elsewhere in its numbers than it does."""

    def __init__(self, numbers, offset):
        self.numbers, self.offset = numbers, offset


@pytest.fixture
def save(monkeypatch):
    """``torch.save``: the format of its files, without PyTorch."""
    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
    for module, name in ((torch, "FloatStorage"), (utils, "_rebuild_tensor_v2")):
        thing = type(name, (), {"__module__": module.__name__})
        setattr(module, name, thing)

    class Pickler(pickle.Pickler):
        def __init__(self, file):
            super().__init__(file, protocol=2)
            self.storages = []

        def persistent_id(self, value):
            if not isinstance(value, Storage):
                return None
            self.storages.append(value.numbers)
            count = value.numbers.size
            return ("storage", torch.FloatStorage, str(len(self.storages) - 1), "cpu", count)

        def reducer_override(self, value):
            offset = 0
            if isinstance(value, Offset):
                value, offset = value.numbers, value.offset
            if not isinstance(value, np.ndarray):
                return NotImplemented
            # As they lie in memory: what is transposed is saved so.
            flat = np.lib.stride_tricks.as_strided(value, (value.size,), (value.itemsize,))
            strides = tuple(step // value.itemsize for step in value.strides)
            parts = (Storage(flat), offset, value.shape, strides, False, collections.OrderedDict())
            return utils._rebuild_tensor_v2, parts

    def save(path, value):
        data = io.BytesIO()
        pickler = Pickler(data)
        with monkeypatch.context() as only_now:
            only_now.setitem(sys.modules, "torch", torch)
            only_now.setitem(sys.modules, "torch._utils", utils)
            pickler.dump(value)
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", data.getvalue())
            for key, numbers in enumerate(pickler.storages):
                archive.writestr(f"archive/data/{key}", numbers.tobytes())
        return path

    return save


def narrow_state(*, learned=True):
    """Weights of their image model with an eighth of the channels, small ones."""
    with np.load(GOLDEN) as file:
        shapes = json.loads(str(file["config_json"]))["shapes"]
    rng, state = np.random.default_rng(0), {}
    for name, shape in shapes.items():
        image = name.startswith("input_to_z")
        shape = [n // 8 if image and n >= 64 else n for n in shape]
        x = 0.1 * rng.normal(size=shape).astype(np.float32)
        state[name] = 1 + np.abs(x) if name.endswith("running_var") else x
    if not learned:
        del state["dspn._set_0"]
    # One that lies in memory by columns, as a transposed tensor does.
    name = "inner_obj.encoder.mlp.0.weight"
    return state | {name: np.asfortranarray(state[name])}


def lightning(state, settings):
    return {
        "global_step": 12,
        "state_dict": {f"net.{name}": x for name, x in state.items()},
        "hyper_parameters": settings,
        "callbacks": {argparse.Namespace: argparse.Namespace(best=3)},
    }


def test_a_checkpoint_is_the_model_that_was_saved(save, tmp_path):
    state = narrow_state()
    path = save(tmp_path / "a.ckpt", lightning(state, argparse.Namespace(**SETTINGS)))
    chex.assert_trees_all_equal(
        {k.removeprefix("net."): x for k, x in read_checkpoint(path).state.items()}, state
    )
    model, expected = clevr_model(path), from_pytorch(state)
    chex.assert_trees_all_equal(model.variables["params"], expected["params"])
    chex.assert_trees_all_equal(model.variables["state"]["batch_stats"], expected["batch_stats"])
    inner = model.config.resolved_inner()
    assert (model.step, inner.num_steps, inner.eval_num_steps) == (12, 3, 6)
    assert (inner.max_grad_norm, inner.momentum, inner.proximity) == (float("inf"), 0.9, 0.1)
    assert (model.config.size, model.config.encoder_width) == (128, 8)


def test_an_exported_checkpoint_predicts_the_same(save, tmp_path, capsys):
    path = save(tmp_path / "a.ckpt", lightning(narrow_state(), SETTINGS))
    assert export.main(["--pytorch", str(path), "--weights", str(tmp_path / "a.safetensors")]) == 0
    assert "a.safetensors: weights" in capsys.readouterr().out
    found = weights.load_model(tmp_path / "a.safetensors")
    images = np.random.default_rng(0).integers(0, 256, (1, 128, 128, 3), np.uint8)
    model = clevr_model(path)
    assert found.step == 12
    chex.assert_trees_all_equal(
        found.predict(found.variables, images), model.predict(model.variables, images)
    )


def test_bare_weights_are_taken_for_the_published_model(save, tmp_path):
    config = clevr_model(save(tmp_path / "a.pt", narrow_state())).config
    inner = config.resolved_inner()
    assert (inner.num_steps, inner.late_num_steps, inner.max_grad_norm) == (20, 40, 10.0)


def test_random_initial_sets_become_one(save, tmp_path):
    settings = {"set_size": 10, "set_dim": 19}
    path = save(tmp_path / "a.ckpt", lightning(narrow_state(learned=False), settings))
    model = clevr_model(path)
    initial = model.variables["params"]["decoder"]["initial_set"]
    assert model.config.resolved_inner().proximity == 0
    assert initial.shape == (10, 19)
    assert 0.05 < initial.std() < 0.2


class Attack:
    """What unpickles into a call of the attacker's."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_no_code_of_a_checkpoint_is_run(save, tmp_path):
    target = tmp_path / "made by the checkpoint"
    state = {"weight": np.ones(3, np.float32), "other": Attack(target)}
    assert read_checkpoint(save(tmp_path / "a.ckpt", state)).state.keys() == {"weight"}
    assert not target.exists()
    pickle.loads(pickle.dumps(Attack(target)))  # It would have.
    assert target.exists()


def test_what_cannot_be_read_is_said(save, tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_checkpoint(tmp_path / "none")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(UserError, match=r"expected what torch\.save .*not a zip file"):
        read_checkpoint(tmp_path / "text")
    outside = {"x": Offset(np.ones(3, np.float32), 1)}
    with pytest.raises(UserError, match="reaches out of its numbers"):
        read_checkpoint(save(tmp_path / "outside.pt", outside))
    with pytest.raises(UserError, match="expected the weights of a model by name, got none"):
        read_checkpoint(save(tmp_path / "empty.pt", {"a": 1}))
    with pytest.raises(UserError, match="no model of the authors' CLEVR experiment"):
        clevr_model(save(tmp_path / "other.pt", {"fc.weight": np.ones(3, np.float32)}))
    settings = {"set_size": 10, "set_dim": 18}
    path = save(tmp_path / "other.ckpt", lightning(narrow_state(learned=False), settings))
    with pytest.raises(UserError, match="expected weights of the shapes that the settings ask for"):
        clevr_model(path)


def test_a_checkpoint_and_a_run_are_one_too_many(tmp_path):
    with pytest.raises(UserError, match="only one of --run, --pytorch"):
        export.main(["--run", "a", "--pytorch", "b", "--weights", str(tmp_path / "c")])
    with pytest.raises(UserError, match="expected --run FOLDER with it, got --pytorch"):
        export.main(["--pytorch", "b", "--checkpoint", "latest", "--weights", str(tmp_path / "c")])
