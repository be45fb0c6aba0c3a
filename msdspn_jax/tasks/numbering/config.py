"""The flags of class-specific numbering (paper, section 4.1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from msdspn_jax.tasks.config import TaskConfig
from msdspn_jax.tasks.numbering.data import check_sizes
from msdspn_jax.training.config import require_at_least

ModelName = Literal[
    "idspn",
    "dspn",
    "deep-sets",
    "transformer",
    "transformer-pe",
    "transformer-random-pe",
    "bilstm",
]
MODELS: tuple[str, ...] = get_args(ModelName)


@dataclass(frozen=True, kw_only=True)
class Config(TaskConfig):
    """Number the elements of a multiset within their classes: [a, b, b, a] to [a0, b0, b1, a1]."""

    experiment: ClassVar[str] = "numbering"
    unread: ClassVar[dict[str, tuple[str, ...]]] = {
        "idspn": ("width",),
        "dspn": ("width",),
        "deep-sets": ("width", "latent_dim"),
        "transformer": ("hidden_dim", "latent_dim"),
        "transformer-pe": ("hidden_dim", "latent_dim"),
        "transformer-random-pe": ("hidden_dim", "latent_dim"),
        "bilstm": ("hidden_dim", "latent_dim"),
    }

    steps: int = 50_000
    """Training steps (one step: one batch)."""
    model: ModelName = "idspn"
    """Which of the seven models to train."""
    train_size: int = 640
    """Samples in the fixed training set. Published: 640, 6400, 64000."""
    fresh: bool = False
    """Draw new training samples at every step instead of a fixed set."""
    augment: bool = False
    """Permute every sample anew each time it is drawn (published for bilstm, transformer-pe)."""
    set_size: int = 64
    """Elements in a multiset; the numbers are one-hot in as many dimensions."""
    num_classes: int = 4
    """Classes there are."""
    classes_per_set: int | None = None
    """Draw that many of the classes for a multiset, then its elements from among them."""
    val_size: int = 6_400
    """Validation samples; they pick the checkpoint by macro accuracy."""
    test_size: int = 64_000
    """Test samples."""

    hidden_dim: int = 256
    """Hidden width of dspn, idspn, deep-sets."""
    latent_dim: int = 256
    """Width of the latent vector of dspn, idspn."""
    width: int = 64
    """Width of the transformers (feed-forward part: twice that) and the cells of bilstm."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sizes(**self.sizes())
        require_at_least(1, self, "train_size", "val_size", "test_size")
        require_at_least(1, self, "hidden_dim", "latent_dim", "width")

    def sizes(self) -> dict[str, Any]:
        """What `draw_batch` asks about the multisets."""
        return {
            "n": self.set_size,
            "num_classes": self.num_classes,
            "classes_per_set": self.classes_per_set,
        }
