"""Data of one's own: what is read and refused, the model's form, and the way through the verbs."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import zipfile

import jax
import numpy as np
import pytest
from processes import environment
from training_tasks import compiled_once, no_figures  # noqa: F401

from msdspn_jax import cli
from msdspn_jax.commands import train as train_command
from msdspn_jax.descent import Minimum
from msdspn_jax.errors import UserError
from msdspn_jax.models.inner import Inner
from msdspn_jax.tasks.sets import coco, data, source
from msdspn_jax.tasks.sets.config import Config
from msdspn_jax.tasks.sets.format import Format
from msdspn_jax.tasks.sets.model import Prediction, build_predictor
from msdspn_jax.tasks.sets.scores import averages, predict_all, score

NUM = 10
RNG = np.random.default_rng(0)


def arrays(kind="vectors", **changes):
    """Ten examples: sets of at most three elements with two features."""
    inputs = {
        "vectors": RNG.normal(size=(NUM, 4)),
        "sets": RNG.normal(size=(NUM, 5, 2)),
        "images": RNG.integers(0, 256, (NUM, 20, 30, 3), np.uint8),
    }[kind]
    targets = RNG.normal(size=(NUM, 3, 2)) * [1, 100] + [0, 7]
    mask = np.arange(3) < 1 + np.arange(NUM)[:, None] % 3
    found = {"inputs": inputs, "targets": targets, "mask": mask} | changes
    return {name: array for name, array in found.items() if array is not None}


def at(array, index, value):
    array = np.array(array, dtype=object if value is None else None)
    array[index] = value
    return array


WRONG = {
    "no targets": ({"targets": None, "mask": None}, "expected an array 'targets', got inputs"),
    "axes of inputs": ({"inputs": np.zeros(NUM)}, r"inputs: expected images .* got shape \(10,\)"),
    "no inputs": ({"inputs": np.zeros((0, 3))}, r"no axis of length zero, got shape \(0, 3\)"),
    "float images": (
        {"inputs": np.zeros((NUM, 8, 8, 3))},
        r"inputs: expected images of dtype uint8 .* got float64 \(10, 8, 8, 3\)",
    ),
    "grey images": ({"inputs": np.zeros((NUM, 8, 8), np.uint8)}, "which could be either"),
    "words": ({"inputs": np.array([["a"]] * NUM)}, "inputs: expected numbers, got dtype <U1"),
    "NaN": (
        {"inputs": at(np.zeros((NUM, 4)), (3, 1), np.nan)},
        r"inputs: expected finite numbers .* got nan at \[3, 1\] \(1 such entries\)",
    ),
    "too large": (
        {"inputs": at(np.zeros((NUM, 4)), (3, 1), 1e99)},
        r"inputs: expected finite numbers .* got inf at \[3, 1\]",
    ),
    "NaN in targets": (
        {"targets": at(np.zeros((NUM, 3, 2)), (2, 0, 1), np.nan)},
        r"targets: expected finite numbers .* got nan at \[2, 0, 1\]",
    ),
    "axes of targets": (
        {"targets": np.zeros((NUM, 3)), "mask": None},
        r"targets: expected shape \[num, n, d\], .* got \(10, 3\)",
    ),
    "other number": (
        {"targets": np.zeros((4, 3, 2)), "mask": None},
        "targets: expected 10 sets, one an input, got 4",
    ),
    "shape of the mask": (
        {"mask": np.ones((NUM, 2), bool)},
        r"mask: expected shape \(10, 3\), an entry an element, got \(10, 2\)",
    ),
    "numbers as a mask": (
        {"mask": at(np.ones((NUM, 3)), (1, 2), 0.5)},
        r"mask: expected True and False, or 1 and 0, got 0.5 at \[1, 2\]",
    ),
    "empty set": (
        {"mask": at(np.ones((NUM, 3), bool), 6, False)},
        r"mask: expected an element in every set .* got none at \[6\] \(1 such sets\)",
    ),
    "mask of vectors": ({"input_mask": np.ones((NUM, 4), bool)}, "input_mask: expected none"),
    "split": (
        {"split": np.array(["train"] * 9 + ["valid"])},
        "split: expected train, val or test, or 0, 1, 2, got 'valid' at 9",
    ),
    "no validation": (
        {"split": np.zeros(NUM, int)},
        "split: expected an example for val at least, got none",
    ),
    "a split that is a mask": (
        {"split": np.arange(NUM) < 8},
        "split: expected train, val or test, or 0, 1, 2, got booleans",
    ),
    "a name of a deviation": (
        {"names": np.array(["x", "x_std"])},
        "names: expected none that ends in _std, .* got x_std",
    ),
    "moments": (
        {"inputs": 1.7e9 + np.arange(4.0 * NUM).reshape(NUM, 4)},
        r"inputs: expected numbers that float32 can tell apart, got a feature 0 of deviation 11",
    ),
    "moments in targets": (
        {"targets": 1.7e9 * np.ones((NUM, 3, 2)) + at(np.zeros((NUM, 3, 2)), (1, 0, 1), 9)},
        r"targets: expected numbers that float32 can tell apart, got a feature 1",
    ),
    "names": ({"names": np.array(["x"])}, r"names: expected 2 different words, .* got \['x'\]"),
}


@pytest.mark.parametrize(("changes", "words"), WRONG.values(), ids=WRONG.keys())
def test_wrong_arrays_are_refused_by_name_index_and_expectation(changes, words, tmp_path):
    path = tmp_path / "data.npz"
    np.savez(path, **arrays(**changes))
    with pytest.raises(UserError, match=words) as error:
        data.read(path)
    assert str(error.value).startswith(f"{path}: ")


def test_what_is_no_file_of_arrays_is_refused(tmp_path):
    path = tmp_path / "data.npz"
    with pytest.raises(UserError, match=r"expected an .npz file, a folder of .npy files or"):
        data.read(path)
    path.write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(UserError, match=r"not a readable .npz file"):
        data.read(path)
    np.savez(path, inputs=np.array([[1], [1, 2]], object))
    with pytest.raises(UserError, match=r"sets of varying size are padded"):
        data.read(path)
    for name in ("split", "names"):
        np.savez(path, **(arrays() | {name: np.array(["a", "b"], object)}))
        with pytest.raises(UserError, match=rf"{name}: expected an array of words, .*astype\(str"):
            data.read(path)
    picture = tmp_path / "0.png"
    picture.write_bytes(b"\x89PNG\r\n")
    with pytest.raises(UserError, match=r"0.png: expected an .npz file, .* got neither"):
        data.read(picture)
    np.savez(path, images=np.zeros(3), mask=np.ones(3))
    with pytest.raises(UserError, match="expected an array 'inputs', got images, mask"):
        data.read(path)
    np.save(tmp_path / "one.npy", np.zeros(3))
    with pytest.raises(UserError, match=r"expected an .npz file of named arrays, got one array"):
        data.read(tmp_path / "one.npy")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=r"expected inputs.npy and targets.npy in it"):
        data.read(tmp_path / "folder")


def test_a_folder_is_read_as_a_file_is(tmp_path):
    given = arrays("sets", names=np.array(["a", "b"]), split=np.arange(NUM) % 3)
    np.savez(tmp_path / "data.npz", other=np.zeros(1), **given)
    for name, array in given.items():
        np.save(tmp_path / f"{name}.npy", array)
    for one, other in zip(data.read(tmp_path / "data.npz"), data.read(tmp_path), strict=True):
        np.testing.assert_array_equal(one, other)


def test_what_is_not_there_is_not_read():
    given = arrays()
    clean = data.check(given)
    given["targets"] = np.where(given["mask"][..., None], given["targets"], np.nan)
    np.testing.assert_array_equal(data.check(given).targets, clean.targets)


@pytest.mark.parametrize("scaling", ["standard", "range", "none"])
def test_scaling_is_learned_from_the_training_part_that_is_there(scaling):
    given = data.check(arrays(split=np.array(["train"] * 6 + ["val", "test"] * 2)))
    form = data.find_format(given, split_seed=0, scaling=scaling, size=None, set_size=None)
    present = given.targets[:6][given.mask[:6]].astype(np.float64)
    scaled = (present - form.shift) / form.scale
    if scaling == "standard":
        np.testing.assert_allclose(scaled.mean(0), 0, atol=1e-9)
        np.testing.assert_allclose(scaled.std(0), 1)
    elif scaling == "range":
        np.testing.assert_allclose((scaled.min(0), scaled.max(0)), ([-1, -1], [1, 1]))
    else:
        np.testing.assert_array_equal(scaled, present)
    assert (form.kind, form.input_shape, form.presence) == ("vectors", (4,), True)
    # A feature that never changes is not divided by zero.
    flat = data.check(arrays(inputs=np.full((NUM, 4), 3.0)))
    form = data.find_format(flat, split_seed=0, scaling=scaling, size=None, set_size=None)
    assert form.input_scale == (1.0,) * 4
    # Nor one that changes by rounding errors alone, in 64 bits.
    noise = 1e6 + 1e-10 * RNG.normal(size=(NUM, 4))
    assert data.check(arrays(inputs=noise)).inputs.shape == (NUM, 4)
    tiny = data.check(arrays(inputs=1e-41 * RNG.normal(size=(NUM, 4))))
    if scaling != "none":
        with pytest.raises(ValueError, match="feature 0: expected numbers whose differences"):
            data.find_format(tiny, split_seed=0, scaling=scaling, size=None, set_size=None)


def test_splits_are_a_tenth_each_or_as_given():
    given = data.check(arrays())
    parts = data.split_indices(given, 0)
    assert [len(x) for x in parts.values()] == [8, 1, 1]
    assert sorted(np.concatenate(list(parts.values()))) == list(range(NUM))
    assert (parts["train"] != data.split_indices(given, 1)["train"]).any()
    given = data.check(arrays(split=np.array([b"val", b"test"] + [b"train"] * 8)))
    assert data.split_indices(given, 0)["val"].tolist() == [0]


def test_padding_brings_elements_to_the_front_and_says_who_is_too_many():
    sets = np.arange(6.0).reshape(1, 3, 2)
    padded, mask = data.padded(sets, np.array([[False, True, True]]), 4)
    assert padded[0].tolist() == [[2, 3], [4, 5], [0, 0], [0, 0]]
    assert mask.tolist() == [[True, True, False, False]]
    given = data.check(arrays())
    options = {"split_seed": 0, "scaling": "none", "size": None}
    with pytest.raises(ValueError, match=r"at most 2 elements in a set .* got 3 at \[2\]"):
        data.find_format(given, set_size=2, **options)
    form = data.find_format(data.check(arrays(mask=None)), set_size=3, **options)
    assert not form.presence
    assert data.find_format(data.check(arrays(mask=None)), set_size=4, **options).presence
    with pytest.raises(ValueError, match=r"mask: expected 3 elements in every set, .* 1 at \[0\]"):
        data.fitted(given, form)
    with pytest.raises(ValueError, match=r"inputs: expected vectors \[num, 4\], .* got sets"):
        data.fitted(data.check(arrays("sets")), form)
    # Padding of inputs is no element.
    sets = data.find_format(data.check(arrays("sets")), set_size=3, **options)
    longer = {"inputs": RNG.normal(size=(NUM, 7, 2)), "input_mask": np.arange(7) < 5}
    longer["input_mask"] = np.tile(longer["input_mask"], (NUM, 1))
    found = data.fitted_inputs(data.check(longer), sets)
    np.testing.assert_allclose(found["inputs"], longer["inputs"][:, :5], rtol=1e-6)
    longer["input_mask"][3] = True
    with pytest.raises(ValueError, match=r"inputs: expected sets \[num, 5, 2\]"):
        data.fitted_inputs(data.check(longer), sets)


def configured(kind, tmp_path, content=None, **flags):
    path = tmp_path / "data.npz"
    np.savez(path, **(content or arrays(kind)))
    sizes = {"hidden_dim": 8, "latent_dim": 8, "encoder_width": 2, "batch_size": 4}
    return Config(data=str(path), inner=Inner(num_steps=2), **(sizes | flags)).completed()


@pytest.mark.parametrize("kind", ["vectors", "sets", "images"])
def test_the_encoder_follows_from_the_inputs(kind, tmp_path):
    config = configured(kind, tmp_path)
    shape = {"vectors": (4,), "sets": (5, 2), "images": (64, 64, 3)}[kind]
    assert config.form.input_shape == shape
    predictor = build_predictor(config)
    batch = data.fitted(config.load(), config.form)
    assert batch["inputs"].shape == (NUM, *shape)

    def loss(key):
        variables = predictor.init(key)
        keys = jax.random.split(key, NUM)
        losses, found, state = predictor.loss(variables, batch, keys)
        assert jax.tree.structure(state) == jax.tree.structure(variables.get("state"))
        return losses, found.sets, found.presence

    shapes = [x.shape for x in jax.eval_shape(loss, jax.random.key(0))]
    assert shapes == [(NUM,), (NUM, 3, 2), (NUM, 3)]


def test_predictions_are_in_the_units_of_the_data_and_weights_count(tmp_path):
    config = configured("vectors", tmp_path, feature_weights=(1.0, 0.0), presence_weight=2.0)
    predictor = build_predictor(config)
    batch = data.fitted(config.load(), config.form)
    scaled = predictor.scaled(batch["targets"], batch["mask"])
    assert scaled.shape == (NUM, 3, 3)
    np.testing.assert_array_equal(scaled[..., 2], batch["mask"])
    variables = predictor.init(jax.random.key(0))
    found, _ = predict_all(predictor, variables, batch, jax.random.key(0))
    prediction = predictor.predict(
        variables, batch["inputs"], jax.random.split(jax.random.key(0), NUM)
    )
    shift, scale = np.array(config.form.shift), np.array(config.form.scale)
    np.testing.assert_allclose(
        found["sets"], prediction.minimum.sets[..., :2] * scale + shift, rtol=1e-4, atol=1e-3
    )
    perfect = prediction._replace(minimum=prediction.minimum._replace(sets=scaled[:, ::-1]))
    np.testing.assert_allclose(predictor.distance(perfect, batch["targets"], batch["mask"]), 0)
    # The second feature weighs nothing, the presence twice.
    wrong = scaled.at[..., 1].add(5.0)
    off = perfect._replace(minimum=perfect.minimum._replace(sets=wrong))
    np.testing.assert_allclose(predictor.distance(off, batch["targets"], batch["mask"]), 0)
    gone = scaled.at[0, 0, 2].set(0.0)
    off = perfect._replace(minimum=perfect.minimum._replace(sets=gone))
    losses = predictor.distance(off, batch["targets"], batch["mask"])
    assert losses[0] == pytest.approx(2.0 * 0.5 / 3 / 3)
    # Errors are means over elements, not over sets, of which some have none.
    right = perfect._replace(sets=batch["targets"][:, ::-1])
    away = right._replace(sets=right.sets + np.array([0.25, 3.0]))
    mask = batch["mask"] & (np.arange(NUM) < 7)[:, None]

    def scores(prediction, mask, by=1.0):
        kept = by * scaled * mask[..., None]
        minimum = prediction.minimum._replace(sets=kept[:, ::-1])
        found = jax.jit(lambda x: score(predictor, x, batch["targets"], mask))(
            prediction._replace(minimum=minimum)
        )
        return {name: np.asarray(x) for name, x in found.items()}

    found = averages(scores(away, mask))
    assert found["error_feature0"] == pytest.approx(0.25, rel=1e-5)
    assert found["error_feature1"] == pytest.approx(3.0, rel=1e-5)
    assert set(averages(scores(away, mask & False))) == {"loss", "size_right"}
    found = averages(scores(away, mask, by=np.nan))
    assert np.isnan([found["loss"], found["error_feature0"]]).all()
    with pytest.raises(UserError, match=r"feature_weights: expected 2 numbers, .* got 3"):
        configured("vectors", tmp_path, feature_weights=(1.0, 1.0, 1.0))


def test_boxes_have_iou_and_f1(tmp_path):
    names = ("x", "y", "w", "h", "kind")
    boxes = np.array([[0, 0, 2, 2, 1.0], [5, 5, 2, 2, 0.0], [9, 9, 4, 4, 0.0]])
    content = arrays("vectors", targets=np.tile(boxes, (NUM, 1, 1)), names=np.array(names))
    config = configured("vectors", tmp_path, content=content)
    predictor = build_predictor(config)
    batch = data.fitted(config.load(), config.form)
    mask, targets = np.arange(3) < np.array([1, 2, 3])[:, None], batch["targets"][:3]
    # The first box is right, the second a third off, the third shares a seventh with its own.
    predicted = targets[:, [2, 0, 1]] + 0.0
    predicted[:, 2, 0] += 1.0
    predicted[:, 0, :2] += 2.0
    presence = np.array([[0.9, 0.9, 0.9], [0.1, 0.9, 0.2], [0.9, 0.9, 0.9]])
    presence[2] = [0.9, 0.9, np.nan]
    sets = predictor.scaled(targets, mask)[:, [2, 0, 1]]
    minimum = Minimum(sets, None, None, None, None)
    found = jax.jit(lambda *x: score(predictor, Prediction(*x), targets, mask))(
        predicted, presence, minimum
    )
    np.testing.assert_allclose(found["iou"], [1, 1 + 1 / 3, 1 + 1 / 3 + 1 / 7], rtol=1e-6)
    np.testing.assert_array_equal(found["boxes_predicted"], [3, 1, 2])
    np.testing.assert_array_equal(found["boxes_found"], [1, 1, 1])
    means = averages({name: np.asarray(x) for name, x in found.items()})
    assert means["f1"] == pytest.approx(2 * 3 / (6 + 6))
    assert means["iou"] == pytest.approx((3 + 2 / 3 + 1 / 7) / 6)
    predicted[:, 0, 4] = np.nan
    diverged = Prediction(predicted, presence, minimum)
    found = score(predictor, diverged, targets, mask)
    assert not np.any([found["iou"], found["boxes_predicted"], found["boxes_found"]])


# --- COCO ---


def coco_file(folder, **changes):
    from PIL import Image

    (folder / "images").mkdir()
    for name, size in (("a.png", (40, 20)), ("b.png", (30, 60))):
        Image.new("RGB", size, (9, 9, 9)).save(folder / "images" / name)
    content = {
        "images": [
            {"id": 7, "file_name": "a.png", "width": 40, "height": 20},
            {"id": 3, "file_name": "b.png", "width": 30.0, "height": 60},
        ],
        "categories": [{"id": 5, "name": "cat"}, {"id": 2, "name": "dog"}],
        "annotations": [
            {"image_id": 7, "category_id": 5, "bbox": [10, 5, 20, 10]},
            {"image_id": 3, "category_id": 2, "bbox": [0, 0, 30, 60]},
            {"image_id": 7, "category_id": 2, "bbox": [0, 0, 4, 2]},
            {"image_id": 7, "category_id": 2, "bbox": [0, 0, 40, 20], "iscrowd": 1},
            {"image_id": 3, "category_id": 5, "bbox": [0, 0, 0, 20]},
        ],
    } | changes
    path = folder / "annotations.json"
    path.write_text(json.dumps(content))
    return path


def test_boxes_of_coco_are_sets(tmp_path):
    found = coco.read(coco_file(tmp_path), None, size=None)
    assert found.names == ("x", "y", "w", "h", "is dog", "is cat")
    assert found.inputs.shape == (2, 64, 64, 3)
    np.testing.assert_allclose(
        found.targets[0], [[0.5, 0.5, 0.5, 0.5, 0, 1], [0.05, 0.05, 0.1, 0.1, 1, 0]], atol=1e-6
    )
    np.testing.assert_allclose(found.targets[1, 0], [0.5, 0.5, 1, 1, 1, 0])
    assert found.mask.tolist() == [[True, True], [True, False]]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"images": None}, 'expected an object with a list "images"'),
        ({"annotations": []}, "annotations: expected at least one box, got none"),
        (
            {"annotations": [{"image_id": 7, "category_id": 5, "bbox": [1, 2, -1, 4]}]},
            r"annotations\[0\].bbox: expected \[x, y, width, height\], .* got \[1, 2, -1, 4\]",
        ),
        (
            {"annotations": [{"image_id": 7, "category_id": 5, "bbox": [50, 2, 3, 4]}]},
            r"annotations\[0\].bbox: expected the centre of a box in its image of 40 x 20 pixels",
        ),
        (
            {"categories": [{"id": 5, "name": "cat"}, {"id": 2, "name": "cat"}]},
            "categories: expected an id and a name of its own for each",
        ),
        (
            {"images": [{"id": 7, "file_name": "a.png", "width": 20, "height": 40}],
             "annotations": [{"image_id": 7, "category_id": 5, "bbox": [1, 2, 3, 4]}]},
            r"images\[0\]: expected 20 x 40 pixels, as it says, got 40 x 20 in .*a\.png",
        ),
        (
            {"annotations": [{"image_id": 1, "category_id": 5, "bbox": [1, 2, 3, 4]}]},
            r"annotations\[0\].image_id: expected one in the file, got 1",
        ),
        (
            {"annotations": [{"image_id": 7, "category_id": 5, "bbox": [1, 2, 3, 4]}]},
            r"images\[1\]: expected a box in every image \(--allow-empty",
        ),
        (
            {"images": [{"id": 7, "file_name": "../a.png", "width": 40, "height": 20}],
             "annotations": [{"image_id": 7, "category_id": 5, "bbox": [1, 2, 3, 4]}]},
            r"images\[0\].file_name: expected a name below",
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_in_a_coco_file_is_named(changes, words, tmp_path):
    with pytest.raises(UserError, match=words):
        coco.read(coco_file(tmp_path, **changes), None, size=None)


def test_a_folder_of_images_can_be_predicted_for(tmp_path):
    path = coco_file(tmp_path)
    config = Config(data=str(path), latent_dim=8, hidden_dim=8).completed
    with pytest.raises(UserError, match=r"expected at least 3 examples"):
        config()
    form = data.find_format(
        coco.read(path, None, size=None)._replace(split=np.array([0, 1])),
        split_seed=0, scaling="standard", size=None, set_size=None,
    )  # fmt: skip
    found, files, unread, _ = source.load_for_prediction(str(tmp_path / "images"), form)
    assert (files, unread) == (["a.png", "b.png"], ())
    assert found["inputs"].shape == (2, 64, 64, 3)
    (tmp_path / "images" / "a.png").write_bytes(b"no image")
    left = source.load_for_prediction(str(tmp_path / "images"), form)
    assert left.files == ["b.png"]
    assert "a.png" in left.unread[0]
    np.testing.assert_array_equal(left.arrays["inputs"], found["inputs"][1:])
    (tmp_path / "images" / "b.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"no image in it can be read: .*a\.png"):
        source.load_for_prediction(str(tmp_path / "images"), form)
    with pytest.raises(UserError, match=r"expected images or .npy files in this folder"):
        source.load_for_prediction(str(tmp_path / "images" / ".."), form)


def test_a_coco_file_to_predict_for_needs_no_boxes_but_the_same_categories(tmp_path):
    path = coco_file(tmp_path)
    form = data.find_format(
        coco.read(path, None, size=None)._replace(split=np.array([0, 1])),
        split_seed=0, scaling="standard", size=None, set_size=None,
    )  # fmt: skip
    found, files, *_ = source.load_for_prediction(str(path), form)
    assert sorted(found) == ["inputs", "mask", "targets"]
    assert files is None
    content = json.loads(path.read_text())
    del content["annotations"]
    path.write_text(json.dumps(content))
    assert list(source.load_for_prediction(str(path), form)[0]) == ["inputs"]
    with pytest.raises(UserError, match='expected an object with a list "annotations"'):
        coco.read(path, None, size=None)
    content["annotations"] = [{"image_id": 7, "category_id": 5, "bbox": [1, 2, 3, 4]}]
    content["categories"][0]["name"] = "bird"
    path.write_text(json.dumps(content))
    found = source.load_for_prediction(str(path), form)
    assert list(found.arrays) == ["inputs"]
    assert "names: expected x, y, w, h, is dog, is cat, as" in found.no_scores


# --- through the verbs ---

SMALL = ["--steps", "2", "--hidden-dim", "4", "--latent-dim", "4", "--inner.num-steps", "2"]
SMALL += ["--batch-size", "4", "--no-progress", "--no-tensorboard"]


def test_train_resume_evaluate_show_predict_and_export(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("data.npz", **arrays("sets"))
    argv = ["train", "sets", "--data", "data.npz", "--run-dir", "run", *SMALL]
    assert cli.main(argv) == 0
    # Elsewhere, nothing said again but where the run lies.
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    config = train_command.parse("sets", ["--run-dir", "../run", "--resume"])
    assert config.data == str(tmp_path / "data.npz")
    assert config.form.kind == "sets"
    assert cli.main(["evaluate", "../run", "--no-figures"]) == 0
    capsys.readouterr()
    assert cli.main(["show", "../run"]) == 0
    shown = capsys.readouterr().out
    assert "--data" in shown
    assert "size_right" in shown
    assert "--form" not in shown
    # The training data is not asked for.
    given = arrays("sets", targets=None, mask=None, input_mask=np.arange(5) < 3 * np.ones((NUM, 1)))
    np.savez("new.npz", **given)
    (tmp_path / "data.npz").unlink()
    predict = ["predict", "--run", "../run", "--data", "new.npz", "--out"]
    assert cli.main([*predict, "found.npz"]) == 0
    found = np.load("found.npz")
    assert found["sets"].shape == (NUM, 3, 2)
    np.testing.assert_array_equal(found["mask"], found["presence"] > 0.5)
    assert found["names"].tolist() == ["feature0", "feature1"]
    # What is masked is not looked at.
    given["inputs"] = np.where(given["input_mask"][..., None], given["inputs"], 1e9)
    np.savez("new.npz", **given)
    assert cli.main([*predict, "again.npz"]) == 0
    np.testing.assert_array_equal(found["sets"], np.load("again.npz")["sets"])
    assert cli.main([*predict, "again.npz"]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert cli.main(["export", "--run", "../run", "--weights", "model.safetensors"]) == 0
    predict[1:3] = ["--weights", "model.safetensors"]
    assert cli.main([*predict, "weights.npz"]) == 0
    np.testing.assert_array_equal(found["sets"], np.load("weights.npz")["sets"])
    assert b"data.npz" in (tmp_path / "elsewhere" / "model.safetensors").read_bytes()
    assert str(tmp_path).encode() not in (tmp_path / "elsewhere/model.safetensors").read_bytes()


def test_a_run_knows_its_data_again(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = arrays(split=np.array(["train"] * 8 + ["val"] * 2))
    np.savez("data.npz", **given)
    assert cli.main(["train", "sets", "--data", "data.npz", "--run-dir", "run", *SMALL]) == 0
    longer = ["train", "sets", "--run-dir", "run", "--resume", "--no-progress"]
    # The same, elsewhere.
    (tmp_path / "data.npz").rename("moved.npz")
    assert cli.main(["evaluate", "run"]) == 2
    assert "got nothing there" in capsys.readouterr().err
    assert cli.main([*longer, "--data", "moved.npz"]) == 0
    assert cli.main([*longer, "--set-size", "3"]) == 0  # Which was the default.
    capsys.readouterr()
    assert cli.main(["evaluate", "run", "--no-figures"]) == 0
    assert "left out: split: expected examples for test" in capsys.readouterr().err
    assert cli.main(["evaluate", "run", "--split", "test"]) == 2
    # Other data of that name.
    for name in ("inputs", "targets"):
        np.savez("moved.npz", **(given | {name: given[name] * 2}))
        for argv in (["evaluate", "run"], [*longer, "--steps", "3", "--allow-config-change"]):
            assert cli.main(argv) == 2
            assert "expected the data that the run began with" in capsys.readouterr().err
    np.savez("moved.npz", **given)
    for flags in (["--set-size", "9"], ["--scaling", "range"], ["--split-seed", "5"]):
        assert cli.main([*longer, *flags, "--allow-config-change"]) == 2
        assert f"cannot change:\n  {flags[0]}: " in capsys.readouterr().err
    assert cli.main([*longer, "--steps", "3", "--allow-config-change"]) == 0


@pytest.mark.parametrize("kind", ["vectors", "sets", "images"])
def test_splits_may_be_files_of_their_own(kind, tmp_path):
    parts = {"train": arrays(kind), "val": arrays(kind), "test": arrays(kind)}
    # Other lengths: padded.
    parts["val"]["targets"], parts["val"]["mask"] = RNG.normal(size=(NUM, 5, 2)), None
    if kind == "sets":
        parts["test"]["inputs"] = RNG.normal(size=(NUM, 7, 2))
    for name, part in parts.items():
        np.savez(tmp_path / f"{name}.npz", **{k: v for k, v in part.items() if v is not None})
    files = {name: str(tmp_path / f"{name}.npz") for name in parts}
    config = Config(data=files["train"], val_data=files["val"], test_data=files["test"]).completed()
    whole = data.fitted(config.load(), config.form)
    split = data.split_indices(config.load(), config.split_seed)
    assert config.form.set_size == 5
    for name in parts:
        alone = data.fitted(data.read(files[name]), config.form)
        for array, values in alone.items():
            np.testing.assert_array_equal(whole[array][split[name]], values)
        assert (alone["mask"].sum(1) > 3).any() == (name == "val")
    # Each file counts in what a run knows its data by.
    parts["test"]["targets"][0, 0, 0] += 1
    np.savez(files["test"], **{k: v for k, v in parts["test"].items() if v is not None})
    assert config.load().fingerprint != config.form.fingerprint
    for changes, words in [
        ({"split": np.arange(NUM) % 3}, "split: expected none in data for test alone"),
        ({"names": np.array(["a", "b"])}, "names: expected .* feature0, feature1, got a, b"),
        ({"inputs": np.zeros((NUM, 9))}, "inputs: expected .* got vectors .* for test"),
    ]:
        np.savez(files["test"], **arrays(kind, **changes))
        with pytest.raises(UserError, match=words):
            dataclasses.replace(config, form=Format()).completed()
    with pytest.raises(UserError, match="test_data: expected val_data with it"):
        train_command.parse("sets", ["--data", files["train"], "--test-data", files["test"]])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"targets": np.full((NUM, 3, 2), np.nan)}, "targets: expected finite numbers"),
        ({"targets": np.ones((NUM, 4, 2)), "mask": None}, "at most 3 elements in a set"),
        ({"names": np.array(["b", "a"])}, "names: expected a, b, as the model was trained on"),
    ],
)
def test_targets_that_do_not_fit_cost_the_scores_alone(changes, words, tmp_path):
    np.savez(tmp_path / "data.npz", **arrays(names=np.array(["a", "b"])))
    form = Config(data=str(tmp_path / "data.npz")).completed().form
    np.savez(tmp_path / "new.npz", **arrays(**changes))
    found = source.load_for_prediction(str(tmp_path / "new.npz"), form)
    assert list(found.arrays) == ["inputs"]
    assert words in found.no_scores
    np.savez(tmp_path / "new.npz", **arrays(inputs=np.full((NUM, 4), np.nan), **changes))
    with pytest.raises(UserError, match="inputs: expected finite numbers"):
        source.load_for_prediction(str(tmp_path / "new.npz"), form)


def test_images_are_refused_in_words_by_a_model_of_sets(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["predict", "--data", "x.npz", "--out", "y.npz"]) == 2
    assert "--run: expected a run folder of msdspn train sets" in capsys.readouterr().err
    assert cli.main(["train", "sets"]) == 2
    assert "--data: expected an .npz file, a folder of .npy files or a" in capsys.readouterr().err


@pytest.mark.slow
def test_coco_from_the_command_line_to_figures(tmp_path, monkeypatch, capsys):
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    images = []
    for i in range(5):
        size = (40 + 5 * i, 50)
        Image.new("RGB", size, (50 * i, 9, 9)).save(tmp_path / "photos" / f"{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "width": size[0], "height": size[1]})
    boxes = [{"image_id": i, "category_id": 1, "bbox": [5, 5, 20, 10 + i]} for i in range(5)]
    boxes.append({"image_id": 0, "category_id": 2, "bbox": [0, 0, 40, 50]})
    categories = [{"id": 1, "name": "cup"}, {"id": 2, "name": "plate"}]
    content = {"images": images, "annotations": boxes, "categories": categories}
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    argv = ["--data", "boxes.json", "--image-dir", "photos"]
    small = [*SMALL, "--encoder-width", "2", "--batch-size", "2"]
    assert cli.main(["train", "sets", *argv, "--run-dir", "run", *small]) == 0
    assert (tmp_path / "run" / "figures" / "predictions.png").exists()
    capsys.readouterr()
    assert cli.main(["predict", "--run", "run", *argv, "--out", "found.npz"]) == 0
    assert "was held out: msdspn evaluate run" in capsys.readouterr().out
    found = np.load("found.npz")
    assert found["sets"].shape == (5, 2, 6)
    assert found["names"].tolist() == ["x", "y", "w", "h", "is cup", "is plate"]
    # A folder of the same pictures, in the order of their names.
    assert cli.main(["predict", "--run", "run", "--data", "photos", "--out", "again.npz"]) == 0
    again = np.load("again.npz")
    assert again["files"].tolist() == [f"{i}.png" for i in range(5)]
    np.testing.assert_allclose(again["sets"], found["sets"], atol=1e-5)
    assert "held out" not in capsys.readouterr().out
    (tmp_path / "photos" / "2.png").write_bytes(b"no picture")
    assert cli.main(["predict", "--run", "run", "--data", "photos", "--out", "left.npz"]) == 1
    assert "left out: " in capsys.readouterr().err
    left = np.load("left.npz")
    assert left["files"].tolist() == [f"{i}.png" for i in (0, 1, 3, 4)]
    np.testing.assert_allclose(left["sets"], found["sets"][[0, 1, 3, 4]], atol=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("without_hook")  # which takes a symbolic size for another one
@pytest.mark.parametrize("kind", ["vectors", "sets", "images"])
def test_an_exported_program_predicts_with_and_without_the_package(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("data.npz", **arrays(kind))
    argv = ["train", "sets", "--data", "data.npz", "--run-dir", "run", "--encoder-width", "2"]
    assert cli.main([*argv, *SMALL]) == 0
    assert cli.main(["predict", "--run", "run", "--data", "data.npz", "--out", "found.npz"]) == 0
    assert cli.main(["export", "--run", "run", "--out", "model.zip", "--platforms", "cpu"]) == 0
    with zipfile.ZipFile("model.zip") as archive:
        archive.extract("predict.py")
    code = "import sys; sys.modules['msdspn_jax'] = None; sys.argv = sys.argv[1:]; import runpy; "
    code += "runpy.run_path(sys.argv[0])"
    subprocess.run(
        [sys.executable, "-c", code, "predict.py", "model.zip", "data.npz", "own.npz"],
        check=True, env=environment(),
    )  # fmt: skip
    argv = ["predict", "--program", "model.zip", "--data", "data.npz", "--out", "verb.npz"]
    assert cli.main([*argv, "--batch-size", "4"]) == 0
    found = np.load("found.npz")
    for file in ("own.npz", "verb.npz"):
        other = np.load(file)
        assert other["names"].tolist() == found["names"].tolist()
        for name in ("sets", "presence", "mask"):
            np.testing.assert_allclose(other[name], found[name], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--loss", "chamfer", "--model", "dspn"]])
def test_sets_of_varying_size_are_learned(flags, tmp_path, monkeypatch):
    """The elements of a set are multiples of a vector; how many, says its first entry."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(3)
    inputs = rng.normal(size=(2000, 3)).astype(np.float32)
    targets = 50 + 10 * inputs[:, None] * np.array([1, 2, 3])[:, None]
    mask = np.arange(3) < 2 + (inputs[:, :1] > 0)
    np.savez("data.npz", inputs=inputs, targets=targets, mask=mask)
    argv = ["train", "sets", "--data", "data.npz", "--run-dir", "run", "--hidden-dim", "64"]
    argv += ["--latent-dim", "64", "--steps", "500", "--inner.num-steps", "10", "--no-progress"]
    assert cli.main([*argv, *flags]) == 0
    assert cli.main(["predict", "--run", "run", "--data", "data.npz", "--out", "found.npz"]) == 0
    found = np.load("found.npz")
    assert (found["mask"].sum(1) == mask.sum(1)).mean() > 0.8
    # The sum over the elements, of sets of the right size, which no order changes.
    right = found["mask"].sum(1) == mask.sum(1)
    of_found = (found["sets"] * found["mask"][..., None]).sum(1)[right]
    of_data = (targets * mask[..., None]).sum(1)[right]
    spread = of_data.std()
    assert np.abs(of_found - of_data).mean() < 0.3 * spread
