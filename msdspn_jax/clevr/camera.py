"""CLEVR's camera: a pinhole that looks at the origin, the same for renderer, files and figures.

Image coordinates are in pixels, u to the right and v down, of the published 480x320 image unless
another size is given.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from msdspn_jax._check import AnyArray
from msdspn_jax.clevr.vectors import Vec, add, cross, normalise, scale, unstack

#: Size of a published image.
IMAGE_WIDTH, IMAGE_HEIGHT = 480, 320
LENS_MM, SENSOR_WIDTH_MM = 35.0, 32.0
FOCAL_PIXELS = IMAGE_WIDTH * LENS_MM / SENSOR_WIDTH_MM

#: Where the generator puts the camera before it jitters it by up to ±0.5 along each axis.
MEAN_LOCATION = (7.481131553649902, -6.5076398849487305, 5.34366512298584)
RIGHT = np.array([0.6563112735748291, 0.754490315914154, 0.0], np.float32)
BEHIND = np.array([-0.754490315914154, 0.6563112735748291, 0.0], np.float32)
"""Ground directions. The generator reads them before the camera's jitter has taken effect, so
they are those of the mean camera in every scene; the margins are measured along them."""


class Camera(NamedTuple):
    """A pinhole camera that looks along its −z axis, with y up."""

    matrix_world: Float[np.ndarray, "4 4"]
    """From camera to world coordinates."""
    focal_length: float = LENS_MM / SENSOR_WIDTH_MM
    """In image widths."""
    aspect: float = IMAGE_WIDTH / IMAGE_HEIGHT
    """Width / height of the image before it is squashed to a square."""


def tracking_axes(location: Float[AnyArray, "*batch 3"]) -> tuple[Vec, Vec, Vec]:
    """Right, up and backward axes of a camera or lamp at ``location`` that looks at the origin."""
    backward = normalise(unstack(location))
    right = normalise((-backward[1], backward[0], jnp.zeros_like(backward[0])))
    return right, cross(backward, right), backward


def look_at_origin(
    location: Sequence[float] | Float[AnyArray, "3"] = MEAN_LOCATION,
) -> Camera:
    """CLEVR's camera at ``location`` (x, y, z), aimed at the origin, level."""
    # In NumPy: a dozen operations of JAX, one by one, would take a third of a second to compile.
    place = np.asarray(location, np.float32)
    backward = place / np.linalg.norm(place)
    right = np.array([-backward[1], backward[0], 0.0], np.float32)
    right /= np.linalg.norm(right)
    matrix = np.eye(4, dtype=np.float32)
    matrix[:3] = np.stack([right, np.cross(backward, right), backward, place], axis=1)
    return Camera(matrix)


def camera_ray(
    location: Float[AnyArray, "3"], u: Float[AnyArray, "*rays"], v: Float[AnyArray, "*rays"]
) -> Vec:
    """Unit directions from a camera at ``location`` that looks at the origin, through (u, v)."""
    right, up, backward = tracking_axes(location)
    dx = (u - IMAGE_WIDTH / 2) / FOCAL_PIXELS
    dy = (IMAGE_HEIGHT / 2 - v) / FOCAL_PIXELS
    direction = add(add(scale(right, dx), scale(up, dy)), scale(backward, -1.0))
    return normalise(direction)


def project(
    camera: Camera,
    positions: Float[AnyArray, "*batch 3"],
    width: float = IMAGE_WIDTH,
    height: float = IMAGE_HEIGHT,
) -> Float[np.ndarray, "*batch 3"]:
    """(u, v, depth) of world positions in an image of any size, depth in CLEVR units.

    The image shows what the camera's own frame shows, squashed to ``width`` x ``height``. NaN for
    positions behind the camera. The generator's ``pixel_coords`` are these, with u and v truncated
    to integers.
    """
    positions = np.asarray(positions, np.float64)
    to_camera = np.linalg.inv(np.asarray(camera.matrix_world, np.float64))
    x, y, z = np.moveaxis(positions @ to_camera[:3, :3].T + to_camera[:3, 3], -1, 0)
    depth = np.where(z < 0, -z, np.nan)
    u = width * (0.5 + camera.focal_length * x / depth)
    v = height * (0.5 - camera.focal_length * camera.aspect * y / depth)
    return np.stack([u, v, depth], axis=-1)
