"""Products of numbers rounded to bfloat16: their values, derivatives and programs."""

from __future__ import annotations

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax
from jax.sharding import PartitionSpec as P

import msdspn_jax as ms

MATRIX = (((1,), (0,)), ((), ()))
FORMS = [
    ((3, 4), (4, 5), MATRIX),
    ((4, 3), (5, 4), (((0,), (1,)), ((), ()))),
    ((2, 3, 4), (4, 5), (((2,), (0,)), ((), ()))),
    ((2, 3, 4), (4, 2, 5), (((2,), (0,)), ((0,), (1,)))),
    ((2, 3, 4), (3, 4, 2), (((1, 2), (0, 1)), ((0,), (2,)))),
    ((3,), (4,), (((), ()), ((), ()))),
]


def rounded(x):
    return x.astype(jnp.bfloat16).astype(jnp.float32)


def reference(x, y, numbers):
    """The same with a rounding of derivative one, by products of `lax` in float32."""
    return lax.dot_general(
        x + lax.stop_gradient(rounded(x) - x), y + lax.stop_gradient(rounded(y) - y), numbers
    )


def operands(shapes, seed=0):
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


@pytest.mark.parametrize(("x_shape", "y_shape", "numbers"), FORMS)
def test_value_and_derivatives_are_those_of_rounded_operands(x_shape, y_shape, numbers):
    x, y = operands([x_shape, y_shape])
    found = ms.bfloat16_dot_general(x, y, numbers)
    expected = reference(x, y, numbers)
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)
    (cotangent,) = operands([found.shape], seed=1)

    def pulled(product, cotangent):
        return jax.vjp(lambda x, y: product(x, y, numbers), x, y)[1](cotangent)

    # The cotangent is an operand, too.
    chex.assert_trees_all_close(
        pulled(ms.bfloat16_dot_general, cotangent),
        pulled(reference, rounded(cotangent)),
        rtol=1e-5,
        atol=1e-5,
    )
    tangents = tuple(map(rounded, operands([x_shape, y_shape], seed=2)))
    chex.assert_trees_all_close(
        *(
            jax.jvp(lambda x, y, f=f: f(x, y, numbers), (x, y), tangents)[1]
            for f in (ms.bfloat16_dot_general, reference)
        ),
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize("axes", [(0, None), (None, 1), (0, 0), (2, 1)])
@pytest.mark.parametrize("jit", [False, True])
def test_vmap_is_a_loop(axes, jit):
    x, y = operands([(3, 4), (4, 5)])
    x = x if axes[0] is None else jnp.stack([x, 2 * x + 1], axes[0])
    y = y if axes[1] is None else jnp.stack([y, 3 - y], axes[1])

    def total(x, y):
        return jnp.sum(jnp.sin(ms.bfloat16_dot_general(x, y, MATRIX)))

    function = jax.grad(total, (0, 1))
    found = (jax.jit if jit else lambda f: f)(jax.vmap(function, axes))(x, y)
    pick = [lambda a, i, axis=axis: a if axis is None else jnp.take(a, i, axis) for axis in axes]
    rows = [function(pick[0](x, i), pick[1](y, i)) for i in range(2)]
    chex.assert_trees_all_close(found, jax.tree.map(lambda *a: jnp.stack(a), *rows), rtol=1e-5)


def test_dtypes():
    x, y = operands([(3, 4), (4, 5)])
    for dtype in (jnp.bfloat16, jnp.float16):
        found, pull = jax.vjp(lambda x: ms.bfloat16_dot_general(x, y, MATRIX), x.astype(dtype))
        assert found.dtype == jnp.float32
        assert pull(found)[0].dtype == dtype
    with jax.enable_x64(True):
        wide = jnp.asarray(np.asarray(x), jnp.float64)
        found, pull = jax.vjp(lambda x: ms.bfloat16_dot_general(x, y, MATRIX), wide)
        assert found.dtype == pull(found)[0].dtype == jnp.float64


@pytest.mark.usefixtures("without_hook")
def test_what_cannot_be_multiplied_is_named():
    x, y = operands([(3, 4), (4, 5)])
    with pytest.raises(TypeError, match="lhs: expected"):
        ms.bfloat16_dot_general(jnp.ones((3, 4), int), y, MATRIX)
    with pytest.raises(TypeError, match="out_sharding: expected None, got 3"):
        ms.bfloat16_dot_general(x, y, MATRIX, out_sharding=3)


# --- a set encoder with such products ---


def problem(dot_general=ms.bfloat16_dot_general, **options):
    encoder = ms.SetEncoder(32, 48, set_size=5, dot_general=dot_general, **options)
    sets, target = operands([(4, 5, 3), (4, 5, 3)])
    params = encoder.init(jax.random.key(3), sets)
    energy = ms.latent_energy(encoder.apply)

    def loss(params, sets, adjoint=ms.identity()):  # noqa: B008 (a value)
        latent = encoder.apply(params, target)
        minimum = ms.minimise(
            energy, params, ms.Context(latent), sets, num_steps=5, adjoint=adjoint
        )
        return ms.hungarian_loss(minimum.sets, target).mean()

    return params, sets, loss


@pytest.mark.parametrize(
    "adjoint",
    [ms.identity(), ms.neumann(2), ms.conjugate_gradient(3, damping=1.0), ms.unrolled()],
    ids=str,
)
def test_gradients_through_a_minimum_are_close_to_float32(adjoint):
    params, sets, loss = problem()
    _, _, exact = problem(None)
    assert jax.tree.structure(params) == jax.tree.structure(problem(None)[0])
    found, expected = (
        jax.jit(jax.grad(f), static_argnums=2)(params, sets, adjoint) for f in (loss, exact)
    )
    found, expected = (
        jnp.concatenate([x.ravel() for x in jax.tree.leaves(t)]) for t in (found, expected)
    )
    cosine = found @ expected / jnp.linalg.norm(found) / jnp.linalg.norm(expected)
    assert cosine > 0.98
    assert not np.array_equal(found, expected)


def test_every_product_of_a_training_step_has_bfloat16_operands():
    params, sets, loss = problem()
    program = jax.jit(jax.value_and_grad(loss)).lower(params, sets).as_text()
    products = re.findall(r"stablehlo\.dot_general .*? : \((.*?)\) -> (\S+)", program)
    wide = [p for p in products if "x48x" in p[0] or "x32x" in p[0]]
    assert len(wide) > 8
    for inputs, output in wide:
        assert re.fullmatch(r"tensor<\S+xbf16>, tensor<\S+xbf16>", inputs), inputs
        assert output.endswith("f32>")


def test_under_shard_map_checkpoint_and_scan():
    params, sets, _ = problem()
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))

    def one(params, sets):
        encode = jax.checkpoint(lambda p, y: ms.SetEncoder(
            32, 48, set_size=5, dot_general=ms.bfloat16_dot_general).apply(p, y))  # fmt: skip

        def body(total, y):
            return total + jnp.sum(encode(params, y[None]) ** 2), None

        return lax.scan(body, 0 * jnp.sum(sets), sets)[0]

    def shared(params, sets):
        return lax.psum(one(params, sets), "data")

    together = jax.shard_map(shared, mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
    found = jax.jit(jax.grad(together))(params, sets)
    chex.assert_trees_all_close(found, jax.grad(one)(params, sets), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("transposed", ["result", "operands", "both"])
def test_transposed_before_and_after(transposed):
    """XLA's CPU compiler folds transpositions into products, which it then cannot run."""
    x, y = operands([(3, 4), (4, 5)])

    def product(x, y):
        if transposed == "result":
            return ms.bfloat16_dot_general(x, y, MATRIX).T
        z = ms.bfloat16_dot_general(y.T, x.T, MATRIX)
        return z.T if transposed == "both" else z

    found = jax.jit(product)(x, y)
    expected = reference(x, y, MATRIX)
    chex.assert_trees_all_close(found if transposed == "both" else found.T, expected, rtol=1e-5)


@pytest.mark.usefixtures("without_hook")
def test_exported_with_a_batch_of_any_size():
    params, sets, _ = problem()
    encoder = ms.SetEncoder(32, 48, set_size=5, dot_general=ms.bfloat16_dot_general)
    (batch,) = export.symbolic_shape("b")
    whole = export.export(jax.jit(encoder.apply))(
        params, jax.ShapeDtypeStruct((batch, 5, 3), jnp.float32)
    )
    again = export.deserialize(whole.serialize())
    np.testing.assert_allclose(
        again.call(params, sets[:3]), encoder.apply(params, sets[:3]), rtol=1e-5, atol=1e-5
    )
