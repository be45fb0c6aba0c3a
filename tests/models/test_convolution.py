"""The convolution and the pooling of a CPU against those of lax."""

import chex
import flax.linen as nn
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from msdspn_jax.models.convolution import conv_general_dilated, max_pool

NUMBERS = ("NHWC", "HWIO", "NHWC")

# Every kind of layer that the networks have, with small sides and few channels:
# side, kernel, stride, padding, channels, features.
LAYERS = {
    "stem": (16, 7, 2, 3, 3, 8),
    "3x3": (8, 3, 1, 1, 8, 8),
    "3x3 of many images": (4, 3, 1, 1, 4, 4),
    "3x3, stride 2": (8, 3, 2, 1, 4, 8),
    "1x1": (8, 1, 1, 0, 4, 8),
    "1x1, stride 2": (8, 1, 2, 0, 4, 8),
    "to 2x2": (4, 3, 2, 1, 4, 8),
    "on 2x2": (2, 3, 1, 1, 8, 8),
    "on 1x1": (1, 3, 1, 1, 8, 8),
    "end": (4, 2, 2, 0, 4, 8),
    "end of 64 pixels": (2, 2, 2, 0, 4, 8),
    "slot attention": (8, 5, 1, 2, 4, 4),
    "slot attention, stride 2": (8, 5, 2, 2, 4, 4),
}


def operands(side, kernel, channels, features, num=6, dtype=jnp.float32, seed=0):
    random = np.random.default_rng(seed)
    x = jnp.asarray(random.normal(size=(num, side, side, channels)), dtype)
    return x, jnp.asarray(random.normal(size=(kernel, kernel, channels, features)), dtype)


def results(convolution, x, kernel, *, stride, padding):
    """Value, and gradients of a sum of sines, so that the cotangent is no constant."""

    def scalar(x, kernel):
        pads = [padding, padding] if isinstance(padding, tuple) else [(padding, padding)] * 2
        y = convolution(x, kernel, (stride, stride), pads, dimension_numbers=NUMBERS)
        return jnp.sum(jnp.sin(y.astype(jnp.promote_types(y.dtype, jnp.float32)))), y

    (_, y), gradients = jax.value_and_grad(scalar, (0, 1), has_aux=True)(x, kernel)
    return y, *gradients


def assert_close(ours, theirs, tolerance=1e-4):
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        scale = float(jnp.abs(b).max()) + 1
        chex.assert_trees_all_close(
            np.asarray(a, np.float64), np.asarray(b, np.float64), atol=tolerance * scale, rtol=0
        )


def both(x, kernel, transform=lambda f: f, **how):
    return [
        transform(lambda x, k, c=c: results(c, x, k, **how))(x, kernel)
        for c in (conv_general_dilated, lax.conv_general_dilated)
    ]


@pytest.mark.parametrize("name", LAYERS)
def test_equals_lax_in_value_and_gradients(name):
    side, k, stride, padding, channels, features = LAYERS[name]
    # Enough images for a loop over chunks and a rest.
    num = 2 * 1024 // max(1, (side // stride) ** 2) + 1 if "many" in name else 6
    x, kernel = operands(side, k, channels, features, num)
    assert_close(*both(x, kernel, jax.jit, stride=stride, padding=padding))


@pytest.mark.slow
@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(st.data())
def test_equals_lax_for_random_shapes(data):
    draw = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    k, stride, low, high = draw(1, 5), draw(1, 3), draw(0, 3), draw(0, 3)
    side = draw(max(1, k - low - high), 9)
    x, kernel = operands(side, k, draw(1, 4), draw(1, 4), draw(1, 4), seed=draw(0, 99))
    assert_close(*both(x, kernel, stride=stride, padding=(low, high)))


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(jnp.float64, 1e-12), (jnp.bfloat16, 2e-2), (jnp.float16, 2e-3)]
)
@pytest.mark.parametrize("name", ["stem", "3x3", "on 2x2"])
def test_dtypes(dtype, tolerance, name):
    side, k, stride, padding, channels, features = LAYERS[name]
    with jax.enable_x64(dtype == jnp.float64):
        x, kernel = operands(side, k, channels, features, dtype=dtype)
        assert_close(*both(x, kernel, stride=stride, padding=padding), tolerance)


@pytest.mark.parametrize("name", ["3x3", "to 2x2"])
def test_vmap_over_images_and_kernels(name):
    side, k, stride, padding, channels, features = LAYERS[name]
    sets = [operands(side, k, channels, features, 2, seed=seed) for seed in range(3)]
    x, kernel = (jnp.stack(parts) for parts in zip(*sets, strict=True))
    assert_close(*both(x, kernel, jax.vmap, stride=stride, padding=padding))


def test_inside_a_scan():
    x, kernel = operands(4, 3, 4, 4)

    def descend(convolution):
        def step(kernel, _):
            y, _, gradient = results(convolution, x, kernel, stride=1, padding=1)
            return kernel - 0.01 * gradient, jnp.sum(y)

        return jax.jit(lambda kernel: lax.scan(step, kernel, length=3))(kernel)

    assert_close(descend(conv_general_dilated), descend(lax.conv_general_dilated), 1e-3)


def test_under_shard_map_kernels_get_the_sum_over_devices():
    mesh = Mesh(np.array(jax.devices()[:1]), ("batch",))
    x, kernel = operands(4, 3, 4, 4)

    def gradient(convolution):
        def of_shard(x, kernel):
            def scalar(kernel):
                y = convolution(x, kernel, (1, 1), [(1, 1)] * 2, dimension_numbers=NUMBERS)
                return lax.psum(jnp.sum(jnp.sin(y)), "batch")

            return jax.grad(scalar)(kernel)

        sharded = jax.shard_map(of_shard, mesh=mesh, in_specs=(P("batch"), P()), out_specs=P())
        return jax.jit(sharded)(x, kernel)

    ours, theirs = (gradient(c) for c in (conv_general_dilated, lax.conv_general_dilated))
    assert_close([ours], [theirs])


def test_second_order_equals_lax():
    x, kernel = operands(4, 3, 2, 2, 2)

    def of_gradient(convolution):
        def norm(kernel):
            return jnp.sum(results(convolution, x, kernel, stride=1, padding=1)[1] ** 2)

        return jax.grad(norm)(kernel)

    assert_close([of_gradient(conv_general_dilated)], [of_gradient(lax.conv_general_dilated)])


@pytest.mark.parametrize(
    "options",
    [
        {"rhs_dilation": (2, 2)},
        {"lhs_dilation": (2, 2)},
        {"feature_group_count": 2},
        {"preferred_element_type": jnp.float32},
        {"dimension_numbers": ("NCHW", "OIHW", "NCHW")},
    ],
)
def test_what_it_does_not_know_goes_to_lax(options):
    groups = options.get("feature_group_count", 1)
    x, kernel = operands(8, 3, 8, 8)
    kernel = kernel[:, :, : 8 // groups]
    if "dimension_numbers" in options:
        kernel = kernel.transpose(3, 2, 0, 1)
    options = {"dimension_numbers": NUMBERS} | options
    ours, theirs = (
        c(x, kernel, (1, 1), [(1, 1)] * 2, **options)
        for c in (conv_general_dilated, lax.conv_general_dilated)
    )
    chex.assert_trees_all_equal(ours, theirs)


def test_other_platforms_get_the_convolutions_of_lax():
    x, kernel = operands(2, 3, 4, 4)

    def program(convolution, platform):
        gradient = jax.grad(
            lambda x, k: jnp.sum(convolution(x, k, (1, 1), "SAME", dimension_numbers=NUMBERS) ** 2),
            (0, 1),
        )
        return jax.export.export(jax.jit(gradient), platforms=[platform])(x, kernel).mlir_module()

    for platform in ("cuda", "tpu"):
        ours = program(conv_general_dilated, platform)
        assert ours.count("stablehlo.convolution") == 3
        assert "dot_general" not in ours
    assert program(conv_general_dilated, "cpu").count("stablehlo.convolution") == 0


@pytest.mark.parametrize("kind", ["random", "with ties"])
def test_max_pool_equals_that_of_flax(kind):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 6, 3)), jnp.float32)
    x = jnp.round(nn.relu(x)) if kind == "with ties" else x

    def of_flax(x):
        return nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))

    def gradient(pool):
        return jax.grad(lambda x: jnp.sum(jnp.sin(pool(x)) * jnp.arange(3)))(x)

    chex.assert_trees_all_equal(max_pool(x), of_flax(x))
    chex.assert_trees_all_close(gradient(max_pool), gradient(of_flax), atol=1e-6)


@pytest.mark.usefixtures("without_hook")
def test_max_pool_refuses_odd_sides():
    with pytest.raises(ValueError, match=r"x: expected .* even, got \(1, 3, 4, 1\)"):
        max_pool(jnp.ones((1, 3, 4, 1)))
