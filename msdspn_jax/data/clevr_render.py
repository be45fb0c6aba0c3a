"""A ray tracer for CLEVR scenes: from a key to images and objects in one jitted call."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, UInt8

from msdspn_jax.data import clevr_scenes
from msdspn_jax.data.clevr import COLOR_RGB
from msdspn_jax.data.clevr_render_geometry import (
    FAR,
    MAX_OBJECTS,
    REFERENCE_HEIGHT,
    REFERENCE_WIDTH,
    Bodies,
    Vec,
    add,
    blocked,
    body_normal,
    camera_ray,
    cross,
    dot,
    ground_entry,
    ground_normal,
    nearest_body,
    normalise,
    scale,
    sub,
    sweep_coordinates,
    tracking_axes,
    where,
)
from msdspn_jax.data.clevr_scenes import Scene, lax_map, scene_bodies

# Lights: radiance times area, colour, side of the square. Key, fill, back.
LAMP_POWER = (25.0, 7.5, 12.5)
LAMP_COLOR = ((1.0, 0.93231, 0.81666), (0.76167, 0.81772, 1.0), (1.0, 1.0, 1.0))
LAMP_SIDE = (0.5, 0.5, 1.0)
SUN_IRRADIANCE = 0.45
SUN_DIRECTION = (0.41449564695358276, -0.1945834904909134, 0.8890054225921631)
"""Unit vector towards the sun."""
SUN_HALF_ANGLE = 0.19933730363845825 / 2
GROUND_ALBEDO = 0.8

CHUNK = 2048

# Fitted against the reference renders (experiments/clevr/RENDERER.md says on which).
SIDE_AMBIENT = 0.3
BOUNCE = ((0.156, 0.112), (0.352, 0.258), (0.242, 0.203))
"""Radiance on the ground by shape and material of the body, over albedo and side irradiance."""

_ALBEDO = np.array(COLOR_RGB, np.float32) / 255


class Lights(NamedTuple):
    places: list[Vec]
    axes: list[tuple[Vec, Vec, Vec]]


def _lights(scene: Scene) -> Lights:
    places, axes = [], []
    for k in range(3):
        axis = tracking_axes(scene.lamps[k])
        axes.append(axis)
        places.append(tuple(scene.lamps[k][i] for i in range(3)))
    return Lights(places, axes)


_SUN_FRAME = tuple(
    tuple(float(x) for x in v)
    for v in (
        np.cross([0, 0, 1.0], SUN_DIRECTION) / np.linalg.norm(np.cross([0, 0, 1.0], SUN_DIRECTION)),
        np.cross(
            SUN_DIRECTION,
            np.cross([0, 0, 1.0], SUN_DIRECTION)
            / np.linalg.norm(np.cross([0, 0, 1.0], SUN_DIRECTION)),
        ),
    )
)


def _offsets(sub_sample):
    """Stratified point of the unit square centred at 0 for each of the four sub-samples."""
    b0, b1 = (sub_sample & 1) * 2 - 1, (sub_sample >> 1) * 2 - 1
    a, b = b0.astype(jnp.float32), b1.astype(jnp.float32)
    return 0.25 * a - 0.125 * b, 0.25 * b + 0.125 * a


def _visibility(bodies: Bodies, lights: Lights, p: Vec, sub_sample, skip=None):
    """Four masks 0/1: key, fill, back, sun."""
    ox, oy = _offsets(sub_sample)
    targets = [
        add(place, add(scale(axes[0], ox * side), scale(axes[1], oy * side)))
        for place, axes, side in zip(lights.places, lights.axes, LAMP_SIDE, strict=True)
    ]
    r = 1.7 * float(np.tan(SUN_HALF_ANGLE))
    sun = add(
        SUN_DIRECTION,  # type: ignore
        add(scale(_SUN_FRAME[0], ox * r), scale(_SUN_FRAME[1], oy * r)),
    )
    bits = blocked(bodies, p, targets, [sun], skip=skip)
    return [1.0 - ((bits >> k) & 1).astype(jnp.float32) for k in range(4)]


def _incident(lights: Lights, p: Vec):
    """Direction to each light and irradiance (grey, colour) across that direction."""
    for place, axes, power, color in zip(
        lights.places, lights.axes, LAMP_POWER, LAMP_COLOR, strict=True
    ):
        d = sub(place, p)
        inverse_square = 1.0 / dot(d, d)
        direction = scale(d, jnp.sqrt(inverse_square))
        yield direction, power * dot(direction, axes[2]) * inverse_square, color
    yield SUN_DIRECTION, SUN_IRRADIANCE, (1.0, 1.0, 1.0)


def _direct_diffuse(lights: Lights, p: Vec, n: Vec, visible) -> Vec:
    """Irradiance."""
    total = (0.0, 0.0, 0.0)
    for (direction, irradiance, color), v in zip(_incident(lights, p), visible, strict=True):
        e = irradiance * jnp.maximum(dot(n, direction), 0.0) * v
        total = tuple(t + e * c for t, c in zip(total, color, strict=True))
    return total  # type: ignore


def _fresnel(ior: float, cosine):
    g = jnp.sqrt(jnp.maximum(ior * ior - 1 + cosine * cosine, 0.0))
    a = (g - cosine) / (g + cosine)
    b = (cosine * (g + cosine) - 1) / (cosine * (g - cosine) + 1)
    return 0.5 * a * a * (1 + b * b)


def _smith(alpha2, cosine2):
    """Smith's shadowing of GGX for one direction."""
    return 2.0 / (1.0 + jnp.sqrt(1.0 + alpha2 * (1.0 - cosine2) / jnp.maximum(cosine2, 1e-6)))


def _rubber(lights: Lights, p: Vec, n: Vec, view: Vec, albedo: Vec, visible, ambient: Vec) -> Vec:
    nv = jnp.clip(dot(n, view), 1e-3, 1.0)
    f1, f2 = _fresnel(1.2, nv), _fresnel(1.4, nv)
    diffuse, velvet, glossy = (0.0,) * 3, (0.0,) * 3, (0.0,) * 3
    for (direction, irradiance, color), v in zip(_incident(lights, p), visible, strict=True):
        nl = jnp.maximum(dot(n, direction), 0.0)
        half = normalise(add(direction, view))
        nh = jnp.clip(dot(n, half), 1e-3, 0.9999)
        vh = jnp.maximum(jnp.abs(dot(view, half)), 1e-3)
        e = irradiance * v
        nh2 = nh * nh
        sin2 = 1 - nh2
        d = jnp.exp(-nh2 / (sin2 * 0.36)) / (0.36 * np.pi * sin2 * sin2)
        g = jnp.minimum(1.0, 2 * nh / vh * jnp.minimum(nv, nl))
        w = jnp.where(nl > 0, 0.25 * d * g / nv, 0.0) * e
        beckmann = jnp.exp(-sin2 / (nh2 * 0.1225)) / (np.pi * 0.1225 * nh2 * nh2)
        s = jnp.where(nl > 0, 0.8 * beckmann * g / (4 * nv), 0.0) * e
        diffuse = tuple(a + e * nl * c for a, c in zip(diffuse, color, strict=True))
        velvet = tuple(a + w * c for a, c in zip(velvet, color, strict=True))
        glossy = tuple(a + s * c for a, c in zip(glossy, color, strict=True))
    return tuple(
        (1 - f1) * c * ((1 - f2) / np.pi * (dd + aa) + f2 * (vv + aa / np.pi))
        + f1 * (gg + 0.8 * aa / np.pi)
        for c, dd, aa, vv, gg in zip(albedo, diffuse, ambient, velvet, glossy, strict=True)
    )  # type: ignore


def _metal_direct(lights, p: Vec, n: Vec, tangent: Vec, view: Vec, visible, footprint) -> Vec:
    """Light of the lamps off both lobes, before the albedo."""
    nv = jnp.clip(dot(n, view), 1e-3, 1.0)
    bitangent = cross(n, tangent)
    total = (0.0,) * 3
    sides = (*LAMP_SIDE, 2 * SUN_HALF_ANGLE)
    for k, (direction, irradiance, color) in enumerate(_incident(lights, p)):
        nl = jnp.maximum(dot(n, direction), 0.0)
        half = normalise(add(direction, view))
        nh = jnp.clip(dot(n, half), 1e-3, 1.0)
        th, bh = dot(tangent, half), dot(bitangent, half)
        lit = jnp.where(nl > 0, irradiance * visible[k] / (4 * nv), 0.0)
        ax, ay = 0.15, 0.2667
        q = (th / ax) ** 2 + (bh / ay) ** 2 + nh * nh
        rough = 0.4 / (np.pi * ax * ay * q * q)
        rough = rough * _smith(0.04, nv * nv) * _smith(0.04, nl * nl)
        if k < 3:
            d = sub(lights.places[k], p)
            spread2 = (sides[k] / 2) ** 2 / dot(d, d)
        else:
            spread2 = SUN_HALF_ANGLE**2
        a2 = 0.01**2 + spread2 / 6 + footprint
        q = (1 - nh * nh) / a2 + nh * nh
        sharp = 0.6 / (np.pi * a2 * q * q)
        value = lit * (rough + sharp)
        total = tuple(t + value * c for t, c in zip(total, color, strict=True))
    return total  # type: ignore


class Table(NamedTuple):
    """Attributes of the bodies by column, for one matrix product with one-hot rows."""

    columns: Float[Array, "11 11"]


def _table(scene: Scene, bodies: Bodies) -> Float[Array, "10 10"]:
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
        ],
        axis=0,
    )


def _lookup(table, index):
    return [jnp.take(row, index, mode="clip") for row in table]


def _body_point(attributes, p: Vec):
    """Normal (world) and tangent about the vertical axis."""
    x, y, r, c, s, shape = attributes[:6]
    q = ((p[0] - x) / r, (p[1] - y) / r, (p[2] - r) / r)
    local = (c * q[0] + s * q[1], c * q[1] - s * q[0], q[2])
    n = body_normal(shape, local)
    n = (c * n[0] - s * n[1], s * n[0] + c * n[1], n[2])
    tangent = (-q[1], q[0], jnp.zeros_like(q[0]))
    tangent = sub(tangent, scale(n, dot(tangent, n)))
    return n, normalise(tangent), q


def _ambient_body(n: Vec, q: Vec) -> Vec:
    """Irradiance off the ground onto a body."""
    e = np.pi * 0.2 * 0.5 * (1 - n[2])
    return (e, e, e)


def _ambient_ground(p: Vec) -> Vec:
    """Irradiance on the ground off the backdrop (fitted; it grows towards the backdrop)."""
    across, _ = sweep_coordinates(p[0], p[1])
    e = np.pi / GROUND_ALBEDO * (0.0124 + 0.00118 * jnp.clip(across + 14.0, -9.0, 18.0))
    return (e, e, e)


def _bounce_table(scene: Scene, bodies: Bodies, lights: Lights) -> Float[Array, "3 3 10"]:
    """Light that bodies throw onto the ground around them, as a + b cos φ + c sin φ by color.

    A body's side facing the azimuth φ collects the lamps' light; its first harmonic is enough.
    """
    angles = jnp.arange(16) * (2 * np.pi / 16)
    ux, uy = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    total = jnp.full((3, 16, MAX_OBJECTS), SIDE_AMBIENT)
    for direction, irradiance, color in _incident(lights, (bodies.x, bodies.y, bodies.radius)):
        side = irradiance * jnp.maximum(ux * direction[0] + uy * direction[1], 0.0)
        total = total + jnp.asarray(color)[:, None, None] * side
    basis = jnp.stack([jnp.ones(16), 2 * jnp.cos(angles), 2 * jnp.sin(angles)]) / 16
    strength = jnp.asarray(BOUNCE)[scene.shape[bodies.order], scene.material[bodies.order]]
    strength = jnp.where(jnp.arange(MAX_OBJECTS) < bodies.first[3], strength, 0.0)
    albedo = jnp.asarray(_ALBEDO)[scene.color[bodies.order]].T
    return jnp.einsum("hk,ckj->chj", basis, total) * (albedo * strength)[:, None, :]


def _bounce(table, bodies: Bodies, p: Vec) -> Vec:
    """Radiance that bodies add to the ground at p, by the form factor of a ball at each."""

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


def _shade_ground(bodies, lights, p: Vec, sub_sample) -> Vec:
    n = ground_normal(p[0], p[1])
    visible = _visibility(bodies, lights, p, sub_sample)
    e = add(_direct_diffuse(lights, p, n, visible), _ambient_ground(p))
    return scale(e, GROUND_ALBEDO / np.pi)


def _environment(table, bodies, lights, p: Vec, direction: Vec, sub_sample, skip) -> Vec:
    """Radiance that arrives at p along -direction: one hit, shaded."""
    t, index = nearest_body(bodies, p, direction, skip=skip, steps=2)
    tg, met = ground_entry(p, direction, steps=3)
    hit = index >= 0
    met = met & ~hit
    t = jnp.where(hit, t, jnp.where(met, tg, 1.0))
    q = add(p, scale(direction, t))
    attributes = _lookup(table, jnp.maximum(index, 0))
    n, tangent, _ = _body_point(attributes, q)
    n = where(hit, n, ground_normal(q[0], q[1]))
    visible = _visibility(bodies, lights, q, sub_sample, skip=jnp.where(hit, index, -1))
    e = _direct_diffuse(lights, q, n, visible)
    ambient = where(hit, _ambient_body(n, q), _ambient_ground(q))
    albedo = where(hit, tuple(attributes[7:10]), (GROUND_ALBEDO,) * 3)  # type: ignore
    diffuse = tuple(a * (x + y) / np.pi for a, x, y in zip(albedo, e, ambient, strict=True))
    metal = hit & (attributes[6] > 0.5)
    view = scale(direction, -1.0)
    specular = _metal_direct(lights, q, n, tangent, view, visible, 1e-3)
    mirrored = add(direction, scale(n, -2 * dot(direction, n)))
    sky = 0.2 * jnp.clip(0.5 - 2 * mirrored[2], 0.0, 1.0)
    specular = tuple(a * (s + sky) for a, s in zip(albedo, specular, strict=True))
    result = where(metal, specular, diffuse)  # type: ignore
    return where(hit | met, result, (0.0,) * 3)


def _shade_bodies(
    table, bodies, lights, origin: Vec, direction: Vec, t, index, sub_sample, material, footprint
):
    p = add(origin, scale(direction, t))
    attributes = _lookup(table, index)
    n, tangent, q = _body_point(attributes, p)
    view = scale(direction, -1.0)
    albedo = tuple(attributes[7:10])
    visible = _visibility(bodies, lights, p, sub_sample, skip=index)
    if material == 0:
        return _rubber(lights, p, n, view, albedo, visible, _ambient_body(n, q))
    direct = _metal_direct(lights, p, n, tangent, view, visible, footprint)
    mirrored = add(direction, scale(n, -2 * dot(direction, n)))
    sharp = _environment(table, bodies, lights, p, mirrored, sub_sample, index)
    # Rough lobe: one of four half vectors of the anisotropic distribution.
    ox, oy = _offsets(sub_sample)
    radius = 0.75
    bitangent = cross(n, tangent)
    half = normalise(
        add(
            n,
            add(
                scale(tangent, 0.15 * radius * 2.4 * ox),
                scale(bitangent, 0.2667 * radius * 2.4 * oy),
            ),
        )
    )
    rough = add(direction, scale(half, -2 * dot(direction, half)))
    below = jnp.minimum(dot(rough, n), 0.0)
    rough = normalise(add(rough, scale(n, -2 * below)))
    rough = _environment(table, bodies, lights, p, rough, sub_sample, index)
    return tuple(
        c * (d + 0.6 * s + 0.4 * r) for c, d, s, r in zip(albedo, direct, sharp, rough, strict=True)
    )


def _srgb(x):
    x = jnp.clip(x, 0.0, 1.0)
    return jnp.where(x < 0.0031308, 12.92 * x, 1.055 * jnp.maximum(x, 1e-4) ** (1 / 2.4) - 0.055)


def _tent(image, axis: int):
    """Average pairs of sub-samples along an axis of length 2 n with the tent that PIL uses."""
    n = image.shape[axis] // 2
    index = jnp.arange(n)
    take = lambda i: jnp.take(image, jnp.clip(i, 0, 2 * n - 1), axis=axis)  # noqa: E731
    inner = take(2 * index) + take(2 * index + 1)
    outer = take(2 * index - 1) + take(2 * index + 2)
    return 0.375 * inner + 0.125 * outer


def render_scene(scene: Scene, height: int, width: int) -> Float[Array, "height width 3"]:
    bodies = scene_bodies(scene)
    lights = _lights(scene)
    table = _table(scene, bodies)
    camera: Vec = tuple(scene.camera[i] for i in range(3))  # type: ignore
    rows, columns = 2 * height, 2 * width
    total = rows * columns
    su, sv = REFERENCE_WIDTH / columns, REFERENCE_HEIGHT / rows

    def ray(index):
        y, x = index // columns, index % columns
        u = (x.astype(jnp.float32) + 0.5) * su
        v = (y.astype(jnp.float32) + 0.5) * sv
        return camera_ray(scene.camera, u, v), (y % 2) * 2 + x % 2

    samples = jnp.arange(total)
    direction, sub_sample = ray(samples)
    t, index = nearest_body(bodies, camera, direction)
    tg, _ = ground_entry(camera, direction)
    floor = add(camera, scale(direction, tg))
    ground = _shade_ground(bodies, lights, floor, sub_sample)
    # The bounce is smooth: once a pixel is enough.
    coarse = tuple(x.reshape(rows, columns)[::2, ::2].reshape(-1) for x in floor)
    bounce = jnp.stack(_bounce(_bounce_table(scene, bodies, lights), bodies, coarse))
    bounce = bounce.reshape(3, height, 1, width, 1)
    bounce = jnp.broadcast_to(bounce, (3, height, 2, width, 2)).reshape(3, total)
    metals = jnp.sum(
        (scene.material[bodies.order] == 1) * (1 << jnp.arange(MAX_OBJECTS)), dtype=jnp.int32
    )
    is_metal = ((metals >> jnp.maximum(index, 0)) & 1) == 1
    seen = index >= 0
    # Samples on bodies are shaded in dense chunks, rubber and metal apart. Scattering results back
    # is slow on CPUs, so each sample remembers its rank instead and fetches its color.
    colors = jnp.stack(ground) + bounce
    for material, mask in enumerate((seen & ~is_metal, seen & is_metal)):
        rank = jnp.cumsum(mask) - 1
        count = rank[-1] + 1
        slots = jnp.zeros(total + CHUNK, jnp.int32)
        slots = slots.at[jnp.where(mask, rank, total + CHUNK)].set(samples, mode="drop")

        def chunk(i, shaded, slots=slots, material=material):
            slot = jax.lax.dynamic_slice(slots, (i * CHUNK,), (CHUNK,))
            d, sub_sample = ray(slot)
            color = _shade_bodies(
                table,
                bodies,
                lights,
                camera,
                d,
                t[slot],
                jnp.maximum(index[slot], 0),
                sub_sample,
                material,
                2e-4,
            )
            return jax.lax.dynamic_update_slice(shaded, jnp.stack(color), (0, i * CHUNK))

        shaded = jnp.zeros((3, total + CHUNK))
        shaded = jax.lax.fori_loop(0, (count + CHUNK - 1) // CHUNK, chunk, shaded)
        colors = jnp.where(mask, jnp.take(shaded, rank, axis=1, mode="clip"), colors)
    image = colors.T
    image = _srgb(image).reshape(rows, columns, 3)
    return _tent(_tent(image, 0), 1)


@functools.partial(jax.jit, static_argnames=("height", "width", "group"))
def render_float(scenes: Scene, height=128, width=128, group=1):
    return lax_map(lambda s: render_scene(s, height, width), scenes, group)
