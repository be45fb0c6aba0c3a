"""The lamps and the sun of a CLEVR scene: how much light reaches a point, and in what colour."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from msdspn_jax.clevr.camera import tracking_axes
from msdspn_jax.clevr.render.geometry import Bodies, blocked
from msdspn_jax.clevr.scene import Scene
from msdspn_jax.clevr.vectors import Vec, add, dot, scale, sub, unstack

# Lights: radiance times area, colour, side of the square. Key, fill, back. The base scene says 25
# for the key lamp; 24.8 fits the ground of the reference renders (experiments/clevr/RENDERER.md).
LAMP_POWER = (24.8, 7.5, 12.5)
LAMP_COLOR = ((1.0, 0.93231, 0.81666), (0.76167, 0.81772, 1.0), (1.0, 1.0, 1.0))
LAMP_SIDE = (0.5, 0.5, 1.0)
SUN_IRRADIANCE = 0.45
SUN_DIRECTION = (0.41449564695358276, -0.1945834904909134, 0.8890054225921631)
"""Unit vector towards the sun."""
SUN_HALF_ANGLE = 0.19933730363845825 / 2


class Lights(NamedTuple):
    """The key, fill and back lamp and the sun; one of them without the axis of four.

    The sun is a lamp with ``near`` zero: the way from p to its point x is x - near p.
    """

    place: Float[Array, "*four 3"]
    near: Float[Array, "*four"]
    right: Float[Array, "*four 3"]
    """Edge of the square (of the sun's disc, nearly), as long as it is."""
    up: Float[Array, "*four 3"]
    facing: Float[Array, "*four 3"]
    """Unit vector from which the front is seen."""
    half_side: Float[Array, "*four"]
    power: Float[Array, "*four"]


_SUN_ACROSS = np.array([-SUN_DIRECTION[1], SUN_DIRECTION[0], 0.0])
_SUN_ACROSS /= np.linalg.norm(_SUN_ACROSS)
_SUN_UP = np.cross(SUN_DIRECTION, _SUN_ACROSS)
_SUN_SIDE = 1.7 * float(np.tan(SUN_HALF_ANGLE))
LIGHT_COLOR = np.array([*LAMP_COLOR, (1.0, 1.0, 1.0)], np.float32)
"""Of the lamps and the sun."""


def scene_lights(scene: Scene) -> Lights:
    """The lights of one scene (no batch axes)."""
    right, up, facing = (jnp.stack(axis, axis=-1) for axis in tracking_axes(scene.lamps))
    side = np.array(LAMP_SIDE, np.float32)[:, None]

    def with_sun(lamps, sun):
        return jnp.concatenate([lamps, jnp.asarray(sun, jnp.float32)[None]])

    return Lights(
        place=with_sun(scene.lamps, SUN_DIRECTION),
        near=with_sun(jnp.ones(3), 0.0),
        right=with_sun(right * side, _SUN_SIDE * _SUN_ACROSS),
        up=with_sun(up * side, _SUN_SIDE * _SUN_UP),
        facing=with_sun(facing, SUN_DIRECTION),
        half_side=with_sun(np.array(LAMP_SIDE) / 2, SUN_HALF_ANGLE),
        power=jnp.array([*LAMP_POWER, SUN_IRRADIANCE]),
    )


def lamp_offsets(sub_sample, grid: int):
    """Point of the unit square centred at 0 for each sub-sample: one per row, column and cell."""
    a = (sub_sample % grid).astype(jnp.float32)
    b = (sub_sample // grid).astype(jnp.float32)
    return (
        (a + (b + 0.5) / grid) / grid - 0.5,
        (b + (grid - 0.5 - a) / grid) / grid - 0.5,
    )


def _way(light: Lights, p: Vec) -> Vec:
    """From p to the middle of one light."""
    return sub(unstack(light.place), scale(p, light.near))


def visibility(bodies: Bodies, lights: Lights, p: Vec, offsets, skip=None) -> Bool[Array, "4 *p"]:
    """Whether one point of each light is seen from p."""
    ox, oy = offsets

    def one(light):
        across = add(scale(unstack(light.right), ox), scale(unstack(light.up), oy))
        return ~blocked(bodies, p, add(_way(light, p), across), skip=skip)

    return jax.lax.map(one, lights)


def incident(light: Lights, p: Vec):
    """Direction to one light, irradiance across that direction, inverse squared distance."""
    way = _way(light, p)
    inverse_square = 1.0 / dot(way, way)
    direction = scale(way, jnp.sqrt(inverse_square))
    # A lamp shines to its front only.
    front = jnp.maximum(dot(direction, unstack(light.facing)), 0.0)
    irradiance = light.power * inverse_square * front
    return direction, irradiance, inverse_square


def each_channel(function, *planes):
    """``function(mix, *planes)`` for red, green, blue: ``mix`` sums grey light [4, *p] up."""

    def one(each):
        color, *values = each
        return function(lambda light: sum(color[k] * light[k] for k in range(4)), *values)

    return jax.lax.map(one, (jnp.asarray(LIGHT_COLOR).T, *planes))


def direct_diffuse(lights: Lights, p: Vec, n: Vec, visible) -> Float[Array, "4 *p"]:
    """Irradiance, grey, off each light."""

    def one(each):
        light, seen = each
        direction, irradiance, _ = incident(light, p)
        return irradiance * jnp.maximum(dot(n, direction), 0.0) * seen

    return jax.lax.map(one, (lights, visible))


def ambient_body(n: Vec):
    """Irradiance off the ground onto a body."""
    return np.pi * 0.2 * 0.5 * (1 - n[2])
