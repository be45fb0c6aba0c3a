"""The flags of CLEVR object property prediction (paper, section 4.3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from msdspn_jax.clevr.objects import MAX_OBJECTS
from msdspn_jax.models.resnet import REDUCTION
from msdspn_jax.tasks.config import TaskConfig
from msdspn_jax.training.config import Run, RunFlags, require_at_least, require_positive

PUBLISHED_TRAIN_SIZE = 70_000
_RATES = {"slot-attention": 4e-4, "slot-mlp": 4e-4}
_SLOTS = ("slot_dim", "slot_iterations", "warmup_steps")
_ENCODER = (
    "encoder",
    "encoder_width",
    "encoder_stride",
    "encoder_end_norm",
    "compute_dtype",
    "latent_dim",
)


@dataclass(frozen=True, kw_only=True)
class Config(TaskConfig):
    """Predict the objects of CLEVR images: position, material, color, shape and size of each.

    The defaults are the published settings of iDSPN at 128 x 128 (54,700 steps are 100 epochs).
    --data procedural needs no download: scenes are drawn and rendered by this library.
    """

    experiment: ClassVar[str] = "clevr"
    unread: ClassVar[dict[str, tuple[str, ...]]] = {
        "idspn": _SLOTS,
        "dspn": _SLOTS,
        "slot-attention": (*_ENCODER, "hidden_dim", "rate_drop"),
        "slot-mlp": (*_ENCODER, "slot_iterations", "rate_drop"),
    }

    steps: int = 54_700
    """Training steps (one step: one batch)."""
    learning_rate: float | None = None
    """Adam's learning rate. Default: as published, 1e-3; 4e-4 for slot-attention and slot-mlp."""
    run: RunFlags = Run(evaluate_every=2_000)  # noqa: RUF009 (a value)
    """What is written while training, and how often; never changes the numbers."""
    model: Literal["idspn", "dspn", "slot-attention", "slot-mlp"] = "idspn"
    """Which model to train."""

    data: Literal["procedural", "folder", "tfds"] = "procedural"
    """procedural: rendered here; folder: an extracted CLEVR_v1.0; tfds: TensorFlow Datasets."""
    data_dir: str | None = None
    """Where the data of folder and tfds lies, or a cache that `msdspn data clevr` made of it."""
    cache_dir: str | None = None
    """Where resized or rendered images are kept between runs. Default: the user's cache folder."""
    images_on: Literal["device", "host"] = "device"
    """Where a fixed training set waits: on the accelerator (128 x 128: 49 kB an image), or in the
    host's memory, from which every batch is copied."""
    train_size: int | None = None
    """Training images. Default: as published, all of folder and tfds, 70,000 procedural ones."""
    fresh: bool = False
    """Draw and render new procedural scenes at every step instead of a fixed training set."""
    val_size: int = 1_000
    """Validation images (of folder and tfds: the last ones of the training split)."""
    test_size: int = 15_000
    """Test images (of folder and tfds: the first ones of the published validation split)."""
    data_seed: int = 0
    """Which procedural scenes make the fixed sets."""
    render_quality: Literal["fast", "default", "high"] = "default"
    """Rays a pixel of procedural scenes: 1, 4 or 16."""
    size: int = 128
    """Side of the images, pixels."""
    set_size: int = MAX_OBJECTS
    """Elements of a predicted set: at least max_objects."""
    min_objects: int = 3
    """Fewest objects of a procedural scene."""
    max_objects: int = MAX_OBJECTS
    """Most objects of a procedural scene."""

    encoder: Literal["resnet18", "resnet34"] = "resnet18"
    """Image encoder of idspn and dspn."""
    encoder_width: int = 64
    """Channels of its first stage."""
    encoder_stride: Literal[1, 2] = 1
    """Stride of its first stage. Published: 1. With 2, the rest of it costs what it costs for
    images of half the side."""
    encoder_end_norm: bool = True
    """Batch normalisation before its end convolution, as published."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the image encoder's arithmetic; parameters, statistics and the inner loop stay
    in float32."""
    latent_dim: int = 512
    """Width of the latent vector."""
    hidden_dim: int = 512
    """Hidden width of the energy's set encoder."""
    rate_drop: float = 0.9
    """After this share of the steps the learning rate is a tenth (idspn, dspn)."""

    position_weight: float = 1.0
    """Weight of the position in the loss, beside the other features (slot models: more are the
    variants *, †)."""

    slot_dim: int = 64
    """Width of features and slots of slot-attention and slot-mlp."""
    slot_iterations: int = 3
    """Rounds of attention of slot-attention."""
    warmup_steps: int = 1_000
    """Steps over which the learning rate of slot-attention and slot-mlp rises."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(1, self, "val_size", "test_size", "size", "set_size", "encoder_width")
        require_at_least(1, self, "latent_dim", "hidden_dim", "slot_dim", "slot_iterations")
        require_positive(self, "position_weight")
        reduction = REDUCTION * self.encoder_stride
        if self.minimises and self.size % reduction:
            raise ValueError(
                f"size: expected a multiple of {reduction} (encoder_stride is"
                f" {self.encoder_stride}), got {self.size}"
            )
        if not 0 < self.rate_drop <= 1:
            raise ValueError(f"rate_drop: expected a number in (0, 1], got {self.rate_drop}")
        self._check_data()

    def _check_data(self) -> None:
        procedural = self.data == "procedural"
        if self.fresh and not procedural:
            raise ValueError(f"fresh: expected data procedural, got {self.data!r}")
        if self.train_size is not None:
            require_at_least(1, self, "train_size")
            if self.fresh:
                raise ValueError(f"train_size: expected none with fresh, got {self.train_size}")
        if not procedural and self.data_dir is None:
            raise ValueError(f"data_dir: expected where the data of {self.data!r} lies, got None")
        if not 1 <= self.min_objects <= self.max_objects <= MAX_OBJECTS:
            raise ValueError(
                "min_objects, max_objects: expected 1 <= min_objects <= max_objects <= "
                f"{MAX_OBJECTS}, got {self.min_objects} and {self.max_objects}"
            )
        needed = self.max_objects if procedural else MAX_OBJECTS
        if not needed <= self.set_size <= MAX_OBJECTS:
            raise ValueError(
                f"set_size: expected at least {needed}, the most objects of an image, and at most"
                f" {MAX_OBJECTS}, got {self.set_size}"
            )

    def idle(self) -> dict[str, str]:
        """See `TaskConfig.idle`."""
        drawn = ("min_objects", "max_objects", "render_quality", "data_seed")
        procedural = self.data == "procedural"
        unused = ("data_dir",) if procedural else drawn
        found: dict[str, str] = dict.fromkeys(unused, f"--data {self.data}")
        if self.outer.schedule != "published":
            found["rate_drop"] = f"--outer.schedule {self.outer.schedule}"
        return found

    def published_learning_rate(self) -> float:
        """See `TrainConfig.published_learning_rate`."""
        return _RATES.get(self.model) or super().published_learning_rate()

    def render_options(self) -> dict:
        """What `procedural_examples` asks about the scenes."""
        return {
            "quality": self.render_quality,
            "num_objects": (self.min_objects, self.max_objects),
        }
