"""CLEVR scenes drawn by the generator's rules.

The rules are those of the CLEVR generator (Johnson et al., CVPR 2017): 3 to 10 objects, each with a
size fixed first and up to 50 tries for a place; a place is refused if two centres would be closer
than r1 + r2 + 0.25, or if along one of the four ground directions of the camera the signed
distance lies strictly between 0 and 0.4; after 50 tries the scene starts over with the same number
of objects, and so it does when an object shows fewer than 200 pixels of the 480x320 image. Camera
and lamps are jittered once, before the objects.
"""

import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Key

from msdspn_jax import _check
from msdspn_jax.clevr.camera import BEHIND, IMAGE_HEIGHT, IMAGE_WIDTH, RIGHT, camera_ray
from msdspn_jax.clevr.objects import COLORS, MATERIALS, MAX_OBJECTS, SHAPES, SIZES
from msdspn_jax.clevr.render.geometry import nearest_body, scene_bodies
from msdspn_jax.clevr.scene import MEAN_CAMERA, MEAN_LAMPS, RADII, Scene, map_scenes
from msdspn_jax.clevr.vectors import unstack

MIN_OBJECTS = 3
EXTENT = 3.0
MIN_DISTANCE = 0.25
MARGIN = 0.4
TRIES = 50
MIN_PIXELS = 200
CAMERA_JITTER = 0.5
LAMP_JITTER = 1.0


def place_objects(key: Key[Array, ""], count: Int[Array, ""]) -> tuple[jax.Array, jax.Array]:
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
    key: Key[Array, ""], *, num_objects: tuple[int, int] = (MIN_OBJECTS, MAX_OBJECTS)
) -> Scene:
    """Draw one scene; ``jax.vmap`` and ``jax.jit`` apply. See :func:`sample_scenes_from_keys`."""
    fewest, most = checked_num_objects(num_objects)
    count_key, camera_key, lamp_key, key = jax.random.split(key, 4)
    count = jax.random.randint(count_key, (), fewest, most + 1)
    present = jnp.arange(MAX_OBJECTS) < count
    camera = jnp.asarray(MEAN_CAMERA) + jax.random.uniform(
        camera_key, (3,), minval=-CAMERA_JITTER, maxval=CAMERA_JITTER
    )
    lamps = jnp.asarray(MEAN_LAMPS) + jax.random.uniform(
        lamp_key, (3, 3), minval=-LAMP_JITTER, maxval=LAMP_JITTER
    )

    def attempt(state):
        key, _ = state
        key, place_key, shape_key, color_key, material_key, rotation_key = jax.random.split(key, 6)
        places, size = place_objects(place_key, count)
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


def sample_scenes(key: Key[Array, ""], batch: int, *, group: int | None = None) -> Scene:
    """Draw ``batch`` scenes by the generator's rules.

    Scene i depends on ``jax.random.split(key, batch)[i]`` alone, not on ``group``.

    Args:
        key: JAX random key.
        batch: number of scenes.
        group: see :func:`sample_scenes_from_keys`.
    """
    _check.require_integer("batch", batch, 1)
    return sample_scenes_from_keys(jax.random.split(key, batch), group=group)


def sample_scenes_from_keys(
    keys: Key[Array, " batch"],
    *,
    group: int | None = None,
    num_objects: tuple[int, int] = (MIN_OBJECTS, MAX_OBJECTS),
) -> Scene:
    """Draw one scene for each key, by the generator's rules.

    Args:
        keys: random keys.
        num_objects: the fewest and the most objects of a scene; all numbers are equally likely.
            The generator has (3, 10).
        group: how many scenes are drawn side by side. A group waits for its slowest member, so
            that 1 is best on a CPU and a large number on an accelerator; None chooses.
    """
    _check.require_rank("keys", keys, 1, "batch")
    if group is None:
        group = 1 if jax.default_backend() == "cpu" else 128
    with jax.enable_x64(False):  # A key has the same scene where JAX has 64 bits.
        return _sample(keys, group, checked_num_objects(num_objects))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _sample(keys: Key[Array, " batch"], group: int, num_objects: tuple[int, int]) -> Scene:
    return map_scenes(functools.partial(sample_scene, num_objects=num_objects), keys, group)


def checked_num_objects(num_objects: Any) -> tuple[int, int]:
    """The fewest and the most objects of a scene, as integers."""
    try:
        fewest, most = map(operator.index, num_objects)
    except (TypeError, ValueError):
        fewest, most = 0, 0
    if not 1 <= fewest <= most <= MAX_OBJECTS:
        raise ValueError(
            f"num_objects: expected (fewest, most) with 1 <= fewest <= most <= {MAX_OBJECTS}, "
            f"got {num_objects}"
        )
    return fewest, most


# Visibility -----------------------------------------------------------------------------------


def _count(scene: Scene, stride: int, shift: Int[Array, ""]) -> Int[Array, "10"]:
    """Pixels of each object among one in stride² of the 480x320 image; shift chooses which."""
    bodies = scene_bodies(scene)
    u = jnp.arange(IMAGE_WIDTH // stride) * stride + shift % stride + 0.5
    v = jnp.arange(IMAGE_HEIGHT // stride) * stride + shift // stride + 0.5
    grid_u, grid_v = jnp.meshgrid(u, v)
    direction = camera_ray(scene.camera, grid_u, grid_v)
    _, index = nearest_body(bodies, unstack(scene.camera), direction)
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
        return jnp.min(jnp.where(scene.present, counts, IMAGE_WIDTH * IMAGE_HEIGHT))

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
