import numpy as np
import pytest

from msdspn_jax import metrics, plots
from msdspn_jax.clevr import objects as clevr
from msdspn_jax.clevr import plots as plots_clevr

OBJECTS = [
    clevr.ClevrObject("cube", "large", "metal", "red", (1.0, -1.0, 0.7)),
    clevr.ClevrObject("sphere", "small", "rubber", "blue", (-2.0, 1.0, 0.35)),
    clevr.ClevrObject("cylinder", "large", "rubber", "green", (0.0, 2.5, 0.7)),
]
IMAGE = np.full((64, 64, 3), 120, np.uint8)


def words_of(figure):
    """Every text of the list beside the image, and its color."""
    (panel,) = figure.subfigs
    return [(text.get_text(), text.get_color()) for text in panel.axes[1].texts]


def test_right_predictions_are_not_red():
    target = clevr.encode(OBJECTS)
    words = words_of(plots_clevr.scene(IMAGE, target[::-1], target))
    assert plots_clevr.WRONG not in [color for _, color in words]
    assert [text for text, _ in words].count("0.000") == 3
    assert ("missed:", plots_clevr.QUIET) not in words


def test_wrong_words_are_red_and_the_distance_is_told():
    target = clevr.encode(OBJECTS)
    changed = [
        clevr.ClevrObject("cube", "large", "metal", "purple", (1.0, -0.7, 0.3)),
        *OBJECTS[1:],
    ]
    words = words_of(plots_clevr.scene(IMAGE, clevr.encode(changed), target))
    assert [text for text, color in words if color == plots_clevr.WRONG] == ["purple"]
    assert "0.500" in [text for text, _ in words]


def test_missed_and_invented_objects_are_red():
    target = clevr.encode(OBJECTS)
    words = words_of(plots_clevr.scene(IMAGE, clevr.encode(OBJECTS[:2]), target))
    red = [text for text, color in words if color == plots_clevr.WRONG]
    assert red == ["large", "green", "rubber", "cylinder"]
    assert ("missed:", plots_clevr.QUIET) in words
    words = words_of(plots_clevr.scene(IMAGE, target, clevr.encode(OBJECTS[:2])))
    red = [text for text, color in words if color == plots_clevr.WRONG]
    assert red == ["large", "green", "rubber", "cylinder", "–"]


def test_without_truth_nothing_is_judged():
    prediction = clevr.encode(OBJECTS)
    prediction[0, 18] = 0.3
    words = words_of(plots_clevr.scene(IMAGE, prediction))
    texts = [text for text, _ in words]
    assert "red" not in texts, "a presence below the threshold is no object"
    assert "blue" in texts
    assert "distance" not in texts
    assert plots_clevr.WRONG not in [color for _, color in words]


def test_circles_are_where_the_camera_sees_the_objects():
    target = clevr.encode(OBJECTS)
    camera = clevr.look_at_origin((7.0, -7.0, 5.0))
    (panel,) = plots_clevr.scene(IMAGE, target, target, camera=camera).subfigs
    circles = panel.axes[0].patches
    assert len(circles) == 6
    expected = clevr.project(camera, np.array([o.position for o in OBJECTS]), 480, 320)
    np.testing.assert_allclose([c.center for c in circles[:3]], expected, atol=1e-4)
    np.testing.assert_allclose([c.center for c in circles[3:]], expected, atol=1e-4)
    # The large cube is nearer than the large cylinder, and half of them is small.
    cube, sphere, cylinder = (c.radius for c in circles[:3])
    assert cube > cylinder > sphere > 5


def test_grids_and_curves_are_drawn(tmp_path):
    rng = np.random.default_rng(0)
    targets = np.stack([clevr.encode(OBJECTS)] * 3)
    predictions = targets + 0.1 * rng.normal(size=targets.shape)
    curve = metrics.precision_recall(predictions, targets, 0.5)
    errors = metrics.attribute_errors(predictions, targets)
    by_attribute = {name: float(errors[name].mean()) for name in ("color", "shape")}
    by_number = metrics.mean_by_number_of_objects(errors["position"], targets)
    figures = {
        "scenes": plots_clevr.scenes([IMAGE] * 3, predictions, targets, titles=["a", "b", "c"]),
        "curves": plots_clevr.precision_recall_curves({"AP0.5": curve}),
        "steps": plots_clevr.average_precision_by_steps(
            {10: [0.5, 0.2], 20: [0.9, 0.6]}, [np.inf, 0.5], protocol="per image"
        ),
        "errors": plots_clevr.errors({"iDSPN": by_attribute}, {"iDSPN": by_number}),
    }
    for name, figure in figures.items():
        plots.save(figure, tmp_path / f"{name}.png", dpi=40)
        assert (tmp_path / f"{name}.png").stat().st_size > 1000
    steps = figures["steps"].axes[0]
    assert [line.get_ydata().tolist() for line in steps.lines] == [[50, 90], [20, 60]]
    assert [text.get_text() for text in steps.get_legend().get_texts()] == ["AP∞", "AP0.5"]


def test_bad_arguments_are_named():
    target = clevr.encode(OBJECTS)
    with pytest.raises(ValueError, match="predictions must have one entry an image, got 1, 2"):
        plots_clevr.scenes([IMAGE, IMAGE], [target])
    with pytest.raises(ValueError, match="images must not be empty"):
        plots_clevr.scenes([], [])
