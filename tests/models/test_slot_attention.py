import functools

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msdspn_jax.clevr.slots import slot_loss
from msdspn_jax.models.slot_attention import (
    ConvFeatures,
    SlotAttention,
    SlotAttentionPredictor,
    SlotMLPPredictor,
)


def random_variables(init, *args):
    """Variables drawn by NumPy, none of them 0 or 1: initialising would compile for longer."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        name = path[-1].key
        if name == "kernel":
            return rng.normal(size=leaf.shape) / np.sqrt(np.prod(leaf.shape[:-1]))
        if name in ("scale", "var"):
            return rng.uniform(0.5, 1.5, leaf.shape)
        return 0.1 * rng.normal(size=leaf.shape)

    shapes = jax.eval_shape(init, jax.random.key(0), *args)
    return jax.tree_util.tree_map_with_path(lambda p, x: jnp.asarray(draw(p, x), x.dtype), shapes)


def keys(number, seed=0):
    return jax.random.split(jax.random.key(seed), number)


@pytest.fixture(scope="module")
def attention():
    model = SlotAttention(iterations=3, mlp_dim=16)
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(2, 12, 6)).astype(np.float32)
    slots = rng.normal(size=(2, 5, 8)).astype(np.float32)
    return jax.jit(model.apply), random_variables(model.init, inputs, slots), inputs, slots


@hypothesis.given(order=st.permutations(range(5)), places=st.permutations(range(12)))
@hypothesis.settings(deadline=None, max_examples=10)
def test_slots_may_be_permuted_and_inputs_too(attention, order, places):
    apply, variables, inputs, slots = attention
    expected = apply(variables, inputs, slots)[:, np.array(order)]
    ours = apply(variables, inputs[:, np.array(places)], slots[:, np.array(order)])
    chex.assert_trees_all_close(ours, expected, atol=2e-5)


def test_equal_slots_stay_equal(attention):
    apply, variables, inputs, slots = attention
    output = apply(variables, inputs, slots[:, [0, 0, 2, 3, 4]])
    chex.assert_trees_all_close(output[:, 0], output[:, 1], atol=1e-6)
    assert np.abs(output[:, 0] - output[:, 2]).max() > 1e-3


def test_one_round_is_algorithm_1(attention):
    _, variables, inputs, slots = attention
    ours = jax.jit(SlotAttention(iterations=1, mlp_dim=16).apply)(variables, inputs, slots)
    p = jax.tree.map(np.asarray, variables["params"])

    def norm(x, name):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        return x * p[name]["scale"] + p[name]["bias"]

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    x, s = norm(np.asarray(inputs), "norm_inputs"), np.asarray(slots)
    k, v = x @ p["key"]["kernel"], x @ p["value"]["kernel"]
    q = norm(s, "norm_slots") @ p["query"]["kernel"]
    logits = k @ q.transpose(0, 2, 1) * 8**-0.5
    attention = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)  # over the slots
    attention = attention + 1e-8
    update = (attention / attention.sum(1, keepdims=True)).transpose(0, 2, 1) @ v
    g = p["gru"]
    reset = sigmoid(update @ g["ir"]["kernel"] + g["ir"]["bias"] + s @ g["hr"]["kernel"])
    gate = sigmoid(update @ g["iz"]["kernel"] + g["iz"]["bias"] + s @ g["hz"]["kernel"])
    candidate = np.tanh(
        update @ g["in"]["kernel"]
        + g["in"]["bias"]
        + reset * (s @ g["hn"]["kernel"] + g["hn"]["bias"])
    )
    s = (1 - gate) * candidate + gate * s
    hidden = np.maximum(norm(s, "norm_mlp") @ p["mlp1"]["kernel"] + p["mlp1"]["bias"], 0)
    expected = s + hidden @ p["mlp2"]["kernel"] + p["mlp2"]["bias"]
    np.testing.assert_allclose(ours, expected, atol=2e-5)


def test_published_shapes():
    images = jax.ShapeDtypeStruct((2, 128, 128, 3), jnp.uint8)
    features = jax.eval_shape(
        lambda x: ConvFeatures().init_with_output(jax.random.key(0), x)[0], images
    )
    assert features.shape == (2, 32 * 32, 64)
    for model in (SlotAttentionPredictor(), SlotMLPPredictor()):
        output, variables = jax.eval_shape(
            lambda x, model=model: model.init_with_output(jax.random.key(0), x), images
        )
        assert output.shape == (2, 10, 19)
        assert variables["params"]["features"]["conv4"]["kernel"].shape == (5, 5, 64, 64)
    kernel = variables["params"]["slots1"]["kernel"]
    assert kernel.shape == (32 * 32 * 64, 512)


def test_predictions_are_a_function_of_image_and_key():
    model = SlotAttentionPredictor(set_size=4, slot_dim=8, iterations=1)
    images = np.random.default_rng(0).uniform(size=(3, 16, 16, 3)).astype(np.float32)
    variables = random_variables(model.init, images)
    apply = jax.jit(model.apply)
    output = apply(variables, images, keys(3))
    assert output.shape == (3, 4, 19)
    assert ((output > 0) & (output < 1)).all()
    chex.assert_trees_all_close(apply(variables, images, keys(3)), output)
    others = apply(variables, images[::-1], keys(3)[::-1])
    chex.assert_trees_all_close(others, output[::-1], atol=1e-6)
    assert np.abs(apply(variables, images, keys(3, seed=1)) - output).max() > 1e-5
    noise = jax.vmap(lambda key: jax.random.normal(key, (4, 8)))(keys(3))
    with_noise = jax.jit(lambda noise: model.apply(variables, images, noise=noise))
    chex.assert_trees_all_close(with_noise(noise), output, atol=1e-6)
    chex.assert_trees_all_close(with_noise(noise[:, ::-1]), output[:, ::-1], atol=1e-5)


@pytest.mark.usefixtures("without_hook")
def test_every_image_needs_a_key():
    model = SlotAttentionPredictor(set_size=4, slot_dim=8, iterations=1)
    images = np.zeros((3, 16, 16, 3), np.float32)
    variables = random_variables(model.init, images)
    with pytest.raises(ValueError, match="keys: expected one key for every image"):
        model.apply(variables, images)
    with pytest.raises(ValueError, match="keys: expected 3 keys"):
        model.apply(variables, images, keys(2))


@pytest.mark.parametrize("kind", [SlotAttentionPredictor, SlotMLPPredictor])
def test_every_parameter_gets_a_gradient(kind):
    rng = np.random.default_rng(0)
    images = rng.uniform(size=(2, 16, 16, 3)).astype(np.float32)
    options, inputs = {}, {}
    if kind is SlotAttentionPredictor:
        options = {"iterations": 1}
        inputs = {"noise": rng.normal(size=(2, 3, 8)).astype(np.float32)}
    model = kind(set_size=3, slot_dim=8, **options)
    variables = random_variables(model.init, images)
    predict = functools.partial(model.apply, **inputs)
    target = np.full((2, 3, 19), 0.3, np.float32)
    gradient = jax.jit(jax.grad(lambda v: slot_loss(predict(v, images), target).sum()))(variables)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert np.abs(leaf).max() > 0, path
