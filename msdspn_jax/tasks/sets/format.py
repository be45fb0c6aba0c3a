"""What the arrays of a data set look like: all that a model must know of its data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["images", "vectors", "sets"]


@dataclass(frozen=True, kw_only=True)
class Format:
    """Shapes and scaling of a data set, found when a run begins and kept in its config.json.

    So a model is built, and predicts, without the data that it was trained on. Numbers are tuples:
    they are fields of a configuration.
    """

    kind: Kind | None = None
    """What the inputs are; None: the data has not been looked at yet."""
    input_shape: tuple[int, ...] = ()
    """Of one input as the network takes it: (side, side, 3), (k,) or (m, k)."""
    set_size: int = 0
    """n, the elements of a predicted set."""
    names: tuple[str, ...] = ()
    """Of the d features of an element."""
    presence: bool = False
    """Whether sets vary in size: elements then have one more feature, 1 where there is one."""
    shift: tuple[float, ...] = ()
    """Subtracted from the targets' features, which are then divided by their scale."""
    scale: tuple[float, ...] = ()
    """See ``shift``."""
    input_shift: tuple[float, ...] = ()
    """The same of the features of inputs that are vectors or sets."""
    input_scale: tuple[float, ...] = ()
    """See ``input_shift``."""
    fingerprint: str = ""
    """Of the data that all this was found of; empty: not known."""

    def __post_init__(self) -> None:
        axes = {None: 0, "images": 3, "vectors": 1, "sets": 2}
        if self.kind not in axes:
            raise ValueError(f"kind: expected images, vectors or sets, got {self.kind!r}")
        if len(self.input_shape) != axes[self.kind] or not all(n >= 1 for n in self.input_shape):
            raise ValueError(
                f"input_shape: expected {axes[self.kind]} positive numbers for {self.kind}, got"
                f" {self.input_shape}"
            )
        features = self.input_shape[-1:] if self.kind in ("vectors", "sets") else (0,)
        for name, size in {
            "shift": self.set_dim,
            "scale": self.set_dim,
            "input_shift": sum(features),
            "input_scale": sum(features),
        }.items():
            values = getattr(self, name)
            if len(values) != size:
                raise ValueError(f"{name}: expected {size} numbers, got {len(values)}")
            least = 0 if name.endswith("scale") else -float("inf")
            if not all(least < x < float("inf") for x in values):
                raise ValueError(f"{name}: expected finite numbers > {least}, got {values}")
        if self.kind is not None and not (self.set_size >= 1 and self.names):
            raise ValueError(
                "set_size, names: expected at least one element of at least one feature, got"
                f" {self.set_size} and {self.names}"
            )

    @property
    def set_dim(self) -> int:
        """d, the features of an element, without presence."""
        return len(self.names)

    @property
    def width(self) -> int:
        """The features of an element as the network has it."""
        return self.set_dim + self.presence
