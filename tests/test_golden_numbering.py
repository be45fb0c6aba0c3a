"""Numbering loss and accuracies agree with the authors' implementation, in float64."""

import chex
import golden_files
import jax
import jax.numpy as jnp
import pytest

from msdspn_jax.losses import numbering_assignment, numbering_loss
from msdspn_jax.metrics import numbering_accuracy


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("cost", ["l2", "ce"])
def test_numbering(cost, jit):
    arrays = golden_files.load("losses_and_metrics.npz")

    def score(prediction, target, classes):
        assignment = numbering_assignment(prediction, target, classes, cost=cost)
        accuracy = numbering_accuracy(prediction, target, assignment)
        given = numbering_loss(prediction, target, classes, cost=cost, assignment=assignment)
        return numbering_loss(prediction, target, classes, cost=cost), given, accuracy

    with jax.enable_x64(True):
        inputs = [
            jnp.asarray(arrays[f"numbering/{name}"])
            for name in ("prediction", "target", "input_classes")
        ]
        loss, given, accuracy = (jax.jit(score) if jit else score)(*inputs)
    expected = {name: arrays[f"numbering/{name}_{cost}"] for name in ("loss", "micro_accuracy")}
    chex.assert_trees_all_close(loss, expected["loss"], atol=1e-10, rtol=0)
    chex.assert_trees_all_close(given, expected["loss"], atol=1e-10, rtol=0)
    # The accuracies are stored in single precision.
    chex.assert_trees_all_close(accuracy.micro, expected["micro_accuracy"], atol=1e-7, rtol=0)
    chex.assert_trees_all_close(accuracy.macro, arrays[f"numbering/macro_accuracy_{cost}"])
