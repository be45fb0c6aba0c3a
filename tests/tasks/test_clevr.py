"""CLEVR object property prediction: data, models and scores, put together as a task."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_tasks import configured

from msdspn_jax.clevr import metrics
from msdspn_jax.clevr import objects as layout
from msdspn_jax.clevr.cache import cache_folder, prepare_cache
from msdspn_jax.errors import UserError
from msdspn_jax.models.inner import Inner
from msdspn_jax.tasks.clevr import model as clevr_model
from msdspn_jax.tasks.clevr import report as clevr_report
from msdspn_jax.tasks.clevr import scores as clevr_scores
from msdspn_jax.tasks.clevr import task as clevr
from msdspn_jax.trained import run as trained_runs
from msdspn_jax.training import loop
from msdspn_jax.training.config import Outer

SIZE = 64
INNER = Inner(num_steps=2, late_num_steps=3)


class MadeUp:
    """A source of random images with random objects: records as real CLEVR gives them."""

    def __init__(self, num: int, seed: int):
        random = np.random.default_rng(seed)
        self.images = random.integers(0, 256, (num, SIZE, SIZE, 3), dtype=np.uint8)
        self.objects = random_objects(random, num)
        self.fingerprint = f"made up {num} {seed}"

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return {
            "image": self.images[index],
            "objects": self.objects[index],
            "file_name": f"{index}.png",
        }


def random_objects(random, num: int) -> np.ndarray:
    """Sets of 3 to 10 objects, present ones first."""
    indices = {name: random.integers(0, len(v), (num, 10)) for name, v in layout.ATTRIBUTES.items()}
    present = np.arange(10) < random.integers(3, 11, (num, 1))
    position = random.uniform(-3, 3, (num, 10, 3))
    return np.asarray(layout.encode_features(position, **indices, present=present))


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Prepared caches of 24 training and 10 published validation images."""
    folder = tmp_path_factory.mktemp("clevr")
    for split, num, seed in (("train", 24, 0), ("val", 10, 1)):
        prepare_cache(MadeUp(num, seed), cache_folder(folder, split, SIZE), size=SIZE)
    return folder


def config(data_dir=None, **changes: Any) -> clevr.Config:
    settings: dict[str, Any] = {
        "size": SIZE,
        "batch_size": 4,
        "steps": 4,
        "val_size": 5,
        "test_size": 7,
        "encoder_width": 2,
        "latent_dim": 4,
        "hidden_dim": 4,
        "slot_dim": 4,
        "inner": INNER,
        "tensorboard": False,
        "progress": False,
    }
    if data_dir is not None:
        settings |= {"data": "folder", "data_dir": str(data_dir)}
    return configured(clevr.Config, **(settings | changes))


# Settings ---------------------------------------------------------------------------------------


def test_defaults_are_the_published_settings():
    c = clevr.Config()
    inner = c.resolved_inner()
    assert (inner.num_steps, inner.late_num_steps, c.steps_at_evaluation) == (20, 40, 40)
    assert (inner.momentum, inner.step_size, inner.max_grad_norm) == (0.9, 1.0, 10.0)
    assert inner.proximity == 0.1
    assert clevr.Config(model="dspn").resolved_inner().momentum == 0.5
    assert (c.batch_size, c.resolved_learning_rate(), c.latent_dim) == (128, 1e-3, 512)
    assert c.steps * c.batch_size == pytest.approx(100 * 70_000, rel=1e-3)
    assert clevr.Config(model="slot-attention").resolved_learning_rate() == 4e-4
    given = clevr.Config(model="slot-mlp", learning_rate=0.5)
    assert given.resolved().learning_rate == 0.5
    assert given.steps_at_evaluation is None


def test_inner_steps_grow_in_the_middle_of_training():
    stage = config(steps=5).stages()
    assert [stage(step) for step in range(5)] == [2, 2, 2, 3, 3]
    assert config(model="slot-mlp").stages()(0) is None


def test_validation_takes_the_inner_steps_of_training(monkeypatch):
    asked = []

    def predict_all(predictor, variables, images, objects, key, *, inner_steps):
        asked.append(inner_steps)
        return objects, {}

    monkeypatch.setattr(clevr, "predict_all", predict_all)
    monkeypatch.setattr(clevr, "load_split", lambda *_: (np.zeros(2), np.ones((2, 10, 19))))
    key = jax.random.key(0)
    for changes in ({}, {"inner": dataclasses.replace(INNER, eval_num_steps=7)}):
        task = clevr.build(config(steps=4, **changes))
        for step in (0, 2, 3, 4):
            assert task.evaluate_at(step, {}, "val", key)["inner_steps"] == asked[-1]
    assert asked == [2, 2, 3, 3, 7, 7, 7, 7]


def test_the_weight_of_the_position_leaves_the_scale_of_the_loss():
    predictors = [clevr.build_predictor(config(position_weight=w)) for w in (1.0, 4.0)]
    objects = jnp.zeros((1, 10, layout.NUM_FEATURES))
    distances = {}
    for name, places in {"all": slice(None), "position": slice(3), "rest": slice(3, None)}.items():
        found = clevr_model.Prediction(objects.at[..., places].set(1.0), None, None)
        distances[name] = [float(p.distance(found, objects)[0]) for p in predictors]
    plain, weighted = zip(*distances.values(), strict=True)
    assert weighted[0] == pytest.approx(plain[0])
    assert weighted[1] / weighted[2] == pytest.approx(4 * plain[1] / plain[2])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"set_size": 3}, "set_size: expected at least 10"),
        ({"min_objects": 5, "max_objects": 4}, "min_objects <= max_objects"),
        ({"max_objects": 11}, "got 3 and 11"),
        ({"data": "folder"}, "data_dir: expected where"),
        ({"rate_drop": 0.0}, r"rate_drop: expected a number in \(0, 1\]"),
        ({"val_size": 0}, "val_size: expected an integer >= 1, got 0"),
        ({"train_size": 0}, "train_size: expected an integer >= 1, got 0"),
        ({"train_size": 9, "fresh": True}, "train_size: expected none with fresh, got 9"),
        ({"fresh": True, "data": "tfds", "data_dir": "x"}, "fresh: expected data procedural"),
        ({"size": 100}, "size: expected a multiple of 64"),
        ({"size": 64, "encoder_stride": 2}, r"a multiple of 128 \(encoder_stride is 2\), got 64"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        clevr.Config(**changes)


def test_learning_rate_falls_to_a_tenth_at_the_end():
    c = config(steps=10)
    updates = rates(clevr_model.outer_optimizer(c), 10)
    np.testing.assert_allclose(updates, [1e-3] * 9 + [1e-4], rtol=1e-4)


def test_learning_rate_of_the_slot_models_rises_then_halves():
    c = config(model="slot-mlp", steps=60, warmup_steps=4)
    updates = rates(clevr_model.outer_optimizer(c), 60)
    assert np.argmax(updates) == 3
    np.testing.assert_allclose(updates[0], 4e-4 / 4, rtol=1e-3)
    assert updates[43] == pytest.approx(updates[23] / 2, rel=1e-3)


def rates(optimizer, steps):
    """Adam's updates of a constant gradient are its learning rate."""
    state, found = optimizer.init(jnp.zeros(())), []
    for _ in range(steps):
        update, state = optimizer.update(jnp.ones(()), state)
        found.append(-float(update))
    return np.array(found)


# Models -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", ["fspool", "relation", "sum", "mean"])
@pytest.mark.parametrize("model", ["idspn", "dspn", "slot-attention", "slot-mlp"])
def test_every_model_trains_and_predicts_by_shape(model, pool):
    if pool != "fspool" and not model.endswith("dspn"):
        pytest.skip("the slot models do not pool")
    inner = dataclasses.replace(INNER, pool=pool)
    predictor = clevr.build_predictor(config(model=model, inner=inner))
    variables = jax.eval_shape(predictor.init, jax.random.key(0))
    images = jax.ShapeDtypeStruct((4, SIZE, SIZE, 3), jnp.uint8)
    objects = jax.ShapeDtypeStruct((4, 10, 19), jnp.float32)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 4))
    losses, prediction, state = jax.eval_shape(
        lambda *a: predictor.loss(*a, inner_steps=2), variables, images, objects, keys
    )
    chex.assert_shape(losses, (4,))
    chex.assert_shape(prediction.objects, (4, 10, 19))
    chex.assert_trees_all_equal_shapes(state, variables.get("state"))
    assert (prediction.minimum is not None) == model.endswith("dspn")
    evaluated = jax.eval_shape(predictor.predict, variables, images, keys)
    chex.assert_shape(evaluated.objects, (4, 10, 19))


def test_half_precision_is_for_the_encoder_alone():
    predictor = clevr.build_predictor(config(compute_dtype="bfloat16"))
    variables = jax.eval_shape(predictor.init, jax.random.key(0))
    chex.assert_tree_all_finite(jax.tree.map(lambda x: jnp.zeros((), x.dtype), variables))
    assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    images = jax.ShapeDtypeStruct((2, SIZE, SIZE, 3), jnp.uint8)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 2))
    assert jax.eval_shape(predictor.predict, variables, images, keys).objects.dtype == jnp.float32


def test_slot_prediction_and_loss_speak_of_the_same_positions():
    # A prediction equal to its target must cost nothing, through the change of units.
    predictor = clevr.build_predictor(config(model="slot-mlp"))
    objects = jnp.asarray(random_objects(np.random.default_rng(0), 2))
    unit = (objects[..., :3] + 1) / 2
    output = objects.at[..., :3].set(jnp.where(objects[..., -1:] > 0, unit, 0.0))
    made = predictor._prediction(output)
    present = objects[..., -1] > 0
    np.testing.assert_allclose(made.objects[present], objects[present], atol=1e-6)
    np.testing.assert_allclose(predictor.distance(made, objects), 0, atol=1e-6)


# Data -------------------------------------------------------------------------------------------


def test_validation_images_are_held_out_of_the_training_split(data_dir):
    c = config(data_dir)
    source, published = MadeUp(24, 0), MadeUp(10, 1)
    expected = {
        "train": (source.images[:19], source.objects[:19]),
        "val": (source.images[19:], source.objects[19:]),
        "test": (published.images[:7], published.objects[:7]),
    }
    for split, (images, objects) in expected.items():
        found = clevr.load_split(c, split)  # type: ignore[arg-type]
        np.testing.assert_array_equal(found[0], images)
        np.testing.assert_array_equal(found[1], objects)


def test_more_images_than_there_are_is_an_error(data_dir):
    with pytest.raises(UserError, match="at least 20 images for the train split, got 19 of 24"):
        clevr.load_split(config(data_dir, train_size=20), "train")


def test_no_data_is_an_error(tmp_path):
    with pytest.raises(UserError, match="expected an extracted CLEVR"):
        clevr.load_split(config(tmp_path), "train")


# Training ---------------------------------------------------------------------------------------


def train(folder, **changes):
    return loop.train(clevr.build(c := config(**changes, run_dir=str(folder))), c)


def test_a_short_run_scores_itself(data_dir, tmp_path):
    outcome = train(tmp_path / "run", data_dir=data_dir, model="slot-mlp", steps=1)
    assert {"loss", "ap_0.125", "dataset_ap_0.125", "ap_mean"} <= set(outcome.metrics)
    assert {"predictions.png", "errors.png"} <= {
        path.name for path in (tmp_path / "run" / "figures").iterdir()
    }


@pytest.mark.slow
def test_images_on_host_or_device_and_resuming_give_the_same_bits(data_dir, tmp_path):
    common = {"data_dir": data_dir, "model": "slot-mlp", "steps": 4, "checkpoint_every": 2}
    on_device = train(tmp_path / "device", **common)
    on_host = train(tmp_path / "host", **common, images_on="host")
    chex.assert_trees_all_equal(on_device.state, on_host.state)

    # A run cut at step 2 and gone on with. (Its schedule must know the steps it will have.)
    task = clevr.build(config(**common))
    cut = config(**common, run_dir=str(tmp_path / "cut"))
    stopped = dataclasses.replace(cut, steps=2)
    loop.train(task, stopped)
    go_on = dataclasses.replace(cut.run, resume=True, allow_config_change=True)
    again = dataclasses.replace(cut, run=go_on)
    chex.assert_trees_all_equal(on_device.state, loop.train(task, again).state)


@pytest.mark.slow
def test_predictions_do_not_depend_on_the_rest_of_the_batch(data_dir):
    c = config(data_dir, model="slot-attention")
    predictor = clevr.build_predictor(c)
    variables = predictor.init(jax.random.key(0))
    images, objects = clevr.load_split(c, "val")
    key = jax.random.key(3)
    sets, means = clevr_scores.predict_all(predictor, variables, images, objects, key)
    chex.assert_shape(sets, (5, 10, 19))
    fewer, _ = clevr_scores.predict_all(predictor, variables, images[:4], objects[:4], key)
    np.testing.assert_allclose(sets[:4], fewer, atol=1e-5)
    losses = predictor.distance(
        predictor.predict(
            variables, jnp.asarray(images), jax.vmap(lambda i: jax.random.fold_in(key, i))(
                jnp.arange(5)
            )
        ),
        jnp.asarray(objects),
    )  # fmt: skip
    assert means["loss"] == pytest.approx(float(losses.mean()), rel=1e-5)


def test_scores_are_those_of_both_protocols():
    objects = random_objects(np.random.default_rng(0), 6)
    noisy = objects + np.random.default_rng(1).normal(size=objects.shape) * 0.1
    found = clevr_scores.score(noisy.astype(np.float32), objects)
    for protocol, prefix in (("per_image", "ap"), ("dataset", "dataset_ap")):
        expected = metrics.average_precision(noisy.astype(np.float32), objects, protocol=protocol)  # type: ignore[arg-type]
        names = [f"{prefix}_{t}" for t in ("inf", "1", "0.5", "0.25", "0.125", "0.0625")]
        np.testing.assert_allclose([found[name] for name in names], expected)
    assert clevr_scores.score(objects, objects)["ap_mean"] == 1


def test_a_prediction_that_is_not_finite_finds_nothing_and_is_counted():
    objects = random_objects(np.random.default_rng(0), 6)
    broken = objects.copy()
    broken[2, 3, 0] = np.nan
    found = clevr_scores.score(broken, objects)
    assert found["not_finite"] == 1
    assert found["ap_0.5"] == pytest.approx(5 / 6)
    # Ranked last, so that the others lose nothing by it.
    share = 1 - (objects[2, :, -1] > 0.5).sum() / (objects[..., -1] > 0.5).sum()
    assert found["dataset_ap_0.5"] == pytest.approx(share)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data_dir": "/photographs"}, "--data-dir: --data procedural does not use it"),
        ({"data": "folder", "data_dir": "x", "data_seed": 3}, "--data-seed: --data folder does"),
        ({"outer": Outer(schedule="cosine"), "rate_drop": 0.5}, "--rate-drop: --outer.schedule"),
    ],
)
def test_flags_without_effect_are_said(changes, words):
    (remark,) = clevr.Config(**changes).remarks()
    assert words in remark


@pytest.mark.slow
def test_idspn_learns_procedural_scenes_far_beyond_chance(tmp_path):
    c = configured(
        clevr.Config, size=64, encoder_width=16, latent_dim=64, hidden_dim=64, set_size=1,
        min_objects=1, max_objects=1, train_size=2000, val_size=200, batch_size=32,
        inner=Inner(num_steps=10, late_num_steps=10), steps=500, evaluate_every=500,
        render_quality="fast",
        cache_dir=str(tmp_path / "images"), run_dir=str(tmp_path / "run"), tensorboard=False,
        progress=False,
    )  # fmt: skip
    outcome = loop.train(clevr.build(c), c)
    # By guessing, 1 of 96 kinds of objects is right.
    assert outcome.metrics["ap_inf"] > 0.3
    assert (tmp_path / "run" / "figures" / "inner_steps.png").exists()


def finished(folder, model, scores, **settings):
    """The files of a finished and evaluated run, as far as a report reads them."""
    folder.mkdir(parents=True)
    numbers = {f"{p}_{t:g}": v for p, v in scores.items() for t in metrics.AP_THRESHOLDS}
    c = configured(clevr.Config, model=model, steps=20, run_dir=str(folder), **settings).to_dict()
    (folder / "config.json").write_text(json.dumps({"task": "clevr", "config": c}))
    lines = [{"step": 20, "split": "train", "loss": 0.5, "steps_per_second": 2.0}]
    lines += [{"step": 20, "split": "val", "loss": 0.4, **numbers}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    (folder / "evaluation.json").write_text(json.dumps({"metrics": {"test": numbers}}))


def test_report_collects_runs_beside_the_published(tmp_path, capsys):
    runs, out = tmp_path / "runs", tmp_path / "out"
    argv = ["--runs", str(runs), "--out", str(out)]
    with pytest.raises(UserError, match="--runs: expected a folder with finished runs of clevr"):
        clevr_report.report(argv, trained_runs)
    small = {"size": 64, "set_size": 3, "min_objects": 1, "max_objects": 3}
    finished(runs / "a", "idspn", {"ap": 0.5, "dataset_ap": 0.25}, seed=0, **small)
    finished(runs / "b", "idspn", {"ap": 0.75, "dataset_ap": 0.5}, seed=7, **small)
    (runs / "b" / "figures").mkdir()
    tried = {steps: {"ap_0.5": steps / 100} for steps in (10, 40)}
    (runs / "b" / "figures" / "inner_steps.json").write_text(json.dumps(tried))
    finished(runs / "deep" / "c", "slot-mlp", {"ap": 0.125, "dataset_ap": 0.0}, **small)
    assert clevr_report.report(argv, trained_runs) == 0
    text = (out / "results.md").read_text()
    assert "| iDSPN, seed 7 | per image | 75.0 | 75.0 |" in text
    assert "| Slot MLP | data set | 0.0 |" in text
    assert "| iDSPN, seed 7 (20, then 40) | 10.0 | 40.0 |" in text
    assert "published |" not in text
    assert (out / "curves.png").stat().st_size > 5_000
    assert (out / "learning.png").stat().st_size > 5_000
    numbers = (out / "results.json").read_text()
    assert len(json.loads(numbers)) == 3
    assert str(tmp_path) not in numbers  # What was done, not where.

    finished(runs / "d", "idspn", {"ap": 0.9, "dataset_ap": 0.8}, seed=1)
    assert clevr_report.report(argv, trained_runs) == 0
    assert "iDSPN, published | per image | 98.8±0.5" in (out / "results.md").read_text()
    (runs / "d" / "evaluation.json").unlink()
    with pytest.raises(UserError, match=r"scored on the test split .* that are not: .*/d$"):
        clevr_report.report(argv, trained_runs)
