import os
from pathlib import Path

import numpy as np
import pytest

from msdspn_jax import metrics

GOLDEN = Path(os.environ.get("MSDSPN_GOLDEN", Path(__file__).parent / "golden"))


@pytest.fixture(scope="module")
def golden():
    return np.load(GOLDEN / "losses_and_metrics.npz")


def test_average_precision_per_image(golden):
    ours = metrics.average_precision_per_image(
        golden["ap/prediction"], golden["ap/target"], golden["ap/thresholds"]
    )
    np.testing.assert_allclose(ours, golden["ap/per_image"], atol=1e-7)  # stored in float32


def test_average_precision_dataset(golden):
    ours = metrics.average_precision(
        golden["ap/prediction"], golden["ap/target"], golden["ap/thresholds"], "dataset"
    )
    np.testing.assert_allclose(ours, golden["ap/dataset"], atol=1e-12)


def test_thresholds_are_the_golden_ones(golden):
    np.testing.assert_array_equal(metrics.AP_THRESHOLDS, golden["ap/thresholds"])
