import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msdspn_jax.models.resnet import STAGES, ResNet, unit_range

TINY = {"stage_sizes": (1, 1, 1, 1), "width": 4, "latent_dim": 16}


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    # What torchvision's networks have without their classifier.
    ("name", "backbone"),
    [("resnet18", 11_176_512), ("resnet34", 21_284_672)],
)
@pytest.mark.slow
@pytest.mark.parametrize("size", [64, 128, 256])
def test_published_networks_have_the_published_shape(name, backbone, size):
    model = ResNet(STAGES[name])
    images = jax.ShapeDtypeStruct((2, size, size, 3), jnp.uint8)
    init = functools.partial(model.init, train=True)
    latent, variables = jax.eval_shape(
        lambda key, x: (model.apply(v := init(key, x), x, train=False), v),
        jax.random.key(0),
        images,
    )
    assert latent.shape == (2, 512)
    params = dict(variables["params"])
    positions = (size // 64) ** 2
    end, end_norm = params.pop("end"), params.pop("end_norm")
    assert count(end_norm) == 2 * 512
    assert end["kernel"].shape == (2, 2, 512, 512 // positions)
    assert count(params) == backbone
    # Mean and variance of every normalisation; stem, two a block, three shortcuts, end.
    assert len(jax.tree.leaves(variables["batch_stats"])) == 2 * (2 + 2 * sum(STAGES[name]) + 3)


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


@pytest.fixture(scope="module")
def tiny():
    """Evaluation, training, images, variables."""
    model = ResNet(**TINY)
    images = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), np.uint8)
    variables = random_variables(functools.partial(model.init, train=True), images)
    evaluate = jax.jit(functools.partial(model.apply, train=False))
    train = jax.jit(functools.partial(model.apply, train=True, mutable=["batch_stats"]))
    return evaluate, train, images, variables


def reference(variables, images, first_stride=1):
    """The published network, blocks and paddings spelled out, with the running statistics."""
    params, stats = variables["params"], variables["batch_stats"]

    def conv(x, kernel, stride, padding):
        numbers = ("NHWC", "HWIO", "NHWC")
        pads = [(padding, padding)] * 2
        return jax.lax.conv_general_dilated(
            x, kernel, (stride, stride), pads, dimension_numbers=numbers
        )

    def norm(x, params, stats):
        scale = params["scale"] / jnp.sqrt(stats["var"] + 1e-5)
        return (x - stats["mean"]) * scale + params["bias"]

    x = conv(images / 255.0, params["stem"]["kernel"], 2, 3)
    x = jnp.maximum(norm(x, params["stem_norm"], stats["stem_norm"]), 0)
    windows = [(1, 3, 3, 1), (1, 2, 2, 1), [(0, 0), (1, 1), (1, 1), (0, 0)]]
    x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, *windows)
    for stage in range(4):
        p, s = (tree[f"stage{stage + 1}_block1"] for tree in (params, stats))
        stride = 2 if stage else first_stride
        y = conv(x, p["conv1"]["kernel"], stride, 1)
        y = jnp.maximum(norm(y, p["norm1"], s["norm1"]), 0)
        y = norm(conv(y, p["conv2"]["kernel"], 1, 1), p["norm2"], s["norm2"])
        if "shortcut" in p:
            x = conv(x, p["shortcut"]["kernel"], stride, 0)
            x = norm(x, p["shortcut_norm"], s["shortcut_norm"])
        x = jnp.maximum(x + y, 0)
    x = norm(x, params["end_norm"], stats["end_norm"])
    x = conv(x, params["end"]["kernel"], 2, 0) + params["end"]["bias"]
    return x.reshape(len(x), -1)


def test_it_is_the_published_network(tiny):
    evaluate, _, images, variables = tiny
    expected = jax.jit(reference)(variables, images)
    chex.assert_trees_all_close(evaluate(variables, images), expected, atol=1e-4)
    # Floats in [0, 1] are the same images.
    chex.assert_trees_all_close(evaluate(variables, images / np.float32(255)), expected, atol=1e-4)


@pytest.mark.parametrize("low", [-1.0, np.nan])
def test_images_of_another_range_are_refused(low):
    images = np.full((1, 64, 64, 3), 0.5, np.float32)
    images[0, 0, 0, 0] = low
    with pytest.raises(ValueError, match=r"images: expected uint8 or floats in \[0, 1\]"):
        unit_range(images)


def test_without_the_norm_before_the_end_it_is_as_with_one_that_does_nothing(tiny):
    evaluate, _, images, variables = tiny
    idle = {"scale": jnp.ones(32), "bias": jnp.zeros(32)}
    unit = {"mean": jnp.zeros(32), "var": jnp.full(32, 1 - 1e-5)}
    params, stats = variables["params"], variables["batch_stats"]
    with_idle = {
        "params": params | {"end_norm": idle},
        "batch_stats": stats | {"end_norm": unit},
    }
    without = {
        "params": {k: v for k, v in params.items() if k != "end_norm"},
        "batch_stats": {k: v for k, v in stats.items() if k != "end_norm"},
    }
    found = jax.jit(ResNet(**TINY, end_norm=False, train=False).apply)(without, images)
    chex.assert_trees_all_close(found, evaluate(with_idle, images), atol=1e-4)


def test_a_first_stage_of_stride_2_leaves_the_grid_of_half_the_side():
    model = ResNet(**TINY, first_stride=2, train=False)
    images = np.random.default_rng(1).integers(0, 256, (2, 128, 128, 3), np.uint8)
    variables = random_variables(model.init, images)
    init = functools.partial(ResNet(**TINY).init, train=False)
    published = jax.eval_shape(init, jax.random.key(0), images[:, ::2, ::2])
    more = set(variables["params"]["stage1_block1"]) - set(published["params"]["stage1_block1"])
    assert more == {"shortcut", "shortcut_norm"}
    end = [tree["params"]["end"]["kernel"].shape for tree in (variables, published)]
    assert end[0] == end[1] == (2, 2, 32, 16)
    expected = jax.jit(functools.partial(reference, first_stride=2))(variables, images)
    chex.assert_trees_all_close(jax.jit(model.apply)(variables, images), expected, atol=1e-4)


def test_statistics_of_a_spread_batch_are_those_of_the_whole(tiny):
    _, train, images, variables = tiny
    spread = ResNet(**TINY, axis_name="data", train=True)
    mapped = jax.vmap(
        functools.partial(spread.apply, mutable=["batch_stats"]),
        in_axes=(None, 0),
        axis_name="data",
    )
    whole, whole_state = train(variables, images)
    parts, parts_state = jax.jit(mapped)(variables, images.reshape(2, 2, 64, 64, 3))
    chex.assert_trees_all_close(parts.reshape(4, 16), whole, atol=2e-4)
    for replica in range(2):
        state = jax.tree.map(lambda x, i=replica: x[i], parts_state)
        chex.assert_trees_all_close(state, whole_state, atol=1e-5)
    # The images differ enough that two of them alone have other statistics.
    alone, _ = train(variables, np.concatenate([images[:2]] * 2))
    assert np.abs(alone[:2] - whole[:2]).max() > 0.01


def test_running_statistics_follow_the_batch(tiny):
    evaluate, train, images, variables = tiny
    latent, state = train(variables, images)
    stem = jax.lax.conv_general_dilated(
        images / np.float32(255),
        variables["params"]["stem"]["kernel"],
        (2, 2),
        ((3, 3), (3, 3)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    before = variables["batch_stats"]["stem_norm"]["mean"]
    np.testing.assert_allclose(
        state["batch_stats"]["stem_norm"]["mean"],
        0.9 * before + 0.1 * stem.mean((0, 1, 2)),
        atol=1e-5,
    )
    assert np.abs(evaluate(variables, images) - latent).max() > 0.05
    for _ in range(100):
        _, state = train({**variables, **state}, images)
    np.testing.assert_allclose(evaluate({**variables, **state}, images), latent, atol=1e-2)


def test_bfloat16_keeps_parameters_and_statistics_in_float32(tiny):
    _, train, images, variables = tiny
    half = ResNet(**TINY, dtype=jnp.bfloat16, train=True)
    latent, state = jax.jit(functools.partial(half.apply, mutable=["batch_stats"]))(
        variables, images
    )
    assert latent.dtype == jnp.float32
    fresh = jax.eval_shape(half.init, jax.random.key(0), images)
    assert {leaf.dtype for leaf in jax.tree.leaves((fresh, state))} == {np.dtype(np.float32)}
    exact, _ = train(variables, images)
    error = np.abs(latent - exact).max() / np.abs(exact).max()
    assert 1e-6 < error < 0.1


@pytest.mark.usefixtures("without_hook")
def test_bad_arguments_are_named():
    key = jax.random.key(0)
    for shape in [(1, 96, 96, 3), (1, 64, 128, 3), (1, 64, 64, 4), (64, 64, 3)]:
        with pytest.raises(ValueError, match="images: expected shape"):
            ResNet(**TINY, train=False).init(key, jnp.zeros(shape))
    halving = ResNet(**TINY, first_stride=2, train=False)
    with pytest.raises(ValueError, match="size a multiple of 128"):
        halving.init(key, jnp.zeros((1, 64, 64, 3)))
    with pytest.raises(ValueError, match="first_stride: expected one of 1, 2, got 3"):
        ResNet(**TINY, first_stride=3, train=False).init(key, jnp.zeros((1, 192, 192, 3)))
    with pytest.raises(ValueError, match="latent_dim: expected a multiple of the 16 positions"):
        jax.eval_shape(
            ResNet(**{**TINY, "latent_dim": 24}, train=False).init, key, jnp.zeros((1, 256, 256, 3))
        )
    with pytest.raises(TypeError, match="expected uint8 or floats"):
        ResNet(**TINY, train=False).init(key, jnp.zeros((1, 64, 64, 3), jnp.int32))


def test_images_that_jit_closes_over_are_looked_at():
    images = jnp.full((1, 8, 8, 3), 0.5)
    assert jax.jit(lambda: unit_range(images))().shape == images.shape
    far = 2 + images
    with pytest.raises(ValueError, match="images: expected uint8 or floats in"):
        jax.jit(lambda: unit_range(far))()
