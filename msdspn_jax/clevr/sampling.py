"""CLEVR scenes drawn by the generator's rules, and their JSON form.

The rules are those of the CLEVR generator (Johnson et al., CVPR 2017): 3 to 10 objects, each with a
size fixed first and up to 50 tries for a place; a place is refused if two centres would be closer
than r1 + r2 + 0.25, or if along one of the four ground directions of the camera the signed
distance lies strictly between 0 and 0.4; after 50 tries the scene starts over with the same number
of objects, and so it does when an object shows fewer than 200 pixels of the 480x320 image. Camera
and lamps are jittered once, before the objects.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from msdspn_jax.clevr.objects import (
    COLORS,
    MATERIALS,
    MEAN_CAMERA_LOCATION,
    SHAPES,
    SIZE_RADIUS,
    SIZES,
    ClevrObject,
    ClevrScene,
    encode_features,
    parse_scene,
    scene_to_json,
)
from msdspn_jax.clevr.render import geometry
from msdspn_jax.clevr.render.geometry import MAX_OBJECTS, REFERENCE_HEIGHT, REFERENCE_WIDTH
from msdspn_jax.errors import UserError

RADII = np.array(SIZE_RADIUS, np.float32)

MIN_OBJECTS = 3
EXTENT = 3.0
MIN_DISTANCE = 0.25
MARGIN = 0.4
TRIES = 50
MIN_PIXELS = 200

CAMERA = np.array(MEAN_CAMERA_LOCATION, np.float32)
CAMERA_JITTER = 0.5
LAMPS = np.array(
    [
        [6.446710109710693, -2.905174732208252, 4.258398056030273],
        [-4.671124458312988, -4.01359748840332, 3.0112245082855225],
        [-1.168501377105713, 2.646024465560913, 5.815736770629883],
    ],
    np.float32,
)
"""Mean places of the key, fill and back lamp."""
LAMP_NAMES = ("Lamp_Key", "Lamp_Fill", "Lamp_Back")
LAMP_JITTER = 1.0

RIGHT = np.array([0.6563112735748291, 0.754490315914154, 0.0], np.float32)
BEHIND = np.array([-0.754490315914154, 0.6563112735748291, 0.0], np.float32)
"""Ground directions. The generator reads them before the camera's jitter has taken effect, so
they are those of the mean camera in every scene; the margins are measured along them."""


class Scene(NamedTuple):
    """Scenes of at most ten objects; every field may carry leading batch axes.

    Lengths are CLEVR units. Objects with ``present`` false hold zeros.
    """

    positions: Float[Array, "*batch 10 3"]
    """Centres; z is the radius of the size."""
    shape: Int[Array, "*batch 10"]
    """Index into SHAPES."""
    size: Int[Array, "*batch 10"]
    material: Int[Array, "*batch 10"]
    color: Int[Array, "*batch 10"]
    rotation: Float[Array, "*batch 10"]
    """0 to 360 as in the files; applied about z as radians, which is what the generator does."""
    present: Bool[Array, "*batch 10"]
    camera: Float[Array, "*batch 3"]
    """Place of the camera; it looks at the origin."""
    lamps: Float[Array, "*batch 3 3"]
    """Places of the key, fill and back lamp; they face the origin."""


def radii(scene: Scene) -> Float[Array, "*batch 10"]:
    """Radius (half extent) of every object, zero where absent."""
    return jnp.where(scene.present, jnp.asarray(RADII)[scene.size], 0.0)


def scene_bodies(scene: Scene) -> geometry.Bodies:
    """The geometry of one scene (no batch axes)."""
    radius = jnp.asarray(RADII)[scene.size]
    return geometry.bodies(scene.positions, radius, scene.shape, scene.rotation, scene.present)


# Sampling -------------------------------------------------------------------------------------


def _place_objects(key, count: Int[Array, ""]) -> tuple[jax.Array, jax.Array]:
    """Places [10, 2] and sizes [10] by the generator's law; a round draws an object's 50 tries."""

    def start(key):
        return key, jnp.int32(0), jnp.zeros((MAX_OBJECTS, 2)), jnp.zeros(MAX_OBJECTS, jnp.int32)

    def place(state):
        key, n, places, sizes = state
        key, size_key, place_key = jax.random.split(key, 3)
        size = jax.random.randint(size_key, (), 0, len(SIZES))
        tries = jax.random.uniform(place_key, (TRIES, 2), minval=-EXTENT, maxval=EXTENT)
        offset = tries[:, None] - places[None]
        distance = jnp.sqrt(jnp.sum(offset**2, axis=-1))
        radius = jnp.asarray(RADII)
        good = distance - radius[sizes] - radius[size] >= MIN_DISTANCE
        for direction in (RIGHT, BEHIND):
            along = jnp.abs(jnp.sum(offset * direction[:2], axis=-1))
            good &= (along == 0) | (along >= MARGIN)
        good = jnp.all(good | (jnp.arange(MAX_OBJECTS) >= n), axis=1)
        first = jnp.argmax(good)
        here = jnp.arange(MAX_OBJECTS) == n
        places = jnp.where(here[:, None], tries[first], places)
        sizes = jnp.where(here, size, sizes)
        return key, jnp.where(good[first], n + 1, 0), places, sizes

    _, _, places, sizes = jax.lax.while_loop(lambda state: state[1] < count, place, start(key))
    return places, sizes


def sample_scene(
    key: PRNGKeyArray, *, num_objects: tuple[int, int] = (MIN_OBJECTS, MAX_OBJECTS)
) -> Scene:
    """Draw one scene; ``jax.vmap`` and ``jax.jit`` apply. See :func:`sample_scenes_from_keys`."""
    fewest, most = num_objects
    if not 1 <= fewest <= most <= MAX_OBJECTS:
        raise ValueError(
            f"num_objects must be (fewest, most) with 1 <= fewest <= most <= {MAX_OBJECTS}, "
            f"got {num_objects}"
        )
    count_key, camera_key, lamp_key, key = jax.random.split(key, 4)
    count = jax.random.randint(count_key, (), fewest, most + 1)
    present = jnp.arange(MAX_OBJECTS) < count
    camera = jnp.asarray(CAMERA) + jax.random.uniform(
        camera_key, (3,), minval=-CAMERA_JITTER, maxval=CAMERA_JITTER
    )
    lamps = jnp.asarray(LAMPS) + jax.random.uniform(
        lamp_key, (3, 3), minval=-LAMP_JITTER, maxval=LAMP_JITTER
    )

    def attempt(state):
        key, _ = state
        key, place_key, shape_key, color_key, material_key, rotation_key = jax.random.split(key, 6)
        places, size = _place_objects(place_key, count)
        draw = lambda key, names: jnp.where(  # noqa: E731
            present, jax.random.randint(key, (MAX_OBJECTS,), 0, len(names)), 0
        )
        positions = jnp.concatenate([places, jnp.asarray(RADII)[size][:, None]], axis=1)
        return key, Scene(
            positions=jnp.where(present[:, None], positions, 0.0),
            shape=draw(shape_key, SHAPES),
            size=jnp.where(present, size, 0),
            material=draw(material_key, MATERIALS),
            color=draw(color_key, COLORS),
            rotation=jnp.where(
                present, jax.random.uniform(rotation_key, (MAX_OBJECTS,), maxval=360.0), 0.0
            ),
            present=present,
            camera=camera,
            lamps=lamps,
        )

    # An empty table comes first, refused: the loop's body is then compiled once.
    _, empty = jax.eval_shape(attempt, (key, None))
    empty = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), empty)
    start = (key, empty, jnp.array(False))

    def again(state):
        key, scene = attempt(state[:2])
        return key, scene, all_visible(scene)

    return jax.lax.while_loop(lambda state: ~state[2], again, start)[1]


def sample_scenes(key: PRNGKeyArray, batch: int, *, group: int | None = None) -> Scene:
    """Draw ``batch`` scenes by the generator's rules.

    Scene i depends on ``jax.random.split(key, batch)[i]`` alone, not on ``group``.

    Args:
        key: JAX random key.
        batch: number of scenes.
        group: see :func:`sample_scenes_from_keys`.
    """
    if batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    return sample_scenes_from_keys(jax.random.split(key, batch), group=group)


@functools.partial(jax.jit, static_argnames=("group", "num_objects"))
def sample_scenes_from_keys(
    keys: PRNGKeyArray,
    *,
    group: int | None = None,
    num_objects: tuple[int, int] = (MIN_OBJECTS, MAX_OBJECTS),
) -> Scene:
    """Draw one scene for each key, by the generator's rules.

    Args:
        keys: random keys [batch].
        num_objects: the fewest and the most objects of a scene; all numbers are equally likely.
            The generator has (3, 10).
        group: how many scenes are drawn side by side. A group waits for its slowest member, so
            that 1 is best on a CPU and a large number on an accelerator; None chooses.
    """
    if group is None:
        group = 1 if jax.default_backend() == "cpu" else 128
    return lax_map(functools.partial(sample_scene, num_objects=num_objects), keys, group)


def lax_map(function, xs, group: int):
    """``jax.lax.map`` by groups; a group of one is not vectorised: its loops stay scalar."""
    return jax.lax.map(function, xs, batch_size=group if group > 1 else None)


# Visibility -----------------------------------------------------------------------------------


def _count(scene: Scene, stride: int, shift: Int[Array, ""]) -> Int[Array, "10"]:
    """Pixels of each object among one in stride² of the 480x320 image; shift chooses which."""
    bodies = scene_bodies(scene)
    u = jnp.arange(REFERENCE_WIDTH // stride) * stride + shift % stride + 0.5
    v = jnp.arange(REFERENCE_HEIGHT // stride) * stride + shift // stride + 0.5
    grid_u, grid_v = jnp.meshgrid(u, v)
    direction = geometry.camera_ray(scene.camera, grid_u, grid_v)
    camera = (scene.camera[0], scene.camera[1], scene.camera[2])
    _, index = geometry.nearest_body(bodies, camera, direction)
    counts = jnp.sum(index.reshape(-1, 1) == jnp.arange(MAX_OBJECTS), axis=0, dtype=jnp.int32)
    return jnp.zeros(MAX_OBJECTS, jnp.int32).at[bodies.order].set(counts)


def visible_pixels(scene: Scene) -> Int[Array, "10"]:
    """Pixels of the 480x320 image at whose centre each object of one scene is seen."""
    return _count(scene, 1, jnp.int32(0))


def all_visible(scene: Scene) -> Bool[Array, ""]:
    """Whether every object of one scene shows at least 200 pixels of the 480x320 image.

    The image is cast by sixteenths. The first settles the clear cases: a region of 200 or fewer
    pixels of the sizes and shapes that occur holds fewer than 24 points of the 4x4 grid, one of
    100 or more holds some. Where it does not, the others are counted as well.
    """
    middle = jnp.int32(10)

    def lowest(counts):
        return jnp.min(jnp.where(scene.present, counts, REFERENCE_WIDTH * REFERENCE_HEIGHT))

    def unclear(state):
        parts, counts = state
        low = lowest(counts)
        return (parts == 0) | ((parts == 1) & (low > 4) & (low < 24)) | ((parts > 1) & (parts < 16))

    def cast(state):
        parts, counts = state
        return parts + 1, counts + _count(scene, 4, (middle + parts) % 16)

    start = (jnp.int32(0), jnp.zeros(MAX_OBJECTS, jnp.int32))
    parts, counts = jax.lax.while_loop(unclear, cast, start)
    return jnp.where(parts == 1, 16, 1) * lowest(counts) >= MIN_PIXELS


# Arrays and JSON ------------------------------------------------------------------------------


def scene_objects(scene: Scene) -> Float[Array, "*batch 10 19"]:
    """The objects in the layout that models predict (see :mod:`msdspn_jax.clevr.objects`)."""
    return jnp.asarray(
        encode_features(
            scene.positions, scene.material, scene.color, scene.shape, scene.size, scene.present
        )
    )


def mean_scene_setting() -> tuple[Float[np.ndarray, "3"], Float[np.ndarray, "3 3"]]:
    """Camera and lamps of the generator before jitter, for files that record neither."""
    return CAMERA.copy(), LAMPS.copy()


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
    names = {"shape": SHAPES, "size": SIZES, "material": MATERIALS, "color": COLORS}
    index = {
        name: _padded([values.index(getattr(o, name)) for o in objects], np.int32)
        for name, values in names.items()
    }
    positions = np.zeros((MAX_OBJECTS, 3), np.float32)
    for i, o in enumerate(objects):
        radius = SIZE_RADIUS[SIZES.index(o.size)]
        if abs(o.position[2] - radius) > 1e-3:
            raise UserError(
                f"{where}.objects[{i}].3d_coords: a {o.size} object stands on the ground with its "
                f"centre at height {radius}, got {o.position[2]:.4g}"
            )
        if max(abs(o.position[0]), abs(o.position[1])) > 5:
            raise UserError(
                f"{where}.objects[{i}].3d_coords: expected a place on the table, within 5 of the "
                f"origin, got {list(o.position[:2])}"
            )
        positions[i] = o.position
    camera, lamps = mean_scene_setting()
    if "camera" in parsed.extra:
        camera = _place(parsed.extra["camera"], f"{where}.camera")
    if "lights" in parsed.extra:
        lights = parsed.extra["lights"]
        missing = [n for n in LAMP_NAMES if not isinstance(lights, dict) or n not in lights]
        if missing:
            raise UserError(f"{where}.lights: expected {', '.join(LAMP_NAMES)}; {missing} missing")
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


def _place(entry: Any, where: str) -> np.ndarray:
    """Location of a camera or lamp, refused if it does not look at the origin."""
    try:
        location = np.asarray(entry["location"], np.float64)
        matrix = np.asarray(entry.get("matrix_world", np.nan), np.float64)
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise UserError(f"{where}: expected a location [x, y, z], got {str(entry)[:80]}") from error
    if location.shape != (3,) or not np.isfinite(location).all() or location[2] < 0.5:
        raise UserError(f"{where}.location: expected [x, y, z] above the ground, got {location}")
    if "matrix_world" in entry:
        expected = location / np.linalg.norm(location)
        if matrix.shape != (4, 4) or not np.abs(matrix[:3, 2] - expected).max() < 1e-2:
            raise UserError(
                f"{where}.matrix_world: expected a 4x4 matrix that looks at the origin, "
                "as the generator's cameras and lamps do"
            )
    return location.astype(np.float32)


def stack_scenes(scenes: list[Scene]) -> Scene:
    """Put scenes without batch axes into one batch."""
    return Scene(*(np.stack(field) for field in zip(*scenes, strict=True)))  # type: ignore


def scene_entry(scene: Scene, image_index: int, split: str = "procedural") -> dict[str, Any]:
    """One scene (no batch axes) as an entry of a CLEVR scenes file, with camera and lamps.

    :func:`scene_from_entry` reads the same scene back, bit for bit.
    """
    scene = jax.tree.map(np.asarray, scene)
    count = int(scene.present.sum())
    pixels = np.asarray(geometry.project(jnp.asarray(scene.camera), jnp.asarray(scene.positions)))
    objects = tuple(
        ClevrObject(
            shape=SHAPES[int(scene.shape[i])],
            size=SIZES[int(scene.size[i])],
            material=MATERIALS[int(scene.material[i])],
            color=COLORS[int(scene.color[i])],
            position=tuple(scene.positions[i].tolist()),
            rotation=float(scene.rotation[i]),
            pixel_coords=(int(pixels[i, 0]), int(pixels[i, 1]), float(pixels[i, 2])),
        )
        for i in range(count)
    )
    extra = {
        "split": split,
        "directions": directions(),
        "relationships": relationships(np.asarray(scene.positions[:count])),
    } | setting_entry(scene)
    name = f"CLEVR_{split}_{image_index:06d}.png"
    return scene_to_json(ClevrScene(name, objects, image_index, extra))


def setting_entry(scene: Scene) -> dict[str, Any]:
    """Camera and lamps of one scene as the fields ``camera`` and ``lights`` of its entry."""
    camera = _tracking_entry(np.asarray(scene.camera)) | {
        "lens_mm": 35.0,
        "sensor_width_mm": 32.0,
        "width": REFERENCE_WIDTH,
        "height": REFERENCE_HEIGHT,
    }
    lamps = np.asarray(scene.lamps)
    lights = {
        name: {"type": "AREA"} | _tracking_entry(lamps[i]) for i, name in enumerate(LAMP_NAMES)
    }
    return {"camera": camera, "lights": lights}


def _tracking_entry(location: np.ndarray) -> dict[str, Any]:
    axes = geometry.tracking_axes(jnp.asarray(location))
    matrix = np.eye(4, dtype=np.float32)
    for i, axis in enumerate(axes):
        matrix[:3, i] = [float(a) for a in axis]
    matrix[:3, 3] = location
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
    positions: Float[np.ndarray, "n 3"], eps: float = 0.2
) -> dict[str, list[list[int]]]:
    """For each of four directions and each object, which others lie further that way by ``eps``."""
    offset = positions[None, :, :] - positions[:, None, :]
    related = {}
    for name in ("behind", "front", "left", "right"):
        further = offset @ np.array(directions()[name], np.float32) > eps
        np.fill_diagonal(further, False)
        related[name] = [np.flatnonzero(row).tolist() for row in further]
    return related
