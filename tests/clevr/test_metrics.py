import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from msdspn_jax.clevr import metrics
from msdspn_jax.clevr.objects import CLEVR_LAYOUT

THRESHOLDS = metrics.AP_THRESHOLDS


def clevr_objects(rng, images=6, n=10, low=1):
    """Random sets in the CLEVR layout, with 1 to n real objects first."""
    sets = np.zeros((images, n, 19))
    sets[..., :3] = rng.uniform(-1, 1, (images, n, 3))
    for features in CLEVR_LAYOUT.attributes.values():
        width = features.stop - features.start
        sets[..., features] = np.eye(width)[rng.integers(width, size=(images, n))]
    sets[..., 18] = 1
    real = np.arange(n) < rng.integers(low, n + 1, size=images)[:, None]
    return sets * real[..., None]


def few_kinds(rng, **shape):
    """As above, with a single color, shape and size, so that many objects look alike."""
    sets = clevr_objects(rng, **shape)
    for name in ("color", "shape", "size"):
        features = CLEVR_LAYOUT.attributes[name]
        sets[..., features] = 0
        sets[..., features.start] = sets[..., 18]
    return sets


def area(right, num_real):
    """The area as a staircase: for each recall level, the best precision at it or beyond."""
    hits = np.cumsum(right)
    precision = hits / np.arange(1, len(right) + 1)
    return (
        sum(precision[hits >= level].max(initial=0) for level in range(1, num_real + 1)) / num_real
    )


def attributes_of(element):
    return [element[s].argmax() for s in CLEVR_LAYOUT.attributes.values()]


def distances(element, objects, excluded=()):
    """(distance, index) of real objects of the same attributes, closest first."""
    return sorted(
        (float(np.linalg.norm(3 * (element[:3] - other[:3]))), j)
        for j, other in enumerate(objects)
        if other[18] > 0.5 and j not in excluded and attributes_of(element) == attributes_of(other)
    )


def per_image_by_hand(prediction, target, threshold):
    areas = []
    for elements, objects in zip(prediction, target, strict=True):
        taken, right = set(), []
        for element in sorted(elements, key=lambda element: -element[18]):
            found = distances(element, objects, taken)
            right.append(bool(found) and found[0][0] < threshold)
            taken.update(j for _, j in found[:1])
        areas.append(area(right, int(objects[:, 18].sum())))
    return np.mean(areas)


def dataset_by_hand(prediction, target, threshold):
    ranked = [(i, e) for i, elements in enumerate(prediction) for e in elements]
    claimed, right = set(), []
    for image, element in sorted(ranked, key=lambda pair: -pair[1][18]):
        found = distances(element, target[image])
        good = bool(found) and found[0][0] < threshold and (image, found[0][1]) not in claimed
        right.append(good)
        if good:
            claimed.add((image, found[0][1]))
    return area(right, int(target[..., 18].sum()))


@pytest.mark.parametrize(
    ("protocol", "by_hand"), [("per_image", per_image_by_hand), ("dataset", dataset_by_hand)]
)
@pytest.mark.parametrize("noise", [0.05, 0.15, 0.5])
def test_average_precision_is_the_definition(protocol, by_hand, noise):
    rng = np.random.default_rng(3)
    target = few_kinds(rng)
    prediction = target + noise * rng.normal(size=target.shape)
    ours = metrics.average_precision(prediction, target, THRESHOLDS, protocol)
    expected = [by_hand(prediction, target, threshold) for threshold in THRESHOLDS]
    np.testing.assert_allclose(ours, expected, atol=1e-12)
    if noise == 0.15:
        assert 0.05 < ours[2] < 0.95, "the case is too easy or too hard to tell anything"


@pytest.mark.parametrize("protocol", ["per_image", "dataset"])
@hypothesis.settings(deadline=None, max_examples=20)
@hypothesis.given(seed=st.integers(0, 2**16))
def test_average_precision_has_its_properties(protocol, seed):
    rng = np.random.default_rng(seed)
    target = clevr_objects(rng)
    noisy = target + 0.1 * rng.normal(size=target.shape)
    ap = metrics.average_precision(noisy, target, THRESHOLDS, protocol)
    assert ((ap >= 0) & (ap <= 1)).all()
    assert (np.diff(ap) <= 1e-12).all(), "a smaller threshold cannot be easier"
    perfect = metrics.average_precision(target, target, THRESHOLDS, protocol)
    np.testing.assert_allclose(perfect, 1)
    order = rng.permutation(10)
    shuffled = metrics.average_precision(
        noisy[:, order], target[:, order[::-1]], THRESHOLDS, protocol
    )
    np.testing.assert_allclose(shuffled, ap)


def test_the_protocols_differ_where_two_predictions_claim_one_object():
    # Two objects alike, 1 unit apart; both predictions sit close to the first.
    target = few_kinds(np.random.default_rng(0), images=1, low=10)
    target[:, 2:] = 0
    target[0, :2, :3] = [[0, 0, 0], [1 / 3, 0, 0]]
    target[0, :2, 3:5] = [1, 0]
    prediction = target.copy()
    prediction[0, 1, :3] = [0.01, 0, 0]
    prediction[0, 1, 18] = 0.9
    (per_image,) = metrics.average_precision(prediction, target, [2.0], "per_image")
    (dataset,) = metrics.average_precision(prediction, target, [2.0], "dataset")
    assert per_image == 1
    assert dataset == 0.5


def test_equal_scores_keep_the_order_of_the_predictions():
    target = clevr_objects(np.random.default_rng(0), images=1, n=2, low=2)
    target[0, 1] = 0
    wrong = np.zeros(19)
    wrong[18] = 1
    right_first = np.stack([[target[0, 0], wrong]])
    ap = [
        metrics.average_precision(right_first[:, order], target, [1.0], protocol)[0]
        for protocol in ("per_image", "dataset")
        for order in ([0, 1], [1, 0])
    ]
    assert ap == [1, 0.5, 1, 0.5]


def test_images_without_objects_have_no_average_precision_of_their_own():
    rng = np.random.default_rng(1)
    target = clevr_objects(rng, images=3)
    target[1] = 0
    prediction = clevr_objects(rng, images=3)
    prediction[[0, 2]] = target[[0, 2]]
    by_image = metrics.average_precision_per_image(prediction, target, [1.0])
    np.testing.assert_array_equal(by_image[:, 0], [1, np.nan, 1])
    assert metrics.average_precision(prediction, target, [1.0], "per_image") == 1
    prediction[1, :, 18] = 2
    assert metrics.average_precision(prediction, target, [1.0], "dataset") < 1


def test_precision_recall_is_the_curve_whose_area_is_the_dataset_protocol():
    rng = np.random.default_rng(5)
    target = few_kinds(rng)
    prediction = target + 0.1 * rng.normal(size=target.shape)
    curve = metrics.precision_recall(prediction, target, 0.5)
    assert (np.diff(curve.score) <= 0).all()
    assert (np.diff(curve.recall) >= 0).all()
    right = np.diff(curve.recall, prepend=0) > 0
    expected = area(right, int(target[..., 18].sum()))
    (ap,) = metrics.average_precision(prediction, target, [0.5], "dataset")
    np.testing.assert_allclose(ap, expected)


def test_attribute_errors_name_what_is_wrong():
    rng = np.random.default_rng(2)
    target = clevr_objects(rng, images=4, low=4)
    prediction = target[:, ::-1].copy()  # another order must not matter
    zero = metrics.attribute_errors(prediction, target)
    assert set(zero) == {"position", "material", "color", "shape", "size", "presence", "count"}
    assert all((error == 0).all() for error in zero.values())

    real = target[0, :, 18].sum()
    prediction[0, -1, 0] += 0.1  # 0.3 units
    prediction[0, -1, 5:13] = np.roll(prediction[0, -1, 5:13], 1)
    prediction[0, -2, 18] = 0.4
    errors = metrics.attribute_errors(prediction, target)
    expected = {"position": 0.3 / real, "color": 1 / real, "presence": 1 / real, "count": 1}
    for name, error in errors.items():
        np.testing.assert_allclose(error[0], expected.get(name, 0), atol=1e-6)
        assert (error[1:] == 0).all()


def test_means_by_number_of_objects():
    target = clevr_objects(np.random.default_rng(0), images=3)
    target[..., 18] = 0
    target[0, :2, 18] = target[1, :2, 18] = target[2, :5, 18] = 1
    means = metrics.mean_by_number_of_objects([1.0, 3.0, 7.0], target)
    assert means == {2: 2.0, 5: 7.0}
    with pytest.raises(ValueError, match="values: expected one row per image, 3, got 1"):
        metrics.mean_by_number_of_objects([1.0], target)


def test_fifteen_thousand_images_at_once():
    rng = np.random.default_rng(0)
    target = clevr_objects(rng, images=15_000).astype(np.float32)
    prediction = target + 0.1 * rng.normal(size=target.shape).astype(np.float32)
    for protocol in ("per_image", "dataset"):
        found = metrics.average_precision(prediction, target, THRESHOLDS, protocol)
        # A larger threshold accepts whatever a smaller one does.
        by_threshold = found[np.argsort(THRESHOLDS)]
        assert (np.diff(by_threshold) >= 0).all()
        assert 0 < by_threshold[0] < by_threshold[-1] <= 1


@pytest.mark.usefixtures("without_hook")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prediction": np.zeros((2, 10, 18))}, r"prediction: expected shape \[images, n, 19\]"),
        ({"target": np.zeros((10, 19))}, "target: expected shape"),
        ({"prediction": np.zeros((3, 10, 19))}, "as many images, got 3 and 2"),
        ({"prediction": np.full((2, 10, 19), np.nan)}, "prediction: expected finite .* image 0"),
        ({"target": np.zeros((2, 10, 19))}, "target: expected a real object"),
        ({"thresholds": [1.0, -1.0]}, "thresholds: expected a list of positive"),
        ({"thresholds": [np.nan]}, "thresholds: expected a list of positive"),
        ({"thresholds": 1.0}, "thresholds: expected a list of positive"),
        ({"protocol": "coco"}, "protocol: expected one of 'per_image', 'dataset', got 'coco'"),
    ],
)
def test_bad_arguments_are_named(change, message):
    target = clevr_objects(np.random.default_rng(0), images=2)
    arguments = {"prediction": target, "target": target, "thresholds": [1.0], **change}
    with pytest.raises(ValueError, match=message):
        metrics.average_precision(**arguments)


@pytest.mark.usefixtures("without_hook")
def test_too_few_predictions_cannot_be_paired():
    target = clevr_objects(np.random.default_rng(0), images=2)
    with pytest.raises(ValueError, match="at least as many elements as target, 10, got 4"):
        metrics.attribute_errors(target[:, :4], target)
