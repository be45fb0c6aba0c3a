"""CLEVR's objects: their names, their array layout, and scenes as lists of them.

One element of a set is a vector of 19 features (iDSPN paper, section 4.3): position / 3, then
one-hot material, color, shape and size, then presence. Absent objects are all zero. Positions are
in CLEVR units (Blender's), z up, the ground at z = 0.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from msdspn_jax import _check
from msdspn_jax._check import AnyArray

MATERIALS = ("rubber", "metal")
COLORS = ("cyan", "blue", "yellow", "purple", "red", "green", "gray", "brown")
SHAPES = ("sphere", "cube", "cylinder")
SIZES = ("large", "small")

#: Attribute name -> its values, in the order of the one-hot features.
ATTRIBUTES: Mapping[str, tuple[str, ...]] = {
    "material": MATERIALS,
    "color": COLORS,
    "shape": SHAPES,
    "size": SIZES,
}
#: sRGB values of the generator, in the order of `COLORS`.
COLOR_RGB = (
    (41, 208, 208),
    (42, 75, 215),
    (255, 238, 51),
    (129, 38, 192),
    (173, 35, 35),
    (29, 105, 20),
    (87, 87, 87),
    (129, 74, 25),
)
#: Half extent of an object in CLEVR units, in the order of `SIZES`; its centre's height as well.
SIZE_RADIUS = (0.7, 0.35)

MAX_OBJECTS = 10
#: An element counts as an object where its presence is above this.
PRESENCE_THRESHOLD = 0.5


@dataclasses.dataclass(frozen=True)
class ObjectLayout:
    """Which features of an element are its position, its one-hot attributes and its presence."""

    position: slice
    attributes: Mapping[str, slice]
    presence: int
    """The last feature."""
    position_scale: float
    """Units per feature: a distance between positions is multiplied by it."""

    @property
    def num_features(self) -> int:
        """Length of one element's vector."""
        return self.presence + 1


#: The 19 features of a CLEVR object, positions in thirds of CLEVR units.
CLEVR_LAYOUT = ObjectLayout(
    position=slice(0, 3),
    attributes=MappingProxyType(
        {
            "material": slice(3, 5),
            "color": slice(5, 13),
            "shape": slice(13, 16),
            "size": slice(16, 18),
        }
    ),
    presence=18,
    position_scale=3.0,
)
NUM_FEATURES = CLEVR_LAYOUT.num_features
#: Where each group of features sits, for example ``objects[..., SLICES["color"]]``.
SLICES: Mapping[str, slice] = {
    "position": CLEVR_LAYOUT.position,
    **CLEVR_LAYOUT.attributes,
    "presence": slice(CLEVR_LAYOUT.presence, NUM_FEATURES),
}


@dataclasses.dataclass(frozen=True)
class ClevrObject:
    """One object, in words and CLEVR units."""

    shape: str
    size: str
    material: str
    color: str
    position: tuple[float, float, float]
    """Centre (x, y, z)."""
    score: float = 1.0
    """The presence that a model gave it. Models are trained to give 1 to what is there and 0 to
    what is not; it ranks objects, is no probability, and may lie outside of 0 to 1."""
    rotation: float | None = None
    """About the vertical axis, as the generator writes it; not part of the array."""
    pixel_coords: tuple[float, float, float] | None = None
    """Centre in the image (x, y) and its depth, as the generator writes them; not in the array."""

    def __post_init__(self):
        """Refuse a name that CLEVR does not have."""
        for attribute, values in ATTRIBUTES.items():
            _check.require_choice(attribute, getattr(self, attribute), values)

    @property
    def words(self) -> str:
        """For example ``"large red metal cube"``."""
        return f"{self.size} {self.color} {self.material} {self.shape}"

    def __str__(self) -> str:
        x, y, z = self.position
        return f"{self.words} at ({x:.2f}, {y:.2f}, {z:.2f})"


@dataclasses.dataclass(frozen=True)
class ClevrScene:
    """One entry of a scenes file."""

    image_filename: str
    objects: tuple[ClevrObject, ...]
    image_index: int | None = None
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Everything else of the entry, untouched: camera, lights, directions, split, …"""


def encode_features(
    position: Float[AnyArray, "*batch 3"],
    material: Int[AnyArray, "*batch"],
    color: Int[AnyArray, "*batch"],
    shape: Int[AnyArray, "*batch"],
    size: Int[AnyArray, "*batch"],
    present: Bool[AnyArray, "*batch"],
) -> Float[AnyArray, "*batch 19"]:
    """Encode objects given as positions in CLEVR units and indices into the lists of names.

    The one place where the 19 features are put together. Works on JAX arrays (under jit as well)
    and on NumPy arrays; float32 out. Where ``present`` is false the element is all zero.
    """
    xp = jnp if isinstance(position, jax.Array) else np
    groups: dict[str, Any] = {
        "position": (position / CLEVR_LAYOUT.position_scale).astype(xp.float32),
        "presence": xp.ones((*np.shape(position)[:-1], 1), xp.float32),
    }
    indices = {"material": material, "color": color, "shape": shape, "size": size}
    for attribute, index in indices.items():
        classes = xp.arange(len(ATTRIBUTES[attribute]))
        groups[attribute] = (xp.asarray(index)[..., None] == classes).astype(xp.float32)
    features = xp.concatenate([groups[name] for name in SLICES], axis=-1)
    return xp.where(xp.asarray(present)[..., None], features, xp.float32(0))


def encode(objects: Sequence[ClevrObject]) -> Float[np.ndarray, "10 19"]:
    """Encode at most 10 objects, in their order, padded with zeros.

    ``encode(decode(array))`` is ``array``, bit for bit. The other way round, names are exact, and
    positions to float32 rounding (2e-7 units). Rotation and pixel coordinates are left behind.

    Raises:
        ValueError: more than 10 objects, or a position that is not finite.
    """
    if len(objects) > MAX_OBJECTS:
        raise ValueError(f"objects: expected at most {MAX_OBJECTS}, got {len(objects)}")
    position = np.array([o.position for o in objects], np.float64).reshape(len(objects), 3)
    if not np.isfinite(position).all():
        raise ValueError(f"objects: expected finite positions, got {position.tolist()}")
    indices = {
        attribute: np.array([values.index(getattr(o, attribute)) for o in objects], np.int32)
        for attribute, values in ATTRIBUTES.items()
    }
    everyone = np.ones(len(objects), bool)
    features = np.asarray(encode_features(position, **indices, present=everyone))
    features[:, CLEVR_LAYOUT.presence] = [o.score for o in objects]
    return np.pad(features, ((0, MAX_OBJECTS - len(objects)), (0, 0)))


def decode(
    objects: Float[AnyArray, "n 19"],
    *,
    threshold: float = PRESENCE_THRESHOLD,
) -> list[ClevrObject]:
    """Read one set: its elements with presence above ``threshold``, attributes by argmax, in order.

    Raises:
        ValueError: a shape other than [n, 19], or a value that is not finite.
    """
    array = np.asarray(objects, np.float32)
    if array.ndim != 2 or array.shape[1] != NUM_FEATURES:
        raise ValueError(f"objects: expected shape [n, {NUM_FEATURES}], got {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError("objects: expected finite values, got a NaN or an infinity")
    present = array[array[:, CLEVR_LAYOUT.presence] > threshold]
    # 3 times a float32 is exact in float64, which is what lets `encode` find the float32 again.
    positions = present[:, CLEVR_LAYOUT.position].astype(np.float64) * CLEVR_LAYOUT.position_scale
    return [
        ClevrObject(
            **{name: values[row[SLICES[name]].argmax()] for name, values in ATTRIBUTES.items()},
            position=tuple(position.tolist()),
            score=float(row[CLEVR_LAYOUT.presence]),
        )
        for row, position in zip(present, positions, strict=True)
    ]
