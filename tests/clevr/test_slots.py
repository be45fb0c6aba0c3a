import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from msdspn_jax.clevr.objects import ClevrObject, encode
from msdspn_jax.clevr.slots import from_clevr_layout, slot_loss, to_clevr_layout


def test_layouts_round_trip():
    objects = encode([ClevrObject("cube", "large", "metal", "red", (-3.0, 0.0, 0.75))])
    ours = from_clevr_layout(jnp.asarray(objects))
    np.testing.assert_allclose(ours[0, :3], [0, 0.5, 0.625])
    np.testing.assert_array_equal(ours[0, 3:], objects[0, 3:])
    assert not ours[1:].any()
    np.testing.assert_allclose(to_clevr_layout(ours)[0], objects[0], atol=1e-7)


def test_loss_is_the_sum_of_the_best_matching():
    rng = np.random.default_rng(0)
    prediction, target = rng.uniform(-2, 2, (2, 3, 4, 19)).astype(np.float32)
    for weight in (1.0, 5.0):
        difference = np.abs(prediction[:, :, None] - target[:, None])
        huber = np.where(difference < 1, difference**2 / 2, difference - 0.5)
        huber[..., :3] *= weight
        cost = huber.mean(-1)
        expected = [c[scipy.optimize.linear_sum_assignment(c)].sum() for c in cost]
        ours = slot_loss(jnp.asarray(prediction), jnp.asarray(target), position_weight=weight)
        np.testing.assert_allclose(ours, expected, rtol=1e-5)


@pytest.mark.usefixtures("without_hook")
def test_bad_arguments_are_named():
    sets = jnp.zeros((3, 4, 19))
    with pytest.raises(ValueError, match="position_weight: expected a number > 0"):
        slot_loss(sets, sets, position_weight=0.0)
    with pytest.raises(ValueError, match="the same shape"):
        slot_loss(sets, sets[:, :2])
