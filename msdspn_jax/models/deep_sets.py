"""DeepSets, the simplest set-equivariant network (Zaheer et al. 2017, arXiv 1703.06114)."""

from __future__ import annotations

import flax.linen as nn
from jaxtyping import Array, Float

from msdspn_jax._check import AnyArray


class DeepSetsLayer(nn.Module):
    """x_i ↦ A x_i + B mean_j(x_j) + b: all a linear map can be that commutes with permutations.

    Attributes:
        features: width of the output.
    """

    features: int

    @nn.compact
    def __call__(self, sets: Float[AnyArray, "batch n d"]) -> Float[Array, "batch n features"]:
        own = nn.Dense(self.features, name="element")(sets)
        mean = sets.mean(axis=-2, keepdims=True)
        return own + nn.Dense(self.features, use_bias=False, name="mean")(mean)


class DeepSets(nn.Module):
    """Two equivariant layers with a ReLU between (paper, section 4.1: hidden width 256).

    Set-equivariant: equal elements get equal outputs, whatever the parameters.

    Attributes:
        output_dim: width of the output.
        hidden_dim: width between the layers.
    """

    output_dim: int
    hidden_dim: int = 256

    @nn.compact
    def __call__(self, sets: Float[AnyArray, "batch n d"]) -> Float[Array, "batch n output_dim"]:
        hidden = nn.relu(DeepSetsLayer(self.hidden_dim, name="first")(sets))
        return DeepSetsLayer(self.output_dim, name="second")(hidden)
