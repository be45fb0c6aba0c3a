"""CLEVR's sets as Slot Attention predicts them (arXiv 2006.15055), and its loss."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from msdspn_jax import _check
from msdspn_jax._check import AnyArray
from msdspn_jax.clevr.objects import CLEVR_LAYOUT, PRESENCE_THRESHOLD, ObjectLayout
from msdspn_jax.losses import smooth_l1
from msdspn_jax.matching.assignment import Method, assign, matched_cost


def from_clevr_layout(
    objects: Float[AnyArray, "*batch d"], *, layout: ObjectLayout = CLEVR_LAYOUT
) -> Float[Array, "*batch d"]:
    """Sets as Slot Attention wants them: positions [-1, 1] become [0, 1]; absent ones stay zero."""
    objects = jnp.asarray(objects)
    position = (objects[..., layout.position] + 1) / 2
    moved = objects.at[..., layout.position].set(position)
    return jnp.where(objects[..., layout.presence, None] > PRESENCE_THRESHOLD, moved, objects)


def to_clevr_layout(
    prediction: Float[Array, "*batch d"], *, layout: ObjectLayout = CLEVR_LAYOUT
) -> Float[Array, "*batch d"]:
    """Predicted sets in the layout of data and metrics: positions [0, 1] become [-1, 1]."""
    return prediction.at[..., layout.position].multiply(2).at[..., layout.position].add(-1)


def slot_loss(
    prediction: Float[AnyArray, "batch n d"],
    target: Float[AnyArray, "batch n d"],
    *,
    position_weight: float = 1.0,
    method: Method = "auto",
    layout: ObjectLayout = CLEVR_LAYOUT,
) -> Float[Array, " batch"]:
    """Huber distance (δ = 1, mean over d) of the best matching, summed over the matched pairs.

    Args:
        prediction: as `SlotAttentionPredictor` gives it.
        target: as `from_clevr_layout` gives it.
        position_weight: factor on the position's share, in the matching as well; above 1 in the
            variants * and † of the iDSPN paper's table.
        method: solver of the assignment problem, see `assign`.
        layout: which features are the position.
    """
    if prediction.shape != target.shape or prediction.ndim != 3:
        raise ValueError(
            "prediction and target: expected the same shape [batch, n, d], got "
            f"{prediction.shape} and {target.shape}"
        )
    _check.require_positive("position_weight", position_weight)
    weights = jnp.ones(prediction.shape[-1]).at[layout.position].set(position_weight)
    cost = jnp.mean(weights * smooth_l1(prediction[:, :, None] - target[:, None]), axis=-1)
    assignment = assign(jax.lax.stop_gradient(cost), method=method)
    return matched_cost(cost, assignment)
