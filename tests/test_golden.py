"""Agreement with the authors' implementation, in float64, on every golden file.

The folder is named by MSDSPN_GOLDEN (default: tests/golden). A file or a group of arrays that is
there and not checked here is a failure.
"""

import chex
import golden_files
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import msdspn_jax as ms
from msdspn_jax import losses
from msdspn_jax.clevr import metrics

TOLERANCE = 1e-9
MODEL_FILES = sorted(path.name for path in golden_files.FOLDER.glob("*dspn_*.npz"))
SCORE_FILE = "losses_and_metrics.npz"
SCORE_ARRAYS = {"sets", "numbering", "ap", "simplex"}
ELSEWHERE = {"image_model.npz"}  # See models/test_authors.py.


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("name", MODEL_FILES)
def test_model(name):
    arrays = golden_files.load(name)
    config = golden_files.config(arrays)
    model, relational = golden_files.build(config)
    params = golden_files.variables(golden_files.nested(arrays, "param/"), relational)
    expected_grads = golden_files.variables(golden_files.nested(arrays, "grad/"), relational)
    options = (
        {"initial_sets": jnp.asarray(arrays["initial_set"])} if "initial_set" in arrays else {}
    )
    inputs = jnp.asarray(arrays["input_set"])

    def objective(params):
        minimum = model.apply(params, inputs, return_trajectory=True, **options)
        return jnp.sum(minimum.sets * arrays["cotangent"]), minimum

    grads, minimum = jax.jit(jax.grad(objective, has_aux=True))(params)
    latent = model.apply(params, inputs, method=lambda module, x: module.encoder(x))
    chex.assert_trees_all_close(latent, arrays["latent"], atol=TOLERANCE, rtol=0)
    chex.assert_trees_all_close(minimum.sets, arrays["output_set"], atol=TOLERANCE, rtol=0)
    chex.assert_trees_all_close(grads, expected_grads, atol=TOLERANCE, rtol=0)
    if "last_negative_gradient" in arrays:
        last = np.sqrt(np.sum(arrays["last_negative_gradient"] ** 2, axis=(1, 2)))
        norms = minimum.trajectory.gradient_norm[-2]
        chex.assert_trees_all_close(norms, last, atol=TOLERANCE, rtol=0)


def test_set_losses():
    arrays = golden_files.load(SCORE_FILE)
    prediction, target = arrays["sets/prediction"], arrays["sets/target"]
    for method in ("device", "optax", "host"):
        hungarian = ms.hungarian_loss(prediction, target, method=method)
        expected = arrays["sets/hungarian_smooth_l1"]
        chex.assert_trees_all_close(hungarian, expected, atol=TOLERANCE, rtol=0)
    chamfer = ms.chamfer_loss(prediction, target)
    chex.assert_trees_all_close(chamfer, arrays["sets/chamfer"], atol=TOLERANCE, rtol=0)


def test_simplex():
    arrays = golden_files.load(SCORE_FILE)
    output, vjp = jax.vjp(ms.simplex, jnp.asarray(arrays["simplex/input"]))
    chex.assert_trees_all_close(output, arrays["simplex/output"], atol=TOLERANCE, rtol=0)
    (pulled,) = vjp(jnp.asarray(arrays["simplex/cotangent"]))
    chex.assert_trees_all_close(pulled, arrays["simplex/vjp"], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("cost", ["l2", "ce"])
def test_numbering(cost, jit):
    arrays = golden_files.load(SCORE_FILE)

    def score(prediction, target, classes):
        assignment = losses.numbering_assignment(prediction, target, classes, cost=cost)
        accuracy = ms.numbering_accuracy(prediction, target, assignment)
        given = ms.numbering_loss(prediction, target, classes, cost=cost, assignment=assignment)
        return ms.numbering_loss(prediction, target, classes, cost=cost), given, accuracy

    names = ("prediction", "target", "input_classes")
    inputs = [jnp.asarray(arrays[f"numbering/{name}"]) for name in names]
    loss, given, accuracy = (jax.jit(score) if jit else score)(*inputs)
    expected = arrays[f"numbering/loss_{cost}"]
    chex.assert_trees_all_close(loss, expected, atol=TOLERANCE, rtol=0)
    chex.assert_trees_all_close(given, expected, atol=TOLERANCE, rtol=0)
    # The accuracies are stored in single precision.
    micro, macro = (arrays[f"numbering/{name}_accuracy_{cost}"] for name in ("micro", "macro"))
    chex.assert_trees_all_close(accuracy.micro, micro, atol=1e-7, rtol=0)
    chex.assert_trees_all_close(accuracy.macro, macro, atol=0, rtol=0)


def test_average_precision():
    arrays = golden_files.load(SCORE_FILE)
    inputs = arrays["ap/prediction"], arrays["ap/target"], arrays["ap/thresholds"]
    np.testing.assert_array_equal(metrics.AP_THRESHOLDS, arrays["ap/thresholds"])
    per_image = metrics.average_precision_per_image(*inputs)
    np.testing.assert_allclose(per_image, arrays["ap/per_image"], atol=1e-7)  # stored in float32
    dataset = ms.average_precision(*inputs, "dataset")
    np.testing.assert_allclose(dataset, arrays["ap/dataset"], atol=TOLERANCE)


def test_every_file_is_checked():
    found = {path.name for path in golden_files.FOLDER.glob("*.npz")}
    assert MODEL_FILES, f"no model files in {golden_files.FOLDER}"
    assert found - ELSEWHERE == {*MODEL_FILES, SCORE_FILE}
    prefixes = {key.split("/")[0] for key in golden_files.load(SCORE_FILE)}
    assert prefixes == SCORE_ARRAYS
