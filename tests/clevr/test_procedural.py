import chex
import jax
import numpy as np
import pytest

from msdspn_jax.clevr.objects import decode
from msdspn_jax.clevr.procedural import procedural_batch, procedural_examples


@pytest.mark.slow
def test_procedural_batch_is_a_function_of_its_keys():
    images, objects = procedural_batch(jax.random.key(1), 2, 16, quality="fast")
    chex.assert_shape(images, (2, 16, 16, 3))
    chex.assert_shape(objects, (2, 10, 19))
    assert images.dtype == np.uint8
    keys = jax.random.split(jax.random.key(1), 2)
    again = procedural_examples(keys[::-1], 16, quality="fast")
    chex.assert_trees_all_equal((images[::-1], objects[::-1]), again)
    assert len(decode(objects[0])) >= 3
    assert np.asarray(images).std() > 5
