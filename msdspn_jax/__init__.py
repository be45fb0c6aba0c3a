"""msdspn_jax: multiset-equivariant set prediction with approximate implicit differentiation.

The library of "Multiset-Equivariant Set Prediction with Approximate Implicit Differentiation"
(Zhang, Zhang, Lacoste-Julien, Burghouts and Snoek, ICLR 2022, arXiv 2111.12193), as pure functions:

    encoder = ms.SetEncoder(hidden_dim=512, latent_dim=512, set_size=10)
    energy = ms.latent_energy(encoder.apply, proximity=0.1)
    minimum = ms.minimise(energy, params, context, initial_sets, num_steps=20)

Everything here needs jax, flax, optax and numpy alone. Data, training, plots and the command line
live in submodules of their own, imported by name.
"""

from .anderson import anderson
from .energy import Context, Energy, latent_energy
from .equivariance import EquivarianceReport, check_equivariance, push_apart
from .implicit import (
    FixedPoint,
    Implicit,
    Unrolled,
    conjugate_gradient,
    exact,
    identity,
    neumann,
    parse_gradient,
    unrolled,
)
from .losses import chamfer_loss, hungarian_loss, numbering_loss, pairwise_smooth_l1
from .matching import assign, matched_cost
from .metrics import average_precision, numbering_accuracy
from .minimise import DEFAULT_OPTIMIZER, Minimum, Trajectory, minimise
from .models.set_predictor import SetDecoder, SetPredictor, random_initial_sets, set_autoencoder
from .pooling import continuous_weight, fspool, mean_pool, stable_ranks, sum_pool
from .projections import simplex
from .set_encoder import SetEncoder
from .step_size import StepSize, suggest_step_size

__version__ = "0.1.0"

__all__ = [
    "DEFAULT_OPTIMIZER",
    "Context",
    "Energy",
    "EquivarianceReport",
    "FixedPoint",
    "Implicit",
    "Minimum",
    "SetDecoder",
    "SetEncoder",
    "SetPredictor",
    "StepSize",
    "Trajectory",
    "Unrolled",
    "anderson",
    "assign",
    "average_precision",
    "chamfer_loss",
    "check_equivariance",
    "conjugate_gradient",
    "continuous_weight",
    "exact",
    "fspool",
    "hungarian_loss",
    "identity",
    "latent_energy",
    "matched_cost",
    "mean_pool",
    "minimise",
    "neumann",
    "numbering_accuracy",
    "numbering_loss",
    "pairwise_smooth_l1",
    "parse_gradient",
    "push_apart",
    "random_initial_sets",
    "set_autoencoder",
    "simplex",
    "stable_ranks",
    "suggest_step_size",
    "sum_pool",
    "unrolled",
]
