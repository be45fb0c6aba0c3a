import dataclasses

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

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


def test_names_stand_in_the_image_and_keep_apart():
    rng = np.random.default_rng(0)
    some = [
        dataclasses.replace(OBJECTS[i % 3], position=(*rng.uniform(-3, 3, 2), 0.7))
        for i in range(10)
    ]
    target = encode(some)
    wrong = target.copy()
    wrong[0, 5:13] = np.eye(8)[3]
    figure = plots.scene(np.zeros((320, 480, 3), np.uint8), wrong, target)
    figure.set_dpi(130)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    (panel,) = figure.subfigs
    axes = panel.axes[0]
    names = {text.get_text(): text for text in axes.texts}
    assert "1 purple cube" in names
    assert names["1 purple cube"].get_color() != "white"
    assert names["2 blue sphere"].get_color() == "white"
    # About CLEVR's own size, with letters of at least nine pixels.
    box = axes.get_window_extent()
    assert 440 < box.width < 560
    boxes = [text.get_window_extent() for text in names.values()]
    assert all(b.height >= 9 for b in boxes)
    inside = [box.x0 - 5 < b.x0 and b.x1 < box.x1 + 5 for b in boxes]
    assert all(inside)
    common = [a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i]]
    assert sum(common) <= 1


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
        "reliability": plots.reliability(
            {"score": metrics.Reliability(*np.array([[0.1, 0.9], [0.2, 0.8], [9, 9]]), 0.1)},
            threshold=0.4,
            by_threshold=(np.linspace(0, 1, 5), np.ones(5), np.linspace(1, 0, 5)),
        ),
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
