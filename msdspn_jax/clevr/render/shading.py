"""What comes back from a point of a CLEVR scene: rubber, metal with one reflection, the ground."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from msdspn_jax.clevr.objects import COLOR_RGB, MAX_OBJECTS
from msdspn_jax.clevr.render.geometry import (
    Bodies,
    body_normal,
    ground_entry,
    ground_normal,
    nearest_body,
    scene_bodies,
    sweep_coordinates,
)
from msdspn_jax.clevr.render.lights import (
    LIGHT_COLOR,
    Lights,
    ambient_body,
    direct_diffuse,
    each_channel,
    incident,
    scene_lights,
    visibility,
)
from msdspn_jax.clevr.render.materials import RUBBER, metal_direct, rubber
from msdspn_jax.clevr.scene import Scene
from msdspn_jax.clevr.vectors import Vec, add, cross, dot, normalise, scale, sub, vec, where

GROUND_ALBEDO = 0.8

# Light that ground and backdrop throw on each other: polynomials across the sweep and along it,
# computed by radiosity (experiments/clevr/backdrop.py).
AMBIENT = (0.0588, 0.04831, -0.00114, 0.01078, 0.11253, -0.0548, -0.2637, 0.02134, 0.15062)
AMBIENT_ALONG = (-0.0116, -0.05)

# Fitted against the reference renders (experiments/clevr/RENDERER.md says on which).
SIDE_AMBIENT = 0.3
ROUGH_LIT = 0.9
BOUNCE = ((0.156, 0.112), (0.352, 0.258), (0.242, 0.203))
"""Radiance on the ground by shape and material of the body, over albedo and side irradiance."""

_ALBEDO = np.array(COLOR_RGB, np.float32) / 255


class Stage(NamedTuple):
    """One scene made ready for shading."""

    bodies: Bodies
    lights: Lights
    table: Float[Array, "10 10"]
    """Attributes of the bodies: x, y, radius, cos, sin, shape, material, albedo."""
    bounce: Float[Array, "3 3 10"]
    """Light that bodies throw onto the ground around them, as a + b cos φ + c sin φ by color."""


def prepare(scene: Scene) -> Stage:
    """Sort the bodies of one scene (no batch axes) and tabulate what shading asks for."""
    bodies = scene_bodies(scene)
    lights = scene_lights(scene)
    table = _body_table(scene, bodies)
    return Stage(bodies, lights, table, _bounce_table(scene, bodies, lights))


class GroundLight(NamedTuple):
    """Light on the ground but for shadows."""

    direct: Float[Array, "4 *p"]
    """Irradiance off each light, grey."""
    ambient: Float[Array, "*p"]
    """Irradiance off the rest of the ground and the backdrop."""
    bounce: Float[Array, "3 *p"]
    """Radiance that bodies add."""


def ground_light(stage: Stage, p: Vec) -> GroundLight:
    """Light on the ground at p, were nothing in its shadow."""
    normal = ground_normal(p[0], p[1])
    direct = direct_diffuse(stage.lights, p, normal, jnp.ones(4))
    ambient = ambient_ground(*sweep_coordinates(p[0], p[1]))
    return GroundLight(direct, ambient, jnp.stack(_bounce(stage, p)))


def ground_color(light: GroundLight, visible) -> Float[Array, "3 *samples"]:
    """sRGB of the ground where the lights that are ``visible`` [4, *samples] reach it."""

    def channel(mix, bounce):
        lit = mix([light.direct[k] * visible[k] for k in range(4)])
        return srgb((lit + light.ambient) * (GROUND_ALBEDO / np.pi) + bounce)

    return each_channel(channel, light.bounce)


def body_color(
    stage: Stage,
    p: Vec,
    direction: Vec,
    index,
    visible,
    offsets,
    *,
    material: int,
    rough_shadows: bool,
) -> Float[Array, "3 *p"]:
    """sRGB of points on bodies of one material.

    Args:
        stage: the scene.
        p: the points.
        direction: of the rays that meet them.
        index: which bodies they are on.
        visible: which lights reach them [4, *p].
        offsets: the points of the lamps that they see, see `lights.lamp_offsets`.
        material: `RUBBER` or `METAL`, of all points.
        rough_shadows: whether the blurred half of a metal's reflection shows shadows.
    """
    attributes = lookup(stage.table, index)
    n, tangent = _body_point(attributes, p)
    view = scale(direction, -1.0)
    albedo = attributes[7:10]
    if material == RUBBER:
        return srgb(rubber(stage.lights, p, n, view, albedo, visible))
    direct = metal_direct(stage.lights, p, n, tangent, view, visible)
    # Rough lobe: one of the half vectors of the anisotropic distribution. Sharp: the normal.
    ox, oy = offsets
    blur = add(scale(tangent, 0.15 * 1.8 * ox), scale(cross(n, tangent), 0.2667 * 1.8 * oy))

    def reflect(roughness):
        half = normalise(add(n, scale(blur, roughness)))
        way = add(direction, scale(half, -2 * dot(direction, half)))
        return normalise(add(way, scale(n, -2 * jnp.minimum(dot(way, n), 0.0))))

    both = jax.lax.map(reflect, jnp.array([0.0, 1.0]))
    seen = _environment(stage, p, both, offsets, index, rough_shadows)
    color = each_channel(
        lambda mix, albedo, seen: albedo * (mix(direct) + 0.6 * seen[0] + 0.4 * seen[1]),
        albedo,
        seen,
    )
    return srgb(color)


def srgb(x):
    """The sRGB transfer curve; roots in place of a power, which is slow on CPUs (within 5e-5)."""
    x = jnp.clip(x, 0.0, 1.0)
    root2 = jnp.sqrt(x)
    root4 = jnp.sqrt(root2)
    root8 = jnp.sqrt(root4)
    curve = 0.64239258 * root2 + 0.71207976 * root4 - 0.33685719 * root8 - 0.0175724 * x
    return jnp.where(x < 0.0031308, 12.92 * x, curve)


# Surroundings ---------------------------------------------------------------------------------


def _body_table(scene: Scene, bodies: Bodies) -> Float[Array, "10 10"]:
    albedo = jnp.asarray(_ALBEDO)[scene.color[bodies.order]]
    return jnp.stack(
        [
            bodies.x,
            bodies.y,
            bodies.radius,
            bodies.cos,
            bodies.sin,
            scene.shape[bodies.order].astype(jnp.float32),
            scene.material[bodies.order].astype(jnp.float32),
            *albedo.T,
        ]
    )


def lookup(rows, index):
    """Each row of a table at the index."""
    return jax.lax.map(lambda row: jnp.take(row, index, mode="clip"), rows)


def _body_point(attributes, p: Vec):
    """Normal (world) and tangent about the vertical axis."""
    x, y, r, c, s, shape = attributes[:6]
    q = ((p[0] - x) / r, (p[1] - y) / r, (p[2] - r) / r)
    local = (c * q[0] + s * q[1], c * q[1] - s * q[0], q[2])
    n = body_normal(shape, local)
    n = (c * n[0] - s * n[1], s * n[0] + c * n[1], n[2])
    tangent = (-q[1], q[0], jnp.zeros_like(q[0]))
    tangent = sub(tangent, scale(n, dot(tangent, n)))
    return n, normalise(tangent)


def ambient_ground(across: jax.Array, along: jax.Array) -> jax.Array:
    """Irradiance that ground and backdrop throw on each other, at sweep coordinates."""
    u, v = jnp.minimum((across + 12.0) / 12.0, 1.05), (along + 26.58) / 10.0
    total = jnp.full_like(u, AMBIENT[-1])
    for coefficient in reversed(AMBIENT[:-1]):
        total = total * u + coefficient
    return total * (1 + AMBIENT_ALONG[0] * v + AMBIENT_ALONG[1] * v * v)


def _bounce_table(scene: Scene, bodies: Bodies, lights: Lights) -> Float[Array, "3 3 10"]:
    """See `Stage.bounce`.

    A body's side facing the azimuth φ collects the lamps' light; its first harmonic is enough.
    """
    angles = jnp.arange(16) * (2 * np.pi / 16)
    ux, uy = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]

    def one(light):
        p = (bodies.x, bodies.y, bodies.radius)
        direction, irradiance, _ = incident(light, p)
        return irradiance * jnp.maximum(ux * direction[0] + uy * direction[1], 0.0)

    total = SIDE_AMBIENT + jnp.einsum("lc,lkj->ckj", LIGHT_COLOR, jax.lax.map(one, lights))
    basis = jnp.stack([jnp.ones(16), 2 * jnp.cos(angles), 2 * jnp.sin(angles)]) / 16
    strength = jnp.asarray(BOUNCE)[scene.shape[bodies.order], scene.material[bodies.order]]
    strength = jnp.where(jnp.arange(MAX_OBJECTS) < bodies.first[3], strength, 0.0)
    albedo = jnp.asarray(_ALBEDO)[scene.color[bodies.order]].T
    return jnp.einsum("hk,ckj->chj", basis, total) * (albedo * strength)[:, None, :]


def _bounce(stage: Stage, p: Vec) -> Vec:
    """Radiance that bodies add to the ground at p, by the form factor of a ball at each."""
    bodies, table = stage.bodies, stage.bounce

    def body(i, total):
        dx, dy = p[0] - bodies.x[i], p[1] - bodies.y[i]
        squared = dx * dx + dy * dy + 1e-6
        inverse = jax.lax.rsqrt(squared)
        ux, uy = dx * inverse, dy * inverse
        q = bodies.radius[i] * jax.lax.rsqrt(squared + bodies.radius[i] ** 2)
        factor = q * q * q
        return tuple(
            total[c]
            + factor * jnp.maximum(table[c, 0, i] + table[c, 1, i] * ux + table[c, 2, i] * uy, 0.0)
            for c in range(3)
        )

    return jax.lax.fori_loop(0, bodies.first[3], body, (jnp.zeros_like(p[0]),) * 3)


def _environment(
    stage: Stage, p: Vec, direction: Vec, offsets, skip, rough_shadows: bool
) -> Float[Array, "3 2 *p"]:
    """Radiance that arrives at p along -direction: one hit, shaded.

    ``direction`` has an axis more than p, of two: the sharp reflection and the blurred one.
    """
    bodies, lights = stage.bodies, stage.lights
    t, index = nearest_body(bodies, p, direction, skip=skip, steps=2)
    tg, met = ground_entry(p, direction, steps=3)
    hit = index >= 0
    met = met & ~hit
    t = jnp.where(hit, t, jnp.where(met, tg, 1.0))
    q = add(p, scale(direction, t))
    attributes = lookup(stage.table, jnp.maximum(index, 0))
    n, _ = _body_point(attributes, q)
    n = where(hit, n, ground_normal(q[0], q[1]))
    # index is -1 on the ground: nothing skipped.
    if rough_shadows:
        visible = visibility(bodies, lights, q, offsets, skip=index).astype(jnp.float32)
    else:
        sharp = visibility(bodies, lights, vec(a[0] for a in q), offsets, skip=index[0])
        rough = jnp.full_like(sharp, ROUGH_LIT, jnp.float32)
        visible = jnp.stack([sharp.astype(jnp.float32), rough], axis=1)
    e = direct_diffuse(lights, q, n, visible)
    ambient = jnp.where(hit, ambient_body(n), ambient_ground(*sweep_coordinates(q[0], q[1])))
    # A metal seen in a metal: its rough lobe as if diffuse, its sharp one as the plain ground.
    metal = hit & (attributes[6] > 0.5)
    mirrored_z = direction[2] - 2 * dot(direction, n) * n[2]
    ground = 0.2 * jnp.clip(0.5 - 2 * mirrored_z, 0.0, 1.0)
    factor = jnp.where(metal, 0.4 / np.pi, 1.0 / np.pi)
    rest = jnp.where(metal, ground, ambient / np.pi)

    def channel(mix, albedo):
        albedo = jnp.where(hit, albedo, GROUND_ALBEDO)
        return jnp.where(hit | met, albedo * (factor * mix(e) + rest), 0.0)

    return each_channel(channel, attributes[7:10])
