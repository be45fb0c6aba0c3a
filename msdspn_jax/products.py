"""Matrix products of numbers rounded to bfloat16, summed in float32."""

from __future__ import annotations

from collections.abc import Sequence
from string import ascii_letters
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float

from msdspn_jax import _check
from msdspn_jax._check import AnyArray
from msdspn_jax._varying import vary_like


def bfloat16_dot_general(
    lhs: Float[AnyArray, "*left"],
    rhs: Float[AnyArray, "*right"],
    dimension_numbers: tuple[
        tuple[Sequence[int], Sequence[int]], tuple[Sequence[int], Sequence[int]]
    ],
    precision: Any = None,
    preferred_element_type: Any = None,
    **options: Any,
) -> Float[Array, "*product"]:
    """`jax.lax.dot_general` of operands rounded to bfloat16, with sums and results in float32.

    For layers of flax, and for `SetEncoder`, by their attribute ``dot_general``. Hardware with
    bfloat16 arithmetic multiplies twice as fast so, or more (experiments/benchmarks/README.md).
    By ``dtype=jnp.bfloat16`` results are rounded as well, so that unequal ones become equal, which
    is bad for what is sorted; on a CPU it is no faster.

    Derivatives are such products as well, in forward and reverse mode and to every order; the
    rounding counts as the identity.

    Args:
        lhs: any floating dtype.
        rhs: any floating dtype.
        dimension_numbers: ((contracted axes of lhs, of rhs), (batch axes of lhs, of rhs)).
        precision: ignored.
        preferred_element_type: ignored.
        **options: further arguments of `jax.lax.dot_general`; expected to be None.

    Returns:
        float32, or float64 if an operand is.

    Raises:
        TypeError: operands that are not floating.

    Example:
        >>> third = jnp.ones((1, 3)) / 3
        >>> bfloat16_dot_general(third, jnp.ones((3, 1)), (((1,), (0,)), ((), ()))).item()
        1.001953125
    """
    del precision, preferred_element_type
    for name, value in options.items():
        if value is not None:
            raise TypeError(f"{name}: expected None, got {value!r}")
    _check.require_floating("lhs", lhs)
    _check.require_floating("rhs", rhs)
    dtype = jnp.promote_types(jnp.result_type(lhs, rhs), jnp.float32)
    x, y = jnp.asarray(lhs, jnp.float32), jnp.asarray(rhs, jnp.float32)
    x, y = vary_like(x, y), vary_like(y, x)
    return _product_p.bind(x, y, labels=_labels(x.ndim, y.ndim, dimension_numbers)).astype(dtype)


# The product is a primitive because its derivatives are to be such products, too. JAX would derive
# them from a product of bfloat16 with results in float32 as products of float32 *with* bfloat16,
# which run at the rate of float32. As in an einsum, axes of a name are multiplied, and summed over
# unless the result has them; then a derivative is the product with the names exchanged.
_product_p = Primitive("bfloat16_product")
_Labels = tuple[str, str, str]  # of the axes of both operands and of the result


def _labels(x_ndim: int, y_ndim: int, dimension_numbers) -> _Labels:
    (x_inner, y_inner), (x_batch, y_batch) = dimension_numbers
    x = list(ascii_letters[:x_ndim])
    y = list(ascii_letters[x_ndim : x_ndim + y_ndim])
    for i, j in zip((*x_inner, *x_batch), (*y_inner, *y_batch), strict=True):
        y[j] = x[i]
    batch = [x[i] for i in x_batch]
    out = [*batch, *(c for c in x if c not in y), *(c for c in y if c not in x)]
    return "".join(x), "".join(y), "".join(out)


def _product(x: jax.Array, y: jax.Array, *, labels: _Labels) -> jax.Array:
    of_x, of_y, out = labels
    batch = [c for c in out if c in of_x and c in of_y]
    rest = [c for c in out if c not in batch]
    if rest and rest[0] in of_y:  # Then nothing is to be transposed.
        x, y, of_x, of_y = y, x, of_y, of_x
    inner = [c for c in of_x if c not in out]
    numbers = tuple(
        tuple(tuple(map(of.index, names)) for of in (of_x, of_y)) for names in (inner, batch)
    )
    x, y = x.astype(jnp.bfloat16), y.astype(jnp.bfloat16)
    z = lax.dot_general(x, y, numbers, preferred_element_type=jnp.float32)  # pyright: ignore
    order = [*batch, *(c for c in of_x if c not in of_y), *(c for c in of_y if c not in of_x)]
    return lax.transpose(z, tuple(map(order.index, out)))


def _product_on_cpu(x, y, *, labels):
    # XLA would move a transposition of the result into the product, and then fail to run it.
    return lax.optimization_barrier(_product(x, y, labels=labels))


def _to_x(cotangent, x, y, *, labels):
    of_x, of_y, out = labels
    del x
    return _product_p.bind(cotangent, y, labels=(out, of_y, of_x))


def _to_y(cotangent, x, y, *, labels):
    of_x, of_y, out = labels
    del y
    return _product_p.bind(x, cotangent, labels=(of_x, out, of_y))


def _batched(operands, axes, *, labels):
    of_x, of_y, out = labels
    new = next(c for c in ascii_letters if c not in of_x + of_y)
    of_x, of_y = (
        of if axis is None else of[:axis] + new + of[axis:]
        for of, axis in zip((of_x, of_y), axes, strict=True)
    )
    return _product_p.bind(*operands, labels=(of_x, of_y, new + out)), 0


def _abstract(x, y, *, labels):
    return jax.make_jaxpr(lambda x, y: _product(x, y, labels=labels))(x, y).out_avals[0]


_product_p.def_impl(jax.jit(_product_p.bind, static_argnames="labels"))
_product_p.def_abstract_eval(_abstract)
ad.defbilinear(_product_p, _to_x, _to_y)
batching.primitive_batchers[_product_p] = _batched
mlir.register_lowering(_product_p, mlir.lower_fun(_product, multiple_results=False))
mlir.register_lowering(
    _product_p, mlir.lower_fun(_product_on_cpu, multiple_results=False), platform="cpu"
)
