"""The seven models of class-specific numbering behind one interface (paper, section 4.1)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from msdspn_jax import _check
from msdspn_jax.adjoints import Gradient
from msdspn_jax.descent import Minimum
from msdspn_jax.models.bilstm import BiLSTM
from msdspn_jax.models.deep_sets import DeepSets
from msdspn_jax.models.set_predictor import INITIAL_SCALE, SetDecoder, SetPredictor, gradient_of
from msdspn_jax.models.transformer import Transformer
from msdspn_jax.projections import simplex
from msdspn_jax.set_encoder import SetEncoder

MODELS = (
    "idspn",
    "dspn",
    "deep-sets",
    "transformer",
    "transformer-pe",
    "transformer-random-pe",
    "bilstm",
)


class NumberingModel(NamedTuple):
    """A model that numbers the elements of multisets.

    Attributes:
        init: ``key -> params``.
        apply: ``(params, inputs [batch, n, num_classes], noise [batch, n, w], num_steps=None) ->
            (prediction [batch, n, n], minimum)``. The minimum is None unless the model minimises,
            and only then ``num_steps``, the inner steps, has a meaning. Row i of the noise belongs
            to element i.
        noise_width: w, the standard normal numbers that an element needs; 0 for most.
        cost: what the prediction is trained with, see `losses.numbering_loss`: "l2" for points on
            the simplex, "ce" for logits.
    """

    init: Callable[[Key[Array, ""]], PyTree]
    apply: Callable[..., tuple[Float[Array, "batch n n"], Minimum | None]]
    noise_width: int
    cost: str

    def draw_noise(self, keys: Key[Array, " batch"], n: int) -> Float[Array, "batch n w"]:
        """Draw the noise of every set from a key of its own."""
        shape = (n, self.noise_width)
        return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)


def numbering_model(
    name: str,
    *,
    set_size: int,
    num_classes: int,
    hidden_dim: int = 256,
    latent_dim: int = 256,
    width: int = 64,
    inner_steps: int = 20,
    inner_momentum: float | None = None,
    max_inner_grad_norm: float | None = None,
    gradient: Gradient | None = None,
    pool: str = "fspool",
) -> NumberingModel:
    """Build a model with the published settings where nothing else is said.

    Args:
        name: one of `MODELS`.
        set_size: n.
        num_classes: width of the input's elements.
        hidden_dim: hidden width of DSPN, iDSPN and DeepSets.
        latent_dim: width of the latent vector of DSPN and iDSPN.
        width: width of the transformers (feed-forward part: twice that) and of the BiLSTM.
        inner_steps: steps of the inner minimisation.
        inner_momentum: its Nesterov momentum; None: 0.9 for iDSPN, 0 for DSPN.
        max_inner_grad_norm: clip the inner gradient of every set; None: 40 for iDSPN, no clipping
            for DSPN.
        gradient: how the minimum is differentiated; None: `identity` for iDSPN, `unrolled` for
            DSPN.
        pool: pool of the energy's set encoder. With "sum" or "mean" the gradient, hence the model,
            is merely set-equivariant.
    """
    _check.require_choice("name", name, MODELS)
    inputs = jnp.zeros((1, set_size, num_classes))
    if name in ("idspn", "dspn"):
        implicit = name == "idspn"
        default_momentum, default_norm = (0.9, 40.0) if implicit else (0.0, None)
        predictor = SetPredictor(
            encoder=SetEncoder(hidden_dim, latent_dim, set_size),
            decoder=SetDecoder(
                set_size,
                set_size,
                hidden_dim,
                num_steps=inner_steps,
                momentum=default_momentum if inner_momentum is None else inner_momentum,
                max_grad_norm=default_norm if max_inner_grad_norm is None else max_inner_grad_norm,
                gradient=gradient_of(name) if gradient is None else gradient,
                initial_set="random",
                proximity=0.0,
                projection=simplex,
                pool=pool,
            ),
            condition_on_inputs=True,
        )

        def minimise(params, inputs, noise, num_steps=None):
            minimum = predictor.apply(
                {"params": params}, inputs, initial_sets=INITIAL_SCALE * noise, num_steps=num_steps
            )
            assert isinstance(minimum, Minimum)
            return minimum.sets, minimum

        return NumberingModel(
            lambda key: predictor.init(key, inputs)["params"],
            minimise,
            noise_width=set_size,
            cost="l2",
        )

    module: Any
    if name == "deep-sets":
        module = DeepSets(set_size, hidden_dim)
    elif name == "bilstm":
        module = BiLSTM(set_size, width)
    else:
        encoding: Any = {
            "transformer": "none",
            "transformer-pe": "sinusoidal",
            "transformer-random-pe": "random",
        }[name]
        module = Transformer(set_size, encoding, width, feed_forward_dim=2 * width)
    noise_width = getattr(module, "noise_width", 0)

    def arguments(inputs, noise):
        return (inputs, noise) if noise_width else (inputs,)

    def init(key):
        return module.init(key, *arguments(inputs, jnp.zeros((1, set_size, noise_width))))["params"]

    def apply(params, inputs, noise, num_steps=None):
        del num_steps
        return module.apply({"params": params}, *arguments(inputs, noise)), None

    return NumberingModel(init, apply, noise_width, cost="ce")
