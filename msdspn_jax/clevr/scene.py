"""Scenes as arrays, from and to the entries of a CLEVR scenes file."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from msdspn_jax._check import AnyArray
from msdspn_jax._varying import varying_axes
from msdspn_jax.clevr.camera import (
    BEHIND,
    IMAGE_HEIGHT,
    IMAGE_WIDTH,
    LENS_MM,
    MEAN_LOCATION,
    RIGHT,
    SENSOR_WIDTH_MM,
    look_at_origin,
    project,
)
from msdspn_jax.clevr.entries import parse_scene, scene_to_json
from msdspn_jax.clevr.objects import (
    ATTRIBUTES,
    MAX_OBJECTS,
    SIZE_RADIUS,
    SIZES,
    ClevrObject,
    ClevrScene,
    encode_features,
)
from msdspn_jax.errors import UserError

RADII = np.array(SIZE_RADIUS, np.float32)
MEAN_CAMERA = np.array(MEAN_LOCATION, np.float32)
MEAN_LAMPS = np.array(
    [
        [6.446710109710693, -2.905174732208252, 4.258398056030273],
        [-4.671124458312988, -4.01359748840332, 3.0112245082855225],
        [-1.168501377105713, 2.646024465560913, 5.815736770629883],
    ],
    np.float32,
)
"""Places of the key, fill and back lamp before the generator jitters them."""
LAMP_NAMES = ("Lamp_Key", "Lamp_Fill", "Lamp_Back")


class Scene(NamedTuple):
    """Scenes of at most ten objects; every field may carry leading batch axes.

    Lengths are CLEVR units. Objects with ``present`` false hold zeros.
    """

    positions: Float[AnyArray, "*batch 10 3"]
    """Centres; z is the radius of the size."""
    shape: Int[AnyArray, "*batch 10"]
    """Index into SHAPES."""
    size: Int[AnyArray, "*batch 10"]
    material: Int[AnyArray, "*batch 10"]
    color: Int[AnyArray, "*batch 10"]
    rotation: Float[AnyArray, "*batch 10"]
    """0 to 360 as in the files; applied about z as radians, which is what the generator does."""
    present: Bool[AnyArray, "*batch 10"]
    camera: Float[AnyArray, "*batch 3"]
    """Place of the camera; it looks at the origin."""
    lamps: Float[AnyArray, "*batch 3 3"]
    """Places of the key, fill and back lamp; they face the origin."""


def stack_scenes(scenes: list[Scene]) -> Scene:
    """Put scenes without batch axes into one batch."""
    return Scene(*(np.stack(field) for field in zip(*scenes, strict=True)))  # type: ignore


def map_scenes(function: Callable, scenes: Any, group: int) -> Any:
    """``jax.lax.map`` by groups; a group of one is not vectorised: its loops stay scalar.

    Raises:
        ValueError: under ``jax.shard_map`` with its checks, which loops of the renderer do not
            pass.
    """
    if varying_axes(scenes):
        raise ValueError(
            "check_vma: expected jax.shard_map with check_vma=False around drawing and rendering "
            "scenes, got its default"
        )
    return jax.lax.map(function, scenes, batch_size=group if group > 1 else None)


def scene_objects(scene: Scene) -> Float[Array, "*batch 10 19"]:
    """The objects in the layout that models predict (see :mod:`msdspn_jax.clevr.objects`)."""
    return jnp.asarray(
        encode_features(
            scene.positions, scene.material, scene.color, scene.shape, scene.size, scene.present
        )
    )


def scene_from_entry(entry: Any, where: str = "scene") -> Scene:
    """Read one entry of a scenes file, as ``json.load`` gives it; see :func:`scene_arrays`."""
    return scene_arrays(parse_scene(entry, where), where)


def scene_arrays(parsed: ClevrScene, where: str = "scene") -> Scene:
    """A parsed scene as NumPy arrays that can be rendered.

    Camera and lamps are those the entry records; where it records none, as in the published files,
    the generator's mean ones.

    Args:
        parsed: one scene of :func:`msdspn_jax.clevr.files.read_scenes`.
        where: file and entry, for messages.

    Raises:
        UserError: names the entry and the field that cannot be rendered.
    """
    objects = parsed.objects
    index = {
        name: _padded([values.index(getattr(o, name)) for o in objects], np.int32)
        for name, values in ATTRIBUTES.items()
    }
    positions = np.zeros((MAX_OBJECTS, 3), np.float32)
    for i, o in enumerate(objects):
        radius = SIZE_RADIUS[SIZES.index(o.size)]
        if abs(o.position[2] - radius) > 1e-3:
            raise UserError(
                f"{where}.objects[{i}].3d_coords: expected the centre of a {o.size} object at "
                f"height {radius}, on the ground, got {o.position[2]:.4g}"
            )
        if max(abs(o.position[0]), abs(o.position[1])) > 5:
            raise UserError(
                f"{where}.objects[{i}].3d_coords: expected a place on the table, within 5 of the "
                f"origin, got {list(o.position[:2])}"
            )
        positions[i] = o.position
    camera, lamps = MEAN_CAMERA.copy(), MEAN_LAMPS.copy()
    if "camera" in parsed.extra:
        camera = _camera(parsed.extra["camera"], f"{where}.camera")
    if "lights" in parsed.extra:
        lights = parsed.extra["lights"]
        missing = [n for n in LAMP_NAMES if not isinstance(lights, dict) or n not in lights]
        if missing:
            raise UserError(
                f"{where}.lights: expected {', '.join(LAMP_NAMES)}, got no {', no '.join(missing)}"
            )
        lamps = np.stack([_place(lights[n], f"{where}.lights.{n}") for n in LAMP_NAMES])
    return Scene(
        positions=positions,  # type: ignore
        **index,
        rotation=_padded([o.rotation or 0.0 for o in objects], np.float32),
        present=_padded([True for _ in objects], np.bool_),
        camera=camera,  # type: ignore
        lamps=lamps,  # type: ignore
    )


def _padded(values: list, dtype) -> Any:
    return np.array(values + [0] * (MAX_OBJECTS - len(values)), dtype)


def _camera(entry: Any, where: str) -> np.ndarray:
    """Location of a camera, refused if it sees anything but what CLEVR's sees from there."""
    location = _place(entry, where)
    if np.hypot(*location[:2]) < 1e-3 * location[2]:
        raise UserError(
            f"{where}.location: expected one that is not straight above the origin, where level has"
            f" no meaning, got {location.tolist()}"
        )
    if "matrix_world" in entry:
        matrix = np.asarray(entry["matrix_world"], np.float64)
        expected = look_at_origin(location).matrix_world
        if not np.abs(matrix - expected).max() < 1e-2 * max(1, np.abs(location).max()):
            raise UserError(
                f"{where}.matrix_world: expected a level camera at its location, "
                f"{expected.round(3).tolist()}, got {str(entry['matrix_world'])[:80]}"
            )
    known = {"lens_mm": LENS_MM, "sensor_width_mm": SENSOR_WIDTH_MM}
    known |= {"width": IMAGE_WIDTH, "height": IMAGE_HEIGHT}
    for name, value in known.items():
        if entry.get(name, value) != value:
            raise UserError(f"{where}.{name}: expected {value:g}, as CLEVR has, got {entry[name]}")
    return location


def _place(entry: Any, where: str) -> np.ndarray:
    """Location of a camera or lamp, refused if it does not look at the origin."""
    try:
        location = np.asarray(entry["location"], np.float64)
        matrix = np.asarray(entry.get("matrix_world", np.nan), np.float64)
    except (TypeError, KeyError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(f"{where}: expected a location [x, y, z], got {str(entry)[:80]}") from error
    near = location.shape == (3,) and np.abs(location).max() <= 1e3  # False where it is NaN.
    if not near or location[2] < 0.5:
        raise UserError(
            f"{where}.location: expected [x, y, z] above the ground and within 1000 of the origin,"
            f" got {str(entry['location'])[:80]}"
        )
    if "matrix_world" in entry:
        expected = location / np.linalg.norm(location)
        if matrix.shape != (4, 4) or not np.abs(matrix[:3, 2] - expected).max() < 1e-2:
            raise UserError(
                f"{where}.matrix_world: expected a 4x4 matrix that looks at the origin, as the "
                f"generator's cameras and lamps do, got {str(entry['matrix_world'])[:80]}"
            )
    return location.astype(np.float32)


def scene_entry(scene: Scene, image_index: int, split: str = "procedural") -> dict[str, Any]:
    """One scene (no batch axes) as an entry of a CLEVR scenes file, with camera and lamps.

    :func:`scene_from_entry` reads the same scene back, bit for bit.
    """
    scene = jax.tree.map(np.asarray, scene)
    count = int(scene.present.sum())
    positions = np.asarray(scene.positions[:count])
    pixels = project(look_at_origin(scene.camera), positions)
    objects = tuple(
        ClevrObject(
            **{name: values[getattr(scene, name)[i]] for name, values in ATTRIBUTES.items()},
            position=tuple(positions[i].tolist()),
            rotation=float(scene.rotation[i]),
            pixel_coords=(int(pixels[i, 0]), int(pixels[i, 1]), float(pixels[i, 2])),
        )
        for i in range(count)
    )
    extra = {
        "split": split,
        "directions": directions(),
        "relationships": relationships(positions),
    } | setting_entry(scene)
    name = f"CLEVR_{split}_{image_index:06d}.png"
    return scene_to_json(ClevrScene(name, objects, image_index, extra))


def setting_entry(scene: Scene) -> dict[str, Any]:
    """Camera and lamps of one scene as the fields ``camera`` and ``lights`` of its entry."""
    camera = _tracking_entry(np.asarray(scene.camera)) | {
        "lens_mm": LENS_MM,
        "sensor_width_mm": SENSOR_WIDTH_MM,
        "width": IMAGE_WIDTH,
        "height": IMAGE_HEIGHT,
    }
    lamps = np.asarray(scene.lamps)
    lights = {
        name: {"type": "AREA"} | _tracking_entry(lamps[i]) for i, name in enumerate(LAMP_NAMES)
    }
    return {"camera": camera, "lights": lights}


def _tracking_entry(location: np.ndarray) -> dict[str, Any]:
    matrix = look_at_origin(location).matrix_world
    return {"location": location.tolist(), "matrix_world": matrix.tolist()}


def directions() -> dict[str, list[float]]:
    """The six directions that the generator writes to every scene."""
    vectors = {
        "behind": BEHIND,
        "front": -BEHIND,
        "left": -RIGHT,
        "right": RIGHT,
        "above": np.array([0.0, 0.0, 1.0], np.float32),
        "below": np.array([0.0, 0.0, -1.0], np.float32),
    }
    return {name: vector.tolist() for name, vector in vectors.items()}


def relationships(
    positions: Float[AnyArray, "n 3"], eps: float = 0.2
) -> dict[str, list[list[int]]]:
    """For each of four directions and each object, which others lie further that way by ``eps``."""
    positions = np.asarray(positions)
    offset = positions[None, :, :] - positions[:, None, :]
    related = {}
    for name in ("behind", "front", "left", "right"):
        further = offset @ np.array(directions()[name], np.float32) > eps
        np.fill_diagonal(further, False)
        related[name] = [np.flatnonzero(row).tolist() for row in further]
    return related
