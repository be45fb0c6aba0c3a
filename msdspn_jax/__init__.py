"""msdspn_jax: multiset-equivariant set prediction with approximate implicit differentiation.

The method of "Multiset-Equivariant Set Prediction with Approximate Implicit Differentiation"
(Zhang, Zhang, Lacoste-Julien, Burghouts and Snoek, ICLR 2022, arXiv 2111.12193; "the paper" in what
follows), as pure functions:

    encoder = ms.SetEncoder(hidden_dim=512, latent_dim=512, set_size=10)
    energy = ms.latent_energy(encoder.apply, proximity=0.1)
    minimum = ms.minimise(energy, params, context, initial_sets, num_steps=20)

The method in four equations (paper, section 3; the numbering is ours), and where each is written. A
dot marks a tangent: Ẏ is the derivative of Y along a change θ̇ of the parameters.

    (1)  E(Y; z, θ) = ½ mean (g(Y; θ) − z)²             the energy of a set: `latent_energy`; g
                                                        sorts every feature: `fspool`
    (2)  Y = T(Y; z, θ) = proj(Y − ∇_Y E(Y; z, θ))      a minimum is where a step moves nothing:
                                                        `Descent`
    (3)  Ẏ = (I − ∂T/∂Y)⁻¹ ∂T/∂θ θ̇                      its derivative: `exact`; approximately
                                                        `neumann`, `conjugate_gradient`
    (4)  Ẏ ≈ ∂T/∂θ θ̇                                    the paper's approximation: `identity`

What is imported here needs jax, flax, optax, numpy, scipy and jaxtyping. Data, training, plots and
the command line are in submodules, to be imported by name; they need the extra ``app``.
"""

from importlib import metadata as _metadata

from msdspn_jax.acceleration import anderson
from msdspn_jax.adjoints import (
    Adjoint,
    FixedPoint,
    Implicit,
    Linearised,
    Unrolled,
    conjugate_gradient,
    exact,
    identity,
    neumann,
    parse_adjoint,
    unrolled,
)
from msdspn_jax.box_losses import Costs, Term, box_cost, generalised_iou, iou, set_loss
from msdspn_jax.clevr.metrics import average_precision
from msdspn_jax.clevr.objects import ObjectLayout
from msdspn_jax.descent import (
    DEFAULT_OPTIMIZER,
    Descent,
    Minimum,
    Status,
    Trajectory,
    lowest,
    minimise,
    nesterov,
)
from msdspn_jax.energy import Context, Energy, latent_energy
from msdspn_jax.equivariance import (
    EquivarianceReport,
    check_equivariance,
    example_sets,
    push_apart,
)
from msdspn_jax.losses import (
    chamfer_loss,
    hungarian_loss,
    numbering_assignment,
    numbering_loss,
    pairwise_smooth_l1,
)
from msdspn_jax.matching.assignment import INVALID, UNMATCHED, assign, matched_cost
from msdspn_jax.matching.bottleneck import assign_bottleneck
from msdspn_jax.metrics import numbering_accuracy
from msdspn_jax.models.authors import from_pytorch
from msdspn_jax.models.inner import Inner, published_inner
from msdspn_jax.models.set_predictor import (
    SetDecoder,
    SetPredictor,
    random_initial_sets,
    set_autoencoder,
)
from msdspn_jax.pooling import continuous_weight, fspool, mean_pool, sum_pool
from msdspn_jax.products import bfloat16_dot_general
from msdspn_jax.projections import simplex
from msdspn_jax.ranks import stable_ranks
from msdspn_jax.set_encoder import SetEncoder
from msdspn_jax.step_size import StepSize, suggest_step_size

#: `minimise`, as it is spelled in America.
minimize = minimise

try:
    __version__ = _metadata.version("msdspn-jax")
except _metadata.PackageNotFoundError:  # A checkout on the path that was never installed.
    __version__ = "unknown"

__all__ = [
    "DEFAULT_OPTIMIZER",
    "INVALID",
    "UNMATCHED",
    "Adjoint",
    "Context",
    "Costs",
    "Descent",
    "Energy",
    "EquivarianceReport",
    "FixedPoint",
    "Implicit",
    "Inner",
    "Linearised",
    "Minimum",
    "ObjectLayout",
    "SetDecoder",
    "SetEncoder",
    "SetPredictor",
    "Status",
    "StepSize",
    "Term",
    "Trajectory",
    "Unrolled",
    "anderson",
    "assign",
    "assign_bottleneck",
    "average_precision",
    "bfloat16_dot_general",
    "box_cost",
    "chamfer_loss",
    "check_equivariance",
    "conjugate_gradient",
    "continuous_weight",
    "exact",
    "example_sets",
    "from_pytorch",
    "fspool",
    "generalised_iou",
    "hungarian_loss",
    "identity",
    "iou",
    "latent_energy",
    "lowest",
    "matched_cost",
    "mean_pool",
    "minimise",
    "minimize",
    "nesterov",
    "neumann",
    "numbering_accuracy",
    "numbering_assignment",
    "numbering_loss",
    "pairwise_smooth_l1",
    "parse_adjoint",
    "published_inner",
    "push_apart",
    "random_initial_sets",
    "set_autoencoder",
    "set_loss",
    "simplex",
    "stable_ranks",
    "suggest_step_size",
    "sum_pool",
    "unrolled",
]
