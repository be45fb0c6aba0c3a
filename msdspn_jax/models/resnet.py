"""Images to latent vectors: the residual network of the paper's CLEVR experiment (section 4.3)."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from msdspn_jax._check import AnyArray, is_traced, require_choice
from msdspn_jax.models.convolution import conv_general_dilated, max_pool

#: Blocks in each of the four stages.
STAGES = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3)}

#: The stem halves twice, three stages halve once each, the end convolution once. The first stage
#: halves too if its stride is 2.
REDUCTION = 64

# Variance 2 / fan_out, as published for networks of rectified units (He et al., 2015).
_conv_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
# Uniform within ±fan_in^(-1/2), as for every linear layer of the authors' code.
_end_init = nn.initializers.variance_scaling(1.0 / 3.0, "fan_in", "uniform")


class ResNet(nn.Module):
    """A ResNet without pooling and classifier, then a norm and a strided convolution, flattened.

    Basic blocks (He et al., 2016, arXiv 1512.03385) with batch normalisation, laid out as in
    PyTorch's ResNet-18 and -34. Images of side s leave it on a grid of (s / 64)² positions; the end
    convolution (2x2, stride 2) gives each ``latent_dim`` / positions channels: for 512 at
    128 x 128, 2 x 2 positions of 128. A first stage of stride 2, which the published network does
    not have, makes the grid, and all work after the stem, that of images of half the side.

    Attributes:
      stage_sizes: basic blocks per stage, see `STAGES`.
      width: channels of the first stage, doubled at each of the next (64 as published).
      latent_dim: length of the latent vector; a multiple of the number of positions.
      first_stride: stride of the first stage, 1 or 2.
      end_norm: batch normalisation before the end convolution, as published.
      train: normalise by the batch and update the running statistics, or use these; given here or
        to the call.
      axis_name: mapped axis over which the batch is spread, if it is: its statistics are then those
        of the whole batch.
      momentum: share of the old running statistics kept at each step.
      dtype: of the computation, for example ``jnp.bfloat16``. Parameters, statistics and the
        latent have 32 bits, or 64.
    """

    stage_sizes: Sequence[int] = STAGES["resnet18"]
    width: int = 64
    latent_dim: int = 512
    first_stride: int = 1
    end_norm: bool = True
    train: bool | None = None
    axis_name: str | None = None
    momentum: float = 0.9
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        images: UInt8[AnyArray, "batch size size 3"] | Float[AnyArray, "batch size size 3"],
        *,
        train: bool | None = None,
    ) -> Float[Array, "batch latent"]:
        """Encode images: uint8, or floats in [0, 1].

        Variables are ``params`` and ``batch_stats``; the latter must be mutable where ``train``.

        Raises:
          ValueError: images that are not square, whose side is not a multiple of 64 (128 with a
            first stride of 2), or whose number of positions does not divide ``latent_dim``.
        """
        train = nn.merge_param("train", self.train, train)
        channels = self._end_channels(images.shape)
        x = unit_range(images).astype(self.dtype)
        norm = _Norm(train, self.axis_name, self.momentum, self.dtype)

        x = _conv(self.width, 7, 2, self.dtype, "stem")(x)
        x = nn.relu(norm("stem_norm")(x))
        x = max_pool(x)
        for stage, blocks in enumerate(self.stage_sizes):
            for block in range(blocks):
                stride = 1 if block else 2 if stage else self.first_stride
                name = f"stage{stage + 1}_block{block + 1}"
                x = _BasicBlock(self.width * 2**stage, stride, norm, self.dtype, name=name)(x)
        if self.end_norm:
            x = norm("end_norm")(x)
        x = nn.Conv(
            channels,
            (2, 2),
            (2, 2),
            padding="VALID",
            dtype=self.dtype,
            kernel_init=_end_init,
            conv_general_dilated=conv_general_dilated,
            name="end",
        )(x)
        return x.reshape(x.shape[0], -1).astype(jnp.promote_types(self.dtype, jnp.float32))

    def _end_channels(self, shape: tuple[Any, ...]) -> int:
        require_choice("first_stride", self.first_stride, (1, 2))
        reduction = REDUCTION * self.first_stride
        if len(shape) != 4 or shape[1] != shape[2] or shape[3] != 3 or shape[1] % reduction:
            raise ValueError(
                "images: expected shape [batch, size, size, 3], size a multiple of "
                f"{reduction}, got {shape}"
            )
        positions = (shape[1] // reduction) ** 2
        if self.latent_dim % positions:
            raise ValueError(
                f"latent_dim: expected a multiple of the {positions} positions that images of side "
                f"{shape[1]} have, got {self.latent_dim}"
            )
        return self.latent_dim // positions


class _BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut around them."""

    features: int
    stride: int
    norm: "_Norm"
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "batch h w c"]) -> Float[Array, "batch h2 w2 features"]:
        shortcut = x
        y = _conv(self.features, 3, self.stride, self.dtype, "conv1")(x)
        y = nn.relu(self.norm("norm1")(y))
        y = self.norm("norm2")(_conv(self.features, 3, 1, self.dtype, "conv2")(y))
        if shortcut.shape != y.shape:
            shortcut = _conv(self.features, 1, self.stride, self.dtype, "shortcut")(x)
            shortcut = self.norm("shortcut_norm")(shortcut)
        return nn.relu(y + shortcut)


class _Norm:
    """Makes the batch normalisations of a network, all with the same settings."""

    def __init__(self, train: bool, axis_name: str | None, momentum: float, dtype: Any):
        self._options = {
            "use_running_average": not train,
            "axis_name": axis_name,
            "momentum": momentum,
            "epsilon": 1e-5,
            "dtype": dtype,
        }

    def __call__(self, name: str) -> nn.BatchNorm:
        return nn.BatchNorm(**self._options, name=name)


def _conv(features: int, size: int, stride: int, dtype: Any, name: str) -> nn.Conv:
    # The same padding on both sides: "SAME" pads a strided convolution on the right alone.
    padding = size // 2
    return nn.Conv(
        features,
        (size, size),
        (stride, stride),
        padding=padding,
        use_bias=False,
        dtype=dtype,
        kernel_init=_conv_init,
        conv_general_dilated=conv_general_dilated,
        name=name,
    )


def unit_range(
    images: UInt8[AnyArray, "*batch"] | Float[AnyArray, "*batch"],
) -> Float[Array, "*batch"]:
    """Bytes to [0, 1]; floats as they are, refused where they are seen to be others."""
    if jnp.issubdtype(jnp.result_type(images), jnp.floating):
        if not is_traced(images) and np.size(images):
            # NumPy's: of XLA's on a CPU, those of large arrays may pass over NaN, and within `jit`
            # they would be traced.
            values = np.asarray(images)
            low, high = np.min(values), np.max(values)
            if not (low >= 0 and high <= 1):  # NaN is neither.
                raise ValueError(
                    f"images: expected uint8 or floats in [0, 1], got {low:g} to {high:g}"
                )
        return jnp.asarray(images)
    images = jnp.asarray(images)
    if images.dtype != jnp.uint8:
        raise TypeError(f"images: expected uint8 or floats in [0, 1], got dtype {images.dtype}")
    return images.astype(jnp.float32) / 255
