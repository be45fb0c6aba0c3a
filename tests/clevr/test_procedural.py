import chex
import jax
import numpy as np
import pytest

from msdspn_jax.clevr.objects import decode
from msdspn_jax.clevr.procedural import ProceduralScenes, procedural_batch, procedural_examples


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


def test_a_key_has_the_same_scene_where_jax_has_64_bits():
    keys = jax.random.split(jax.random.key(3), 1)
    narrow = procedural_examples(keys, 16, quality="fast")
    with jax.enable_x64(True):
        wide = procedural_examples(keys, 16, quality="fast")
    chex.assert_trees_all_equal(narrow, wide)


def test_scenes_that_cannot_be_drawn_are_named_when_described():
    for options, words in (
        ({"num_objects": (3, 11)}, "num_objects: expected"),
        ({"quality": "x"}, "quality: expected one of"),
        ({"size": 0}, "size: expected an integer >= 1"),
    ):
        with pytest.raises(ValueError, match=words):
            ProceduralScenes("train", 2, **options)
