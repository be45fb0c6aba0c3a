"""An encoder-decoder transformer on sets, with three choices of telling positions apart.

Layers as in Vaswani et al. (NeurIPS 2017, arXiv 1706.03762): attention, then a feed-forward part,
each with a residual connection and layer normalisation after it; no dropout. Encoder and decoder
both see the input set, both end in a layer normalisation, and no attention is masked, so that
without position encoding the network is set-equivariant.
"""

from __future__ import annotations

from typing import Literal, get_args

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from msdspn_jax import _check
from msdspn_jax._check import AnyArray

PositionEncoding = Literal["none", "sinusoidal", "random"]


def sinusoidal_encoding(n: int, width: int) -> Float[Array, "n width"]:
    """Sines and cosines of geometrically spaced frequencies (Vaswani et al. 2017, section 3.5)."""
    position = jnp.arange(n)[:, None]
    frequency = 10_000.0 ** (-jnp.arange(0, width, 2) / width)
    angle = position * frequency
    waves = jnp.stack([jnp.sin(angle), jnp.cos(angle)], axis=-1)
    return waves.reshape(n, -1)[:, :width]


class TransformerLayer(nn.Module):
    """Self-attention, attention to a memory if there is one, feed-forward; all post-norm.

    Attributes:
        num_heads: attention heads.
        feed_forward_dim: hidden width of the feed-forward part.
    """

    num_heads: int
    feed_forward_dim: int

    @nn.compact
    def __call__(
        self,
        hidden: Float[Array, "batch n width"],
        memory: Float[Array, "batch m width"] | None = None,
    ) -> Float[Array, "batch n width"]:
        attend = nn.MultiHeadDotProductAttention(self.num_heads, name="self_attention")
        hidden = nn.LayerNorm(name="self_norm")(hidden + attend(hidden))
        if memory is not None:
            attend = nn.MultiHeadDotProductAttention(self.num_heads, name="cross_attention")
            hidden = nn.LayerNorm(name="cross_norm")(hidden + attend(hidden, memory))
        wide = nn.relu(nn.Dense(self.feed_forward_dim, name="wide")(hidden))
        narrow = nn.Dense(hidden.shape[-1], name="narrow")(wide)
        return nn.LayerNorm(name="feed_forward_norm")(hidden + narrow)


class Transformer(nn.Module):
    """The transformers of the numbering experiment (paper, section 4.1).

    Attributes:
        output_dim: width of the output.
        position_encoding: "none" (set-equivariant); "sinusoidal", added to the input of the
            decoder; or "random": half of the width of that input is α + exp(β) ε with learned
            scalars α, β and ε ~ N(0, 1) from `noise`.
        width: width of the hidden features.
        num_layers: layers in the encoder, and as many in the decoder.
        num_heads: attention heads.
        feed_forward_dim: hidden width of the feed-forward parts.
    """

    output_dim: int
    position_encoding: PositionEncoding = "none"
    width: int = 64
    num_layers: int = 2
    num_heads: int = 8
    feed_forward_dim: int = 128

    @property
    def noise_width(self) -> int:
        """How many standard normal numbers an element needs: w in `noise` [batch, n, w]."""
        return self.width // 2 if self.position_encoding == "random" else 0

    @nn.compact
    def __call__(
        self,
        sets: Float[AnyArray, "batch n d"],
        noise: Float[AnyArray, "batch n w"] | None = None,
    ) -> Float[Array, "batch n output_dim"]:
        encodings = get_args(PositionEncoding)
        _check.require_choice("position_encoding", self.position_encoding, encodings)
        if self.width % self.num_heads or self.width % 2:
            raise ValueError(
                f"width: expected an even number, a multiple of num_heads = {self.num_heads}, "
                f"got {self.width}"
            )
        source = nn.Dense(self.width, name="encoder_embedding")(sets)
        target = nn.Dense(self.width - self.noise_width, name="decoder_embedding")(sets)
        if self.position_encoding == "sinusoidal":
            target = target + sinusoidal_encoding(sets.shape[-2], self.width)
        elif self.position_encoding == "random":
            expected = (*sets.shape[:-1], self.noise_width)
            if noise is None:
                raise ValueError(f"noise: expected shape {expected}, got None")
            _check.require_shape("noise", noise, expected, "batch n w")
            shift = self.param("noise_shift", nn.initializers.zeros, ())
            log_scale = self.param("noise_log_scale", nn.initializers.zeros, ())
            target = jnp.concatenate([target, shift + jnp.exp(log_scale) * noise], axis=-1)
        for layer in range(self.num_layers):
            source = TransformerLayer(
                self.num_heads, self.feed_forward_dim, name=f"encoder_{layer}"
            )(source)
        source = nn.LayerNorm(name="encoder_norm")(source)
        for layer in range(self.num_layers):
            target = TransformerLayer(
                self.num_heads, self.feed_forward_dim, name=f"decoder_{layer}"
            )(target, source)
        target = nn.LayerNorm(name="decoder_norm")(target)
        return nn.Dense(self.output_dim, name="output")(target)
