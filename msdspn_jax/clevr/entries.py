"""Entries of a CLEVR scenes file: the generator's JSON, read with every field checked, and written.

What is wrong is a `UserError` that names file, entry and field, and says what was expected.
"""

import json
from typing import Any

import numpy as np

from msdspn_jax.clevr.camera import (
    IMAGE_HEIGHT,
    IMAGE_WIDTH,
    LENS_MM,
    SENSOR_WIDTH_MM,
    Camera,
)
from msdspn_jax.clevr.objects import ATTRIBUTES, MAX_OBJECTS, ClevrObject, ClevrScene
from msdspn_jax.errors import UserError


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
    if not _is_file_name(image_filename):
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


def scene_camera(scene: ClevrScene, where: str = "scene") -> Camera | None:
    """The camera that a scenes file recorded for the scene, or None.

    Raises:
        UserError: a camera is there but its ``matrix_world`` is not a 4x4 list of finite numbers.
    """
    entry = scene.extra.get("camera")
    if entry is None:
        return None
    where = f"{where}.camera"
    entry = _expect(entry, dict, where, "an object")
    rows = _field(entry, "matrix_world", list, where, "a 4x4 list of numbers")
    path = f"{where}.matrix_world"
    if len(rows) != 4 or not all(isinstance(row, list) and len(row) == 4 for row in rows):
        raise UserError(f"{path}: expected a 4x4 list of numbers, got {_shorten(rows)}")
    matrix = np.array([[_number(value, path) for value in row] for row in rows])
    if np.abs(matrix).max() > 1e6 or abs(np.linalg.det(matrix)) < 1e-9:
        raise UserError(
            f"{path}: expected an invertible matrix of numbers up to 1e6, got {_shorten(rows)}"
        )
    published = {
        "lens_mm": LENS_MM,
        "sensor_width_mm": SENSOR_WIDTH_MM,
        "width": IMAGE_WIDTH,
        "height": IMAGE_HEIGHT,
    }
    sizes = {
        name: _number(entry.get(name, size), f"{where}.{name}") for name, size in published.items()
    }
    for name, size in sizes.items():
        if not 1e-3 <= size <= 1e6:
            raise UserError(f"{where}.{name}: expected a number from 1e-3 to 1e6, got {size:g}")
    focal_length = sizes["lens_mm"] / sizes["sensor_width_mm"]
    return Camera(matrix, focal_length, sizes["width"] / sizes["height"])


def _is_file_name(text: str) -> bool:
    """A plain one on every system: no path, nothing that cannot be written as a name."""
    parts = text.replace("\\", "/").split("/")
    unwritable = any(c == "\0" or "\ud800" <= c <= "\udfff" for c in text)
    return len(parts) == 1 and text not in ("", ".", "..") and not unwritable


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
            known = ", ".join(values)
            raise UserError(f"{where}.{attribute}: expected one of {known}, got {_shorten(name)}")
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
        raise UserError(f"{where}.{key}: expected {expected}, got none")
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


def _shorten(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."
