"""Which equivariance a model of class-specific numbering has (paper, table 1)."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key, PyTree

from msdspn_jax.equivariance import EquivarianceReport, check_equivariance
from msdspn_jax.tasks.numbering.config import Config
from msdspn_jax.tasks.numbering.data import draw_batch
from msdspn_jax.tasks.numbering.model import build_model

NoiseBelongsTo = Literal["model", "elements"]

#: The published check marks (paper, table 1): set-equivariant, multiset-equivariant.
PUBLISHED_EQUIVARIANCE: dict[str, tuple[bool, bool]] = {
    "deep-sets": (True, True),
    "transformer": (True, True),
    "transformer-random-pe": (False, False),
    "transformer-pe": (False, False),
    "bilstm": (False, False),
    "dspn": (False, True),
    "idspn": (False, True),
}

#: The reading of randomness under which those marks hold, for the models that draw any. The initial
#: set of DSPN is what the minimisation acts on, part of its input; a position encoding, random or
#: not, is part of the model that adds it.
PUBLISHED_READING: dict[str, NoiseBelongsTo] = {
    "transformer-random-pe": "model",
    "dspn": "elements",
    "idspn": "elements",
}


def model_equivariance(
    config: Config,
    params: PyTree,
    *,
    key: Key[Array, ""],
    noise_belongs_to: NoiseBelongsTo | None = None,
    num_sets: int = 9,
    num_permutations: int = 6,
) -> EquivarianceReport:
    """Check which equivariance the model of `config` has with these parameters.

    Args:
        config: names the model and its sizes.
        params: fresh or trained.
        key: draws the multisets, permutations and noise.
        noise_belongs_to: for models that draw noise, see `msdspn_jax.equivariance`. "model": row i
            of the output always meets row i of one fixed noise. "elements": the noise is permuted
            with the inputs, two thirds of the multisets have equal noise for equal inputs, and
            outputs may be exchanged among equal inputs. None: as the published check marks take it,
            `PUBLISHED_READING`.
        num_sets: multisets to try; in every third all elements are equal.
        num_permutations: permutations of each.
    """
    model = build_model(config)
    reading = noise_belongs_to or PUBLISHED_READING.get(config.model, "model")
    n, num_classes, width = config.set_size, config.num_classes, model.noise_width
    key_sets, key_noise, key_class, key_check = jax.random.split(key, 4)
    inputs = draw_batch(jax.random.split(key_sets, num_sets), **config.sizes()).inputs
    kind = (jnp.arange(num_sets) % 3)[:, None, None]
    inputs = jnp.where(kind == 2, inputs[:, :1], inputs)
    options: dict[str, Any] = {
        "key": key_check,
        "num_permutations": num_permutations,
        "batched": True,
        "name": config.model,
    }
    if width == 0 or reading == "model":
        noise = jax.random.normal(key_noise, (1, n, width))

        def function(sets):
            fixed = jnp.broadcast_to(noise.astype(sets.dtype), (*sets.shape[:2], width))
            return model.apply(params, sets, fixed)[0]

        return check_equivariance(function, inputs, **options)
    noise = jax.random.normal(key_noise, (num_sets, n, width))
    by_class = jax.random.normal(key_class, (num_sets, num_classes, width))
    shared = jnp.einsum("snc,scw->snw", inputs, by_class)
    pairs = jnp.concatenate([inputs, jnp.where(kind == 0, noise, shared)], axis=-1)
    return check_equivariance(
        lambda sets: model.apply(params, sets[..., :num_classes], sets[..., num_classes:])[0],
        pairs,
        # Elements of one class may be exchanged whatever their noise: where the minimisation takes
        # two of them to the same corner of the simplex, it forgets which came from where.
        equal_by=slice(num_classes),
        **options,
    )
