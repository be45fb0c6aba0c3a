import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msdspn_jax.models.bilstm import BiLSTM
from msdspn_jax.models.deep_sets import DeepSets, DeepSetsLayer
from msdspn_jax.models.transformer import Transformer, sinusoidal_encoding

KEY = jax.random.key(0)
SETS = jax.random.normal(KEY, (2, 5, 3))


def test_deep_sets_layer_is_its_formula():
    layer = DeepSetsLayer(4)
    params = layer.init(KEY, SETS)["params"]
    a, b, bias = params["element"]["kernel"], params["mean"]["kernel"], params["element"]["bias"]
    expected = SETS @ a + SETS.mean(1, keepdims=True) @ b + bias
    chex.assert_trees_all_close(layer.apply({"params": params}, SETS), expected, atol=1e-6)
    assert "bias" not in params["mean"]


@pytest.mark.parametrize(
    ("module", "noise_width"),
    [
        (DeepSets(6, 8), 0),
        (BiLSTM(6, 4), 0),
        # One program but for the encoding.
        pytest.param(Transformer(6, "none", 8, num_heads=2), 0, marks=pytest.mark.slow),
        pytest.param(Transformer(6, "sinusoidal", 8, num_heads=2), 0, marks=pytest.mark.slow),
        (Transformer(6, "random", 8, num_heads=2), 4),
    ],
)
def test_shapes_dtypes_and_that_all_parameters_matter(module, noise_width):
    arguments = (SETS, jax.random.normal(KEY, (2, 5, noise_width)))[: 1 + bool(noise_width)]
    params = jax.jit(module.init)(KEY, *arguments)
    weight = jax.random.normal(KEY, (2, 5, 6))
    value, grads = jax.jit(
        jax.value_and_grad(lambda p: jnp.sum(module.apply(p, *arguments) * weight))
    )(params)
    assert np.isfinite(value)
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        # The keys' bias shifts all attention scores alike, which softmax does not see.
        if "'key']['bias']" not in jax.tree_util.keystr(path):
            assert np.abs(grad).max() > 1e-7, path
    assert jax.eval_shape(module.apply, params, *arguments).shape == (2, 5, 6)
    with jax.enable_x64(True):
        double = [np.asarray(x, np.float64) for x in arguments]
        assert jax.eval_shape(module.apply, params, *double).dtype == jnp.float64


def test_published_widths():
    module = Transformer(6, "random")
    params = jax.eval_shape(module.init, KEY, SETS, jnp.zeros((2, 5, 32)))["params"]
    assert params["decoder_embedding"]["kernel"].shape == (3, 32)
    assert params["encoder_embedding"]["kernel"].shape == (3, 64)
    assert params["decoder_1"]["cross_attention"]["query"]["kernel"].shape == (64, 8, 8)
    assert params["encoder_1"]["wide"]["kernel"].shape == (64, 128)
    assert "cross_attention" not in params["encoder_0"]
    assert "encoder_2" not in params
    lstm = jax.eval_shape(BiLSTM(6).init, KEY, SETS)["params"]
    widths = [x.shape for x in jax.tree.leaves(lstm)]
    assert (128, 64) in widths  # the second layer reads both directions of the first
    assert lstm["output"]["kernel"].shape == (128, 6)


def test_both_directions_are_read():
    module = BiLSTM(2, 4, num_layers=1)
    params = jax.jit(module.init)(KEY, SETS)
    jacobian = jax.jacobian(lambda x: module.apply(params, x[None])[0])(SETS[0])
    influence = np.abs(jacobian).max(axis=(1, 3))
    assert (influence > 1e-8).all()


def test_random_encoding_is_scaled_and_shifted():
    module = Transformer(6, "random", 8, num_heads=2)
    noise = jax.random.normal(KEY, (2, 5, 4))
    params = jax.jit(module.init)(KEY, SETS, noise)["params"]
    changed = params | {"noise_shift": jnp.array(0.5), "noise_log_scale": jnp.log(2.0)}
    given = module.apply({"params": changed}, SETS, noise)
    chex.assert_trees_all_close(
        given, module.apply({"params": params}, SETS, 0.5 + 2 * noise), atol=1e-5
    )


def test_sinusoidal_encoding():
    encoding = sinusoidal_encoding(7, 6)
    chex.assert_shape(encoding, (7, 6))
    chex.assert_trees_all_close(encoding[3, 0], jnp.sin(3.0), atol=1e-6)
    chex.assert_trees_all_close(encoding[3, 1], jnp.cos(3.0), atol=1e-6)
    chex.assert_trees_all_close(encoding[5, 4], jnp.sin(5 * 10_000 ** (-4 / 6)), atol=1e-6)
    assert sinusoidal_encoding(3, 5).shape == (3, 5)


@pytest.mark.usefixtures("without_hook")
@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        (Transformer(6, "learned", 8), (SETS,), "position_encoding"),
        (Transformer(6, "none", 12), (SETS,), "multiple of num_heads"),
        (Transformer(6, "random", 8), (SETS,), "noise: expected shape"),
        (Transformer(6, "random", 8), (SETS, jnp.zeros((2, 5, 3))), "noise: expected shape"),
    ],
)
def test_bad_input(module, arguments, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(module.init, KEY, *arguments)
