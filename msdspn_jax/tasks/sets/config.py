"""The flags of ``msdspn train sets``: a model for data of one's own."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal, TypeVar

import tyro

from msdspn_jax.errors import UserError
from msdspn_jax.models.set_predictor import INITIAL_SETS
from msdspn_jax.tasks.config import TaskConfig
from msdspn_jax.tasks.sets.coco import is_coco
from msdspn_jax.tasks.sets.data import Data, Scaling, find_format, joined
from msdspn_jax.tasks.sets.format import Format
from msdspn_jax.tasks.sets.source import load
from msdspn_jax.training.config import Outer, Run, RunFlags, require_at_least, require_positive

Self = TypeVar("Self", bound="Config")
_PLACES = tuple(f"{part}{kind}" for kind in ("data", "image_dir") for part in ("", "val_", "test_"))
"""Fields that say where files are."""


@dataclass(frozen=True, kw_only=True)
class Config(TaskConfig):
    """Predict sets of your own: from images, vectors or sets, by the arrays of an .npz file.

    inputs (images uint8 [num, h, w, 3], vectors [num, k] or sets [num, m, k]), targets [num, n, d],
    and, where they are wanted: mask [num, n] (True where an element is there), input_mask [num, m],
    split [num] (train, val, test), names [d] of the features.
    """

    experiment: ClassVar[str] = "sets"
    fixed: ClassVar[tuple[str, ...]] = ("split_seed", "size", "set_size", "scaling", "allow_empty")

    steps: int = 5_000
    """Training steps (one step: one batch)."""
    batch_size: int = 64
    """Examples a step, over all devices together."""
    run: RunFlags = Run(evaluate_every=500)  # noqa: RUF009 (a value)
    """What is written while training, and how often; never changes the numbers."""
    model: Literal["idspn", "dspn"] = "idspn"
    """idspn: differentiate at the minimum (implicitly); dspn: through all inner steps."""

    data: str | None = None
    """The data: an .npz file, a folder of .npy files, or a .json file in COCO's format."""
    image_dir: str | None = None
    """With a .json file: the folder of its images. Default: images/ beside it, or its own."""
    val_data: str | None = None
    """Data for validation, where it is a file of its own. Default: a part of --data."""
    test_data: str | None = None
    """Data for the test, with --val-data. Default: none then."""
    val_image_dir: str | None = None
    """With a .json file as --val-data: the folder of its images."""
    test_image_dir: str | None = None
    """With a .json file as --test-data: the folder of its images."""
    data_on: Literal["device", "host"] = "device"
    """Where the training set waits: on the accelerator, or in the host's memory, from which every
    batch is copied."""
    split_seed: int = 0
    """Without an array split or --val-data: which tenth is for validation, and which for the
    test."""
    allow_empty: bool = False
    """Sets without any element are meant."""
    size: int | None = None
    """Side to which images are squashed, a multiple of 64. Default: 64, or 128 for larger ones."""
    set_size: int | None = None
    """Elements of a predicted set. Default: n of the targets."""

    loss: Literal["hungarian", "chamfer"] = "hungarian"
    """Distance between sets: hungarian (one to one) or chamfer (cheap, blind to multiplicity)."""
    feature_weights: tuple[float, ...] | None = None
    """Weights of the features in the loss, in the order of the targets. Default: 1 for all."""
    presence_weight: float = 1.0
    """Weight of the presence in the loss, where sets vary in size."""
    scaling: Scaling = "standard"
    """How features are scaled for the network, by the training data: standard (mean 0, deviation
    1), range (-1 to 1) or none. Predictions are in the units of the data."""

    encoder: Literal["resnet18", "resnet34"] = "resnet18"
    """Encoder of images; that of vectors is an MLP, that of sets a set encoder."""
    encoder_width: int = 32
    """Channels of the image encoder's first stage."""
    encoder_end_norm: bool = True
    """Batch normalisation before the image encoder's end convolution."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the image encoder's arithmetic."""
    hidden_dim: int = 256
    """Hidden width of the energy's set encoder, and of the encoder of vectors and sets."""
    latent_dim: int = 256
    """Width of the latent vector."""
    initial_set: Literal["learned", "random"] = "learned"
    """Where the inner minimisation begins: at one learned set, or at random ones."""
    outer: Outer = Outer(  # noqa: RUF009 (a value)
        optimizer="muon", schedule="cosine", warmup_steps=100
    )
    """What changes the parameters, and how fast. Default: Muon, a short warm-up, then a cosine."""

    form: Annotated[Format, tyro.conf.Suppress] = Format()  # noqa: RUF009 (a value)
    """Shapes and scaling of the data; found when the run begins."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(1, self, "encoder_width", "hidden_dim", "latent_dim")
        require_positive(self, "presence_weight")
        if self.set_size is not None:
            require_at_least(1, self, "set_size")
        if self.test_data is not None and self.val_data is None:
            raise ValueError("test_data: expected val_data with it, got none")
        if self.size is not None and (self.size < 64 or self.size % 64):
            raise ValueError(f"size: expected a multiple of 64, got {self.size}")
        if self.initial_set not in INITIAL_SETS:
            raise ValueError(f"initial_set: expected learned or random, got {self.initial_set!r}")
        weights = self.feature_weights
        if weights is not None and not (
            all(0 <= w < float("inf") for w in weights) and any(weights)
        ):
            raise ValueError(f"feature_weights: expected numbers >= 0, not all 0, got {weights}")
        if weights is not None and self.form.names and len(weights) != self.form.set_dim:
            raise ValueError(
                f"feature_weights: expected {self.form.set_dim} numbers, one for each of"
                f" {', '.join(self.form.names)}, got {len(weights)}"
            )

    def completed(self: Self) -> Self:
        """See `TrainConfig.completed`: with the format of the data, which is read for it.

        Raises:
            UserError: no data, or data that cannot be used.
        """
        if self.data is None:
            raise UserError("--data: expected an .npz file, a folder of .npy files or a .json file")
        # A run is looked at from other folders too.
        places = {
            name: str(Path(value).absolute())
            for name in _PLACES
            if (value := getattr(self, name)) is not None
        }
        config = dataclasses.replace(self, **places)
        if config.form.kind is not None:
            return config
        try:
            form = find_format(
                config.load(), split_seed=self.split_seed, scaling=self.scaling, size=self.size,
                set_size=self.set_size,
            )  # fmt: skip
            # As values: so a run that is resumed takes the default when it is said, too.
            size = form.input_shape[0] if form.kind == "images" else config.size
            return dataclasses.replace(config, form=form, size=size, set_size=form.set_size)
        except ValueError as error:
            raise UserError(f"{self.data}: {error}") from error

    def load(self) -> Data:
        """The data set, as its files have it (`data.Data`).

        Raises:
            UserError: it cannot be read.
            ValueError: its files do not fit together.
        """
        assert self.data is not None
        files = {
            "train": (self.data, self.image_dir),
            "val": (self.val_data, self.val_image_dir),
            "test": (self.test_data, self.test_image_dir),
        }
        parts: dict[str, Data] = {}
        size = self.size
        for name, (path, images) in files.items():
            if path is not None:
                parts[name] = load(path, images=images, size=size, allow_empty=self.allow_empty)
                if is_coco(path):  # All images alike.
                    size = parts[name].inputs.shape[1]
        return joined(parts) if len(parts) > 1 else parts["train"]

    def places(self) -> tuple[str, ...]:
        """See `TrainConfig.places`: of data that is known again."""
        return _PLACES if self.form.fingerprint else ()

    def resolved(self: Self) -> Self:
        """See `TrainConfig.resolved`."""
        return super().resolved().completed()
