"""The autoencoder of a configuration."""

from __future__ import annotations

from msdspn_jax.models.set_predictor import SetPredictor, set_autoencoder
from msdspn_jax.tasks.autoencoding.config import AutoencoderConfig


def autoencoder(config: AutoencoderConfig, set_size: int, set_dim: int) -> SetPredictor:
    """From sets [batch, n, d] to sets of the same shape."""
    return set_autoencoder(
        set_size=set_size,
        set_dim=set_dim,
        hidden_dim=config.hidden_dim,
        latent_dim=config.latent_dim,
        inner=config.resolved_inner(),
    )
