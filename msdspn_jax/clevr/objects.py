"""CLEVR's objects: their names, their array layout, their JSON form and the camera that sees them.

One element of a set is a vector of 19 features (iDSPN paper, section 4.3): position / 3, then
one-hot material, color, shape and size, then presence. Absent objects are all zero. Positions are
in CLEVR units (Blender's), z up, the ground at z = 0; image coordinates are in pixels, y down.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from msdspn_jax.errors import UserError
from msdspn_jax.metrics import CLEVR_LAYOUT

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

LAYOUT = CLEVR_LAYOUT
#: Where each group of features sits, for example ``objects[..., SLICES["color"]]``.
SLICES: Mapping[str, slice] = {
    "position": LAYOUT.position,
    **LAYOUT.attributes,
    "presence": slice(LAYOUT.presence, LAYOUT.presence + 1),
}
NUM_FEATURES = LAYOUT.num_features
MAX_OBJECTS = 10
POSITION_SCALE = LAYOUT.position_scale
#: A predicted element counts as an object where its presence is above this.
PRESENCE_THRESHOLD = 0.5

#: Size of a published image: (width, height).
IMAGE_SIZE = (480, 320)


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
    """Presence: how sure a model is that the object is there."""
    rotation: float | None = None
    """About the vertical axis, as the generator writes it; not part of the array."""
    pixel_coords: tuple[float, float, float] | None = None
    """Centre in the image (x, y) and its depth, as the generator writes them; not in the array."""

    def __post_init__(self):
        """Refuse a name that CLEVR does not have."""
        for attribute, values in ATTRIBUTES.items():
            if getattr(self, attribute) not in values:
                raise ValueError(_unknown(attribute, getattr(self, attribute)))

    @property
    def words(self) -> str:
        """For example ``"large red metal cube"``."""
        return f"{self.size} {self.color} {self.material} {self.shape}"

    def __str__(self) -> str:
        x, y, z = self.position
        return f"{self.words} at ({x:.2f}, {y:.2f}, {z:.2f})"


def encode_features(
    position: Float[Array | np.ndarray, "*batch 3"],
    material: Int[Array | np.ndarray, "*batch"],
    color: Int[Array | np.ndarray, "*batch"],
    shape: Int[Array | np.ndarray, "*batch"],
    size: Int[Array | np.ndarray, "*batch"],
    present: Bool[Array | np.ndarray, "*batch"],
) -> Float[Array | np.ndarray, "*batch 19"]:
    """Encode objects given as positions in CLEVR units and indices into the lists of names.

    The one place where the 19 features are put together. Works on JAX arrays (under jit as well)
    and on NumPy arrays; float32 out. Where ``present`` is false the element is all zero.
    """
    xp = jnp if isinstance(position, jax.Array) else np
    groups: dict[str, Any] = {
        "position": (position / POSITION_SCALE).astype(xp.float32),
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
        raise ValueError(f"objects must be at most {MAX_OBJECTS}, got {len(objects)}")
    position = np.array([o.position for o in objects], np.float64).reshape(len(objects), 3)
    if not np.isfinite(position).all():
        raise ValueError(f"objects must have finite positions, got {position.tolist()}")
    indices = {
        attribute: np.array([values.index(getattr(o, attribute)) for o in objects], np.int32)
        for attribute, values in ATTRIBUTES.items()
    }
    everyone = np.ones(len(objects), bool)
    features = np.asarray(encode_features(position, **indices, present=everyone))
    features[:, LAYOUT.presence] = [o.score for o in objects]
    return np.pad(features, ((0, MAX_OBJECTS - len(objects)), (0, 0)))


def decode(
    objects: Float[Array | np.ndarray, "n 19"],
    *,
    threshold: float = PRESENCE_THRESHOLD,
) -> list[ClevrObject]:
    """Read one set: its elements with presence above ``threshold``, attributes by argmax, in order.

    Raises:
      ValueError: a shape other than [n, 19], or a value that is not finite.
    """
    array = np.asarray(objects, np.float32)
    if array.ndim != 2 or array.shape[1] != NUM_FEATURES:
        raise ValueError(f"objects must have shape [n, {NUM_FEATURES}], got {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError("objects must be finite, got a NaN or an infinity")
    present = array[array[:, LAYOUT.presence] > threshold]
    # 3 times a float32 is exact in float64, which is what lets `encode` find the float32 again.
    positions = present[:, LAYOUT.position].astype(np.float64) * POSITION_SCALE
    return [
        ClevrObject(
            **{name: values[row[SLICES[name]].argmax()] for name, values in ATTRIBUTES.items()},
            position=tuple(position.tolist()),
            score=float(row[LAYOUT.presence]),
        )
        for row, position in zip(present, positions, strict=True)
    ]


# JSON: the generator's scenes format ------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ClevrScene:
    """One entry of a scenes file."""

    image_filename: str
    objects: tuple[ClevrObject, ...]
    image_index: int | None = None
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Everything else of the entry, untouched: camera, lights, directions, split, …"""


def parse_scene(entry: Any, where: str = "scene") -> ClevrScene:
    """Read one entry of a scenes file, checking everything that is read.

    Args:
      entry: what ``json.load`` made of it.
      where: file and entry, for messages: ``"CLEVR_val_scenes.json: scenes[3]"``.

    Raises:
      UserError: names file, entry and field, says what was expected and what came.
    """
    entry = _expect(entry, dict, where, "an object")
    image_filename = _field(entry, "image_filename", str, where, "a string")
    if not image_filename or image_filename != image_filename.replace("\\", "/").split("/")[-1]:
        raise UserError(
            f"{where}.image_filename: expected a file name, got {_shorten(image_filename)}"
        )
    image_index = None
    if "image_index" in entry:
        image_index = _expect(entry["image_index"], int, f"{where}.image_index", "a whole number")
    objects = _field(entry, "objects", list, where, "a list")
    if len(objects) > MAX_OBJECTS:
        raise UserError(
            f"{where}.objects: expected at most {MAX_OBJECTS} objects, got {len(objects)}"
        )
    parsed = tuple(_parse_object(o, f"{where}.objects[{i}]") for i, o in enumerate(objects))
    known = ("image_filename", "image_index", "objects")
    extra = {key: value for key, value in entry.items() if key not in known}
    return ClevrScene(image_filename, parsed, image_index, extra)


def scene_to_json(scene: ClevrScene) -> dict[str, Any]:
    """The entry of a scenes file that `parse_scene` reads back as an equal scene."""
    entry: dict[str, Any] = {"image_filename": scene.image_filename}
    if scene.image_index is not None:
        entry["image_index"] = scene.image_index
    entry["objects"] = [_object_to_json(o) for o in scene.objects]
    return {**scene.extra, **entry}


def _object_to_json(o: ClevrObject) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "shape": o.shape,
        "size": o.size,
        "material": o.material,
        "color": o.color,
        "3d_coords": list(o.position),
    }
    if o.rotation is not None:
        entry["rotation"] = o.rotation
    if o.pixel_coords is not None:
        entry["pixel_coords"] = list(o.pixel_coords)
    if o.score != 1.0:
        entry["score"] = o.score
    return entry


def _parse_object(entry: Any, where: str) -> ClevrObject:
    entry = _expect(entry, dict, where, "an object")
    names = {}
    for attribute, values in ATTRIBUTES.items():
        name = _field(entry, attribute, str, where, "a string")
        if name not in values:
            raise UserError(f"{where}.{_unknown(attribute, name)}")
        names[attribute] = name
    coords = _numbers(_field(entry, "3d_coords", list, where, "a list"), f"{where}.3d_coords")
    # The generator's own precision, and TFDS's: both ways of reading give the same bits.
    x, y, z = np.array(coords, np.float32).tolist()
    pixels = rotation = None
    if "pixel_coords" in entry:
        path = f"{where}.pixel_coords"
        pixels = _numbers(_expect(entry["pixel_coords"], list, path, "a list"), path)
    if "rotation" in entry:
        rotation = _number(entry["rotation"], f"{where}.rotation")
    score = _number(entry.get("score", 1.0), f"{where}.score")
    return ClevrObject(
        **names, position=(x, y, z), score=score, rotation=rotation, pixel_coords=pixels
    )


def _field(entry: dict, key: str, kind: type, where: str, expected: str) -> Any:
    if key not in entry:
        raise UserError(f"{where}.{key}: expected {expected}, but it is missing")
    return _expect(entry[key], kind, f"{where}.{key}", expected)


def _expect(value: Any, kind: type, where: str, expected: str) -> Any:
    # In Python, True is an int.
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise UserError(f"{where}: expected {expected}, got {_shorten(value)}")
    return value


def _numbers(values: list, where: str) -> tuple[float, float, float]:
    if len(values) != 3:
        raise UserError(f"{where}: expected 3 numbers, got {_shorten(values)}")
    x, y, z = (_number(value, where) for value in values)
    return x, y, z


def _number(value: Any, where: str) -> float:
    largest = float(np.finfo(np.float32).max)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= largest:
        raise UserError(f"{where}: expected a finite number, got {_shorten(value)}")
    return float(value)


def _unknown(attribute: str, name: Any) -> str:
    known = ", ".join(ATTRIBUTES[attribute])
    return f"{attribute}: unknown {attribute} {_shorten(name)}; expected one of {known}"


def _shorten(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."


# Camera -----------------------------------------------------------------------------------------

#: Where the generator puts the camera before it jitters it by up to ±0.5 along each axis.
MEAN_CAMERA_LOCATION = (7.481131553649902, -6.5076398849487305, 5.34366512298584)


@dataclasses.dataclass(frozen=True)
class Camera:
    """A pinhole camera that looks along its −z axis, with y up."""

    matrix_world: Float[np.ndarray, "4 4"]
    """From camera to world coordinates."""
    focal_length: float = 35.0 / 32.0
    """In image widths (CLEVR: a 35 mm lens on a sensor 32 mm wide)."""
    aspect: float = IMAGE_SIZE[0] / IMAGE_SIZE[1]
    """Width / height of the image before it is squashed to a square."""


def look_at_origin(location: Sequence[float] = MEAN_CAMERA_LOCATION) -> Camera:
    """CLEVR's camera at ``location`` (x, y, z), aimed at the origin, level."""
    z = np.asarray(location, np.float64)
    z = z / np.linalg.norm(z)
    x = np.cross([0.0, 0.0, 1.0], z)
    x = x / np.linalg.norm(x)
    matrix = np.eye(4)
    matrix[:3] = np.stack([x, np.cross(z, x), z, np.asarray(location, np.float64)], axis=1)
    return Camera(matrix)


def scene_camera(scene: ClevrScene, where: str = "scene") -> Camera | None:
    """The camera that a scenes file recorded for the scene, or None.

    Raises:
      UserError: a camera is there but its ``matrix_world`` is not a 4x4 list of finite numbers.
    """
    entry = scene.extra.get("camera")
    if entry is None:
        return None
    rows = _field(_expect(entry, dict, f"{where}.camera", "an object"), "matrix_world", list,
                  f"{where}.camera", "a 4x4 list of numbers")  # fmt: skip
    path = f"{where}.camera.matrix_world"
    if len(rows) != 4 or not all(isinstance(row, list) and len(row) == 4 for row in rows):
        raise UserError(f"{path}: expected a 4x4 list of numbers, got {_shorten(rows)}")
    matrix = np.array([[_number(value, path) for value in row] for row in rows])
    if abs(np.linalg.det(matrix)) < 1e-9:
        raise UserError(f"{path}: expected an invertible matrix, got {_shorten(rows)}")
    lens = _number(entry.get("lens_mm", 35.0), f"{where}.camera.lens_mm")
    sensor = _number(entry.get("sensor_width_mm", 32.0), f"{where}.camera.sensor_width_mm")
    width = _number(entry.get("width", IMAGE_SIZE[0]), f"{where}.camera.width")
    height = _number(entry.get("height", IMAGE_SIZE[1]), f"{where}.camera.height")
    if min(lens, sensor, width, height) <= 0:
        raise UserError(f"{where}.camera: expected positive lens, sensor, width and height")
    return Camera(matrix, lens / sensor, width / height)


def project(
    camera: Camera, positions: Float[np.ndarray, "*batch 3"], width: int, height: int
) -> Float[np.ndarray, "*batch 2"]:
    """Pixel coordinates (x right, y down) of world positions, in an image of any size.

    The image shows what the camera's own frame shows, squashed to ``width`` x ``height``. NaN for
    positions behind the camera.
    """
    positions = np.asarray(positions, np.float64)
    to_camera = np.linalg.inv(camera.matrix_world)
    x, y, z = np.moveaxis(positions @ to_camera[:3, :3].T + to_camera[:3, 3], -1, 0)
    depth = np.where(z < 0, -z, math.nan)
    u = width * (0.5 + camera.focal_length * x / depth)
    v = height * (0.5 - camera.focal_length * camera.aspect * y / depth)
    return np.stack([u, v], axis=-1)
