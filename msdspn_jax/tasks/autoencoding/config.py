"""The flags that the two autoencoding tasks share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from msdspn_jax.tasks.config import TaskConfig
from msdspn_jax.training.config import require_at_least


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig(TaskConfig):
    """Flags of a set autoencoder."""

    model: Literal["idspn", "dspn"] = "idspn"
    """idspn: differentiate at the minimum (implicitly); dspn: through all inner steps."""
    hidden_dim: int = 512
    """Width of the set encoders' hidden layer."""
    latent_dim: int = 512
    """Width of the latent vector."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(1, self, "hidden_dim", "latent_dim")
