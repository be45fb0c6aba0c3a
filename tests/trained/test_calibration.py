import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from msdspn_jax.clevr.metrics import right_within
from msdspn_jax.clevr.objects import ClevrObject, encode
from msdspn_jax.errors import UserError
from msdspn_jax.tasks.clevr import task as clevr
from msdspn_jax.trained import calibration, weights
from msdspn_jax.trained.calibration import Calibration

CONFIG = clevr.Config(model="slot-mlp", size=16, slot_dim=4, hidden_dim=4, set_size=10)
FITTED = Calibration(presence=5.0, lead=4.0, offset=-7.0, threshold=0.375, scenes=100)
SCRIPT = Path(__file__).parents[2] / "experiments" / "clevr" / "calibrate.py"


def sets_and_chances(scenes, seed=0):
    """Random sets, and the probability that each element is right, by a known curve."""
    rng = np.random.default_rng(seed)
    sets = rng.uniform(-0.1, 1.1, (scenes, 10, 19)).astype(np.float32)
    presence, lead = np.moveaxis(calibration.clues(sets), -1, 0)
    return sets, 1 / (1 + np.exp(-(6 * presence + 5 * lead - 4)))


def test_the_curve_behind_the_data_is_found_and_scores_are_kept():
    sets, chances = sets_and_chances(3000)
    right = np.random.default_rng(1).uniform(size=chances.shape) < chances
    fitted = calibration.fit(sets, right, int(right.sum()))
    found = (fitted.presence, fitted.lead, fitted.offset)
    np.testing.assert_allclose(found, (6, 5, -4), rtol=0.1)
    scores = np.asarray(fitted.score(sets))
    np.testing.assert_allclose(scores, chances, atol=0.03)
    kept, before = (calibration.reliability(x, right) for x in (scores, sets[..., 18]))
    assert kept.error < 0.02 < before.error
    # Bins of equal width, also for scores outside of 0 to 1.
    assert kept.number.sum() == before.number.sum() == scores.size
    assert (np.diff(kept.score) > 0).all()
    np.testing.assert_array_less(np.abs(kept.score - (np.arange(10) + 0.5) / 10), 0.05)
    # No other threshold is better in F1, by these scenes.
    number = int(right.sum())

    def f1(threshold):
        both = calibration.precision_and_recall(scores, right, number, threshold)
        return 2 * both[0] * both[1] / sum(both)

    assert f1(fitted.threshold) >= max(map(f1, np.linspace(0.05, 0.9, 18))) - 1e-3
    # Under jit as well.
    np.testing.assert_allclose(jax.jit(fitted.score)(sets), scores, rtol=1e-5)


def test_a_threshold_does_not_split_elements_of_one_score():
    score = np.array([0.9, 0.9, 0.9, 0.2])
    right = np.array([True, True, False, False])
    threshold = calibration._best_threshold(score, right, 2)
    assert 0.2 < threshold < 0.9
    assert calibration.precision_and_recall(score, right, 2, threshold) == (2 / 3, 1)


def test_what_cannot_be_calibrated_is_refused():
    sets, _ = sets_and_chances(10)
    for right in (np.ones((10, 10), bool), np.zeros((10, 10), bool)):
        with pytest.raises(ValueError, match="elements that are right and others"):
            calibration.fit(sets, right, 10)
    with pytest.raises(ValueError, match="more presence to be right more often"):
        calibration.fit(sets, sets[..., 18] < 0.5, 10)


@pytest.mark.usefixtures("without_hook")
@pytest.mark.parametrize(
    "change",
    [{"presence": 0.0}, {"lead": -1.0}, {"offset": float("nan")}, {"threshold": 1.5},
     {"scenes": "many"}, {"presence": 1e300}, {"presence": True}],
)  # fmt: skip
def test_values_out_of_range_are_refused(change):
    with pytest.raises(ValueError, match="expected"):
        dataclasses.replace(FITTED, **change)


def test_the_lead_is_that_of_the_most_doubtful_word():
    element = encode([ClevrObject("cube", "large", "metal", "red", (0.0, 0.0, 0.7))])[:1]
    assert calibration.clues(element).tolist() == [[1.0, 1.0]]
    element[0, 13] = 0.75  # Nearly a sphere.
    assert calibration.clues(element).tolist() == [[1.0, 0.25]]


@pytest.fixture
def path(tmp_path):
    shapes = jax.eval_shape(clevr.build_predictor(CONFIG).init, jax.random.key(1))
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda x: rng.normal(0, 0.1, x.shape).astype(x.dtype), shapes)
    weights.save_model(tmp_path / "a.safetensors", CONFIG, variables, step=5)
    return tmp_path / "a.safetensors"


def test_a_weights_file_keeps_it_and_predictions_have_it(path):
    before = weights.load_model(path)
    assert (before.calibration, before.threshold) == (None, 0.5)
    weights.set_calibration(path, FITTED)
    after = weights.load_model(path)
    assert (after.calibration, after.threshold) == (FITTED, 0.375)
    assert (after.step, after.config) == (before.step, before.config)
    jax.tree.map(np.testing.assert_array_equal, after.variables, before.variables)
    images = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
    raw = np.asarray(before.predict(before.variables, images))
    scored = np.asarray(after.predict(after.variables, images))
    np.testing.assert_array_equal(scored[..., :18], raw[..., :18])
    np.testing.assert_allclose(scored[..., 18], FITTED.score(raw), rtol=1e-6)


@pytest.mark.usefixtures("without_hook")
@pytest.mark.parametrize("value", [7, {"presence": 1}, FITTED.to_json() | {"threshold": 9}])
def test_a_damaged_calibration_is_told(path, value):
    class Wrong:
        def to_json(self):
            return value

    weights.set_calibration(path, Wrong())
    with pytest.raises(UserError, match="its calibration is not valid"):
        weights.load_model(path)


def test_the_model_in_the_box_is_calibrated():
    model = weights.load_model(weights.box_model_path())
    assert model.calibration is not None, "run experiments/clevr/calibrate.py"
    said = json.loads((SCRIPT.parent / "calibration.json").read_text())
    # Another model, another calibration: the same command makes both.
    assert said["calibration"] == model.calibration.to_json()
    assert said["step"] == model.step
    assert said["error"]["calibrated score"] < 0.05


def test_right_is_said_in_the_order_of_the_predictions():
    objects = [
        ClevrObject("cube", "large", "metal", "red", (0.0, 0.0, 0.7)),
        ClevrObject("cube", "large", "metal", "red", (2.0, 0.0, 0.7)),
    ]
    target = encode(objects)[None]
    predicted = encode(
        [
            dataclasses.replace(objects[0], position=(0.4, 0.0, 0.7), score=0.2),
            dataclasses.replace(objects[0], position=(0.1, 0.0, 0.7), score=0.9),
            dataclasses.replace(objects[1], color="blue", score=0.8),
        ]
    )[None]
    # The second takes the object that the first is close to; the first is left with the other one.
    assert right_within(predicted, target, 1.0)[0, :4].tolist() == [False, True, False, False]
    assert right_within(predicted, target, 2.0)[0, :4].tolist() == [True, True, False, False]


@pytest.mark.slow
def test_one_command_calibrates_a_model(tmp_path):
    path = tmp_path / "box.safetensors"
    path.write_bytes(weights.box_model_path().read_bytes())
    words = ["--model", path, "--num", "100", "--out", tmp_path]
    subprocess.run([sys.executable, SCRIPT, *map(str, words)], check=True, capture_output=True)
    said = json.loads((tmp_path / "calibration.json").read_text())
    fitted = weights.load_model(path).calibration
    assert fitted is not None
    assert fitted.to_json() == said["calibration"]
    assert fitted.scenes == 50
    assert (tmp_path / "reliability.png").stat().st_size > 1000
