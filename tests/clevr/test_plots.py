import numpy as np
import pytest

from msdspn_jax.clevr import metrics, plots
from msdspn_jax.clevr.camera import look_at_origin, project
from msdspn_jax.clevr.objects import ClevrObject, encode
from msdspn_jax.plots import save

OBJECTS = [
    ClevrObject("cube", "large", "metal", "red", (1.0, -1.0, 0.7)),
    ClevrObject("sphere", "small", "rubber", "blue", (-2.0, 1.0, 0.35)),
    ClevrObject("cylinder", "large", "rubber", "green", (0.0, 2.5, 0.7)),
]
IMAGE = np.full((64, 64, 3), 120, np.uint8)


def words_of(figure):
    """Every text of the list beside the image, and its color."""
    (panel,) = figure.subfigs
    return [(text.get_text(), text.get_color()) for text in panel.axes[1].texts]


def test_right_predictions_are_not_red():
    target = encode(OBJECTS)
    words = words_of(plots.scene(IMAGE, target[::-1], target))
    assert plots.WRONG not in [color for _, color in words]
    assert [text for text, _ in words].count("0.000") == 3
    assert ("missed:", plots.QUIET) not in words


def test_wrong_words_are_red_and_the_distance_is_told():
    target = encode(OBJECTS)
    changed = [
        ClevrObject("cube", "large", "metal", "purple", (1.0, -0.7, 0.3)),
        *OBJECTS[1:],
    ]
    words = words_of(plots.scene(IMAGE, encode(changed), target))
    assert [text for text, color in words if color == plots.WRONG] == ["purple"]
    assert "0.500" in [text for text, _ in words]


def test_missed_and_invented_objects_are_red():
    target = encode(OBJECTS)
    words = words_of(plots.scene(IMAGE, encode(OBJECTS[:2]), target))
    red = [text for text, color in words if color == plots.WRONG]
    assert red == ["large", "green", "rubber", "cylinder"]
    assert ("missed:", plots.QUIET) in words
    words = words_of(plots.scene(IMAGE, target, encode(OBJECTS[:2])))
    red = [text for text, color in words if color == plots.WRONG]
    assert red == ["large", "green", "rubber", "cylinder", "–"]


def test_without_truth_nothing_is_judged():
    prediction = encode(OBJECTS)
    prediction[0, 18] = 0.3
    words = words_of(plots.scene(IMAGE, prediction))
    texts = [text for text, _ in words]
    assert "red" not in texts, "a presence below the threshold is no object"
    assert "blue" in texts
    assert "distance" not in texts
    assert plots.WRONG not in [color for _, color in words]


def test_circles_are_where_the_camera_sees_the_objects():
    target = encode(OBJECTS)
    camera = look_at_origin((7.0, -7.0, 5.0))
    (panel,) = plots.scene(IMAGE, target, target, camera=camera).subfigs
    circles = panel.axes[0].patches
    assert len(circles) == 6
    expected = project(camera, np.array([o.position for o in OBJECTS]))[:, :2]
    np.testing.assert_allclose([c.center for c in circles[:3]], expected, atol=1e-4)
    np.testing.assert_allclose([c.center for c in circles[3:]], expected, atol=1e-4)
    # The large cube is nearer than the large cylinder, and half of them is small.
    cube, sphere, cylinder = (c.radius for c in circles[:3])
    assert cube > cylinder > sphere > 5


def test_grids_and_curves_are_drawn(tmp_path):
    rng = np.random.default_rng(0)
    targets = np.stack([encode(OBJECTS)] * 3)
    predictions = targets + 0.1 * rng.normal(size=targets.shape)
    curve = metrics.precision_recall(predictions, targets, 0.5)
    errors = metrics.attribute_errors(predictions, targets)
    by_attribute = {name: float(errors[name].mean()) for name in ("color", "shape")}
    by_number = metrics.mean_by_number_of_objects(errors["position"], targets)
    figures = {
        "scenes": plots.scenes([IMAGE] * 3, predictions, targets, titles=["a", "b", "c"]),
        "curves": plots.precision_recall_curves({"AP0.5": curve}),
        "steps": plots.average_precision_by_steps(
            {10: np.array([0.5, 0.2]), 20: np.array([0.9, 0.6])},
            [np.inf, 0.5],
            protocol="per image",
        ),
        "errors": plots.errors({"iDSPN": by_attribute}, {"iDSPN": by_number}),
    }
    for name, figure in figures.items():
        save(figure, tmp_path / f"{name}.png", dpi=40)
        assert (tmp_path / f"{name}.png").stat().st_size > 1000
    steps = figures["steps"].axes[0]
    assert [line.get_ydata().tolist() for line in steps.lines] == [[50, 90], [20, 60]]
    assert [text.get_text() for text in steps.get_legend().get_texts()] == ["AP∞", "AP0.5"]


@pytest.mark.usefixtures("without_hook")
def test_bad_arguments_are_named():
    target = encode(OBJECTS)
    with pytest.raises(ValueError, match="predictions: expected one entry an image, 2, got 1"):
        plots.scenes([IMAGE, IMAGE], [target])
    with pytest.raises(ValueError, match="images: expected at least one"):
        plots.scenes([], [])
