"""The baselines of the CLEVR experiment: Slot Attention and Slot MLP (arXiv 2006.15055)."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, UInt8

from msdspn_jax import _check
from msdspn_jax._check import AnyArray
from msdspn_jax.models.convolution import conv_general_dilated
from msdspn_jax.models.resnet import unit_range


class ConvFeatures(nn.Module):
    """Four 5x5 convolutions, the place of every feature added, normalised, through an MLP.

    Attributes:
        features: channels throughout.
        strides: of the convolutions: 128 x 128 becomes 32 x 32.
    """

    features: int = 64
    strides: tuple[int, ...] = (1, 2, 2, 1)

    @nn.compact
    def __call__(
        self, images: UInt8[AnyArray, "batch h w 3"] | Float[AnyArray, "batch h w 3"]
    ) -> Float[Array, "batch positions features"]:
        """Features of images, uint8 or floats in [0, 1]; scaled to [-1, 1] here."""
        if len(images.shape) != 4 or images.shape[-1] != 3:
            raise ValueError(f"images: expected shape [batch, h, w, 3], got {images.shape}")
        x = 2 * unit_range(images) - 1
        for i, stride in enumerate(self.strides):
            convolution = nn.Conv(
                self.features, (5, 5), (stride, stride), name=f"conv{i + 1}",
                conv_general_dilated=conv_general_dilated,
            )  # fmt: skip
            x = nn.relu(convolution(x))
        x = x + nn.Dense(self.features, name="position")(_position_grid(*x.shape[1:3]))
        x = x.reshape(x.shape[0], -1, self.features)
        x = nn.LayerNorm(name="norm")(x)
        return _mlp(x, self.features, self.features, "mlp")


class SlotAttention(nn.Module):
    """Slots compete for inputs, and each is updated from what it wins (their algorithm 1).

    Equivariant to permutations of the slots, invariant to permutations of the inputs.

    Attributes:
        iterations: rounds.
        mlp_dim: hidden width of the residual MLP.
        epsilon: added to the attention, so that a slot that wins nothing divides by no zero.
    """

    iterations: int = 3
    mlp_dim: int = 128
    epsilon: float = 1e-8

    @nn.compact
    def __call__(
        self,
        inputs: Float[Array, "batch positions c"],
        slots: Float[Array, "batch n slot_dim"],
    ) -> Float[Array, "batch n slot_dim"]:
        """The slots after the last round, from those given."""
        width = slots.shape[-1]
        inputs = nn.LayerNorm(name="norm_inputs")(inputs)
        keys = nn.Dense(width, use_bias=False, name="key")(inputs)
        values = nn.Dense(width, use_bias=False, name="value")(inputs)
        query = nn.Dense(width, use_bias=False, name="query")
        norm_slots, norm_mlp = nn.LayerNorm(name="norm_slots"), nn.LayerNorm(name="norm_mlp")
        gru = nn.GRUCell(width, name="gru")
        hidden, output = nn.Dense(self.mlp_dim, name="mlp1"), nn.Dense(width, name="mlp2")
        for _ in range(self.iterations):
            previous = slots
            logits = jnp.einsum("bpc,bnc->bpn", keys, query(norm_slots(slots))) * width**-0.5
            # Over the slots: they compete for each input. Then over the inputs: a weighted mean.
            attention = nn.softmax(logits, axis=-1) + self.epsilon
            attention = attention / attention.sum(axis=1, keepdims=True)
            updates = jnp.einsum("bpn,bpc->bnc", attention, values)
            slots, _ = gru(previous, updates)
            slots = slots + output(nn.relu(hidden(norm_mlp(slots))))
        return slots


class SlotAttentionPredictor(nn.Module):
    """Images to sets by Slot Attention; elements are sigmoids, positions in [0, 1].

    `msdspn_jax.clevr.slots` has the targets and the loss that CLEVR's sets ask for.

    Attributes:
        set_size: number of slots, n.
        set_dim: d.
        slot_dim: width of features and slots.
        iterations: rounds of attention.
    """

    set_size: int = 10
    set_dim: int = 19
    slot_dim: int = 64
    iterations: int = 3

    @nn.compact
    def __call__(
        self,
        images: UInt8[AnyArray, "batch h w 3"] | Float[AnyArray, "batch h w 3"],
        keys: Key[Array, " batch"] | None = None,
        *,
        noise: Float[AnyArray, "batch n slot_dim"] | None = None,
    ) -> Float[Array, "batch n d"]:
        """Predict a set for every image.

        Args:
            images: uint8, or floats in [0, 1].
            keys: one for every image, from which its initial slots are drawn: mean + exp(log σ) ·
                noise, with learned mean and log σ that all slots share.
            noise: the standard normal draws themselves, in place of keys.
        """
        batch = images.shape[0]
        shape = (self.set_size, self.slot_dim)
        if noise is None:
            noise = self._noise(keys, batch)
        _check.require_shape("noise", noise, (batch, *shape), "batch n slot_dim")
        spread = nn.initializers.glorot_uniform()
        mean = self.param("slots_mean", spread, (1, self.slot_dim))
        log_sigma = self.param("slots_log_sigma", spread, (1, self.slot_dim))
        features = ConvFeatures(self.slot_dim, name="features")(images)
        attend = SlotAttention(self.iterations, 2 * self.slot_dim, name="attention")
        slots = attend(features, mean + jnp.exp(log_sigma) * noise)
        return _head(slots, self.set_dim)

    def _noise(self, keys: Key[Array, " batch"] | None, batch: Any):
        shape = (self.set_size, self.slot_dim)
        if keys is None:
            if self.is_initializing():
                return jnp.zeros((batch, *shape))
            raise ValueError("keys: expected one key for every image (or noise), got None")
        if jnp.shape(keys)[:1] != (batch,):
            raise ValueError(f"keys: expected {batch} keys, one an image, got {jnp.shape(keys)}")
        return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)


class SlotMLPPredictor(nn.Module):
    """The same features, flattened, through an MLP to all slots at once, and the same head.

    Attributes:
        set_size: number of slots, n.
        set_dim: d.
        slot_dim: width of features and slots.
        hidden_dim: width of the MLP (ours; the published one is not stated).
    """

    set_size: int = 10
    set_dim: int = 19
    slot_dim: int = 64
    hidden_dim: int = 512

    @nn.compact
    def __call__(
        self, images: UInt8[AnyArray, "batch h w 3"] | Float[AnyArray, "batch h w 3"]
    ) -> Float[Array, "batch n d"]:
        """Predict a set for every image: uint8, or floats in [0, 1]."""
        features = ConvFeatures(self.slot_dim, name="features")(images)
        flat = features.reshape(features.shape[0], -1)
        slots = _mlp(flat, self.hidden_dim, self.set_size * self.slot_dim, "slots")
        return _head(slots.reshape(-1, self.set_size, self.slot_dim), self.set_dim)


def _mlp(x: Float[Array, "*batch c"], hidden: int, output: int, name: str):
    x = nn.relu(nn.Dense(hidden, name=f"{name}1")(x))
    return nn.Dense(output, name=f"{name}2")(x)


def _head(slots: Float[Array, "batch n c"], set_dim: int) -> Float[Array, "batch n d"]:
    return nn.sigmoid(_mlp(slots, slots.shape[-1], set_dim, "head"))


def _position_grid(height: int, width: int) -> Float[Array, "h w 4"]:
    """(x, y, 1 - x, 1 - y) of every place, from 0 at one edge to 1 at the other."""
    y, x = jnp.meshgrid(jnp.linspace(0, 1, height), jnp.linspace(0, 1, width), indexing="ij")
    return jnp.stack([x, y, 1 - x, 1 - y], axis=-1)
