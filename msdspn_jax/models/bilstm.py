"""A bidirectional LSTM over the elements in the order they come: neither kind of equivariance."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from msdspn_jax._check import AnyArray


class BiLSTM(nn.Module):
    """Stacked bidirectional LSTMs between linear layers on every element (paper, section 4.1).

    Attributes:
        output_dim: width of the output.
        width: cells in each direction.
        num_layers: layers, each reading both directions of the one before.
    """

    output_dim: int
    width: int = 64
    num_layers: int = 2

    @nn.compact
    def __call__(self, sets: Float[AnyArray, "batch n d"]) -> Float[Array, "batch n output_dim"]:
        # The cells take the dtype of their first carry from this.
        dtype = jnp.promote_types(sets.dtype, jnp.float32)

        def cell():
            return nn.OptimizedLSTMCell(self.width, param_dtype=dtype)

        hidden: Any = nn.Dense(self.width, name="embedding")(sets)
        for layer in range(self.num_layers):
            hidden = nn.Bidirectional(
                nn.RNN(cell(), name=f"forward_{layer}"), nn.RNN(cell(), name=f"backward_{layer}")
            )(hidden)
        return nn.Dense(self.output_dim, name="output")(hidden)
