"""A ray tracer for CLEVR scenes: from a key to images and objects in one jitted call."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray, UInt8

from msdspn_jax.clevr import sampling as clevr_scenes
from msdspn_jax.clevr.objects import COLOR_RGB
from msdspn_jax.clevr.render.geometry import (
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
    unstack,
    where,
)
from msdspn_jax.clevr.sampling import Scene, lax_map, scene_bodies, scene_objects

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
ROUGH_LIT = 0.9
FOOTPRINT = 2e-4
BOUNCE = ((0.156, 0.112), (0.352, 0.258), (0.242, 0.203))
"""Radiance on the ground by shape and material of the body, over albedo and side irradiance."""

_ALBEDO = np.array(COLOR_RGB, np.float32) / 255


class Quality(NamedTuple):
    """What a pixel costs."""

    grid: int
    """A pixel is sampled grid x grid times; each sample sees one point of every lamp."""
    rough_shadows: bool
    """Whether the blurred half of a metal's reflection shows shadows."""


QUALITIES = {
    "fast": Quality(1, False),
    "default": Quality(2, False),
    "high": Quality(4, True),
}


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
_COLOR = np.array([*LAMP_COLOR, (1.0, 1.0, 1.0)], np.float32)


def _lights(scene: Scene) -> Lights:
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


def _offsets(sub_sample, grid: int):
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


def _visibility(bodies: Bodies, lights: Lights, p: Vec, offsets, skip=None) -> Bool[Array, "4 *p"]:
    """Whether one point of each light is seen from p."""
    ox, oy = offsets

    def one(light):
        across = add(scale(unstack(light.right), ox), scale(unstack(light.up), oy))
        return ~blocked(bodies, p, add(_way(light, p), across), skip=skip)

    return jax.lax.map(one, lights)


def _incident(light: Lights, p: Vec):
    """Direction to one light, irradiance across that direction, inverse squared distance."""
    way = _way(light, p)
    inverse_square = 1.0 / dot(way, way)
    direction = scale(way, jnp.sqrt(inverse_square))
    irradiance = light.power * inverse_square * dot(direction, unstack(light.facing))
    return direction, irradiance, inverse_square


def _each_channel(function, *planes):
    """``function(mix, *planes)`` for red, green, blue: ``mix`` sums grey light [4, *p] up."""

    def one(each):
        color, *values = each
        return function(lambda light: sum(color[k] * light[k] for k in range(4)), *values)

    return jax.lax.map(one, (jnp.asarray(_COLOR).T, *planes))


def _direct_diffuse(lights: Lights, p: Vec, n: Vec, visible) -> Float[Array, "4 *p"]:
    """Irradiance, grey, off each light."""

    def one(each):
        light, seen = each
        direction, irradiance, _ = _incident(light, p)
        return irradiance * jnp.maximum(dot(n, direction), 0.0) * seen

    return jax.lax.map(one, (lights, visible))


def _fresnel(ior: float, cosine):
    g = jnp.sqrt(jnp.maximum(ior * ior - 1 + cosine * cosine, 0.0))
    a = (g - cosine) / (g + cosine)
    b = (cosine * (g + cosine) - 1) / (cosine * (g - cosine) + 1)
    return 0.5 * a * a * (1 + b * b)


def _smith(alpha2, cosine2):
    """Smith's shadowing of GGX for one direction."""
    return 2.0 / (1.0 + jnp.sqrt(1.0 + alpha2 * (1.0 - cosine2) / jnp.maximum(cosine2, 1e-6)))


def _rubber(
    lights: Lights, p: Vec, n: Vec, view: Vec, albedo: Float[Array, "3 *p"], visible
) -> Float[Array, "3 *p"]:
    nv = jnp.clip(dot(n, view), 1e-3, 1.0)
    f1, f2 = _fresnel(1.2, nv), _fresnel(1.4, nv)

    def one(each):
        light, seen = each
        direction, irradiance, _ = _incident(light, p)
        nl = jnp.maximum(dot(n, direction), 0.0)
        half = normalise(add(direction, view))
        nh = jnp.clip(dot(n, half), 1e-3, 0.9999)
        vh = jnp.maximum(jnp.abs(dot(view, half)), 1e-3)
        e = irradiance * seen
        g = jnp.where(nl > 0, jnp.minimum(1.0, 2 * nh / vh * jnp.minimum(nv, nl)), 0.0) * e / nv
        nh2 = nh * nh
        sin2 = 1 - nh2
        d = jnp.exp(-nh2 / (sin2 * 0.36)) / (0.36 * np.pi * sin2 * sin2)
        beckmann = jnp.exp(-sin2 / (nh2 * 0.1225)) / (np.pi * 0.1225 * nh2 * nh2)
        return e * nl, 0.25 * d * g, 0.2 * beckmann * g

    diffuse, velvet, glossy = jax.lax.map(one, (lights, visible))
    ambient = _ambient_body(n)

    def channel(mix, albedo):
        soft = (1 - f2) / np.pi * (mix(diffuse) + ambient) + f2 * (mix(velvet) + ambient / np.pi)
        return (1 - f1) * albedo * soft + f1 * (mix(glossy) + 0.8 * ambient / np.pi)

    return _each_channel(channel, albedo)


def _metal_direct(
    lights: Lights, p: Vec, n: Vec, tangent: Vec, view: Vec, visible
) -> Float[Array, "4 *p"]:
    """Light of each lamp off both lobes, grey, before the albedo."""
    nv = jnp.clip(dot(n, view), 1e-3, 1.0)
    bitangent = cross(n, tangent)

    def one(each):
        light, seen = each
        direction, irradiance, inverse_square = _incident(light, p)
        nl = jnp.maximum(dot(n, direction), 0.0)
        half = normalise(add(direction, view))
        nh = jnp.clip(dot(n, half), 1e-3, 1.0)
        th, bh = dot(tangent, half), dot(bitangent, half)
        lit = jnp.where(nl > 0, irradiance * seen / (4 * nv), 0.0)
        ax, ay = 0.15, 0.2667
        q = (th / ax) ** 2 + (bh / ay) ** 2 + nh * nh
        rough = 0.4 / (np.pi * ax * ay * q * q)
        rough = rough * _smith(0.04, nv * nv) * _smith(0.04, nl * nl)
        # A lamp's size widens the sharp lobe.
        a2 = 0.01**2 + light.half_side**2 * inverse_square / 6 + FOOTPRINT
        q = (1 - nh * nh) / a2 + nh * nh
        sharp = 0.6 / (np.pi * a2 * q * q)
        return lit * (rough + sharp)

    return jax.lax.map(one, (lights, visible))


def _table(scene: Scene, bodies: Bodies) -> Float[Array, "10 10"]:
    """Attributes of the bodies: x, y, radius, cos, sin, shape, material, albedo."""
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


def _lookup(rows, index):
    """Each row at the index."""
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


def _three(values) -> Vec:
    x, y, z = values
    return x, y, z


def _ambient_body(n: Vec):
    """Irradiance off the ground onto a body."""
    return np.pi * 0.2 * 0.5 * (1 - n[2])


def _ambient_ground(p: Vec):
    """Irradiance on the ground off the backdrop (fitted; it grows towards the backdrop)."""
    across, _ = sweep_coordinates(p[0], p[1])
    return np.pi / GROUND_ALBEDO * (0.0124 + 0.00118 * jnp.clip(across + 14.0, -9.0, 18.0))


def _bounce_table(scene: Scene, bodies: Bodies, lights: Lights) -> Float[Array, "3 3 10"]:
    """Light that bodies throw onto the ground around them, as a + b cos φ + c sin φ by color.

    A body's side facing the azimuth φ collects the lamps' light; its first harmonic is enough.
    """
    angles = jnp.arange(16) * (2 * np.pi / 16)
    ux, uy = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]

    def one(light):
        p = (bodies.x, bodies.y, bodies.radius)
        direction, irradiance, _ = _incident(light, p)
        return irradiance * jnp.maximum(ux * direction[0] + uy * direction[1], 0.0)

    total = SIDE_AMBIENT + jnp.einsum("lc,lkj->ckj", _COLOR, jax.lax.map(one, lights))
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


def _environment(
    table, bodies: Bodies, lights: Lights, p: Vec, direction: Vec, offsets, skip, quality: Quality
) -> Float[Array, "3 2 *p"]:
    """Radiance that arrives at p along -direction: one hit, shaded.

    ``direction`` has an axis more than p, of two: the sharp reflection and the blurred one.
    """
    t, index = nearest_body(bodies, p, direction, skip=skip, steps=2)
    tg, met = ground_entry(p, direction, steps=3)
    hit = index >= 0
    met = met & ~hit
    t = jnp.where(hit, t, jnp.where(met, tg, 1.0))
    q = add(p, scale(direction, t))
    attributes = _lookup(table, jnp.maximum(index, 0))
    n, _ = _body_point(attributes, q)
    n = where(hit, n, ground_normal(q[0], q[1]))
    # index is -1 on the ground: nothing skipped.
    if quality.rough_shadows:
        visible = _visibility(bodies, lights, q, offsets, skip=index).astype(jnp.float32)
    else:
        sharp = _visibility(bodies, lights, _three(a[0] for a in q), offsets, skip=index[0])
        rough = jnp.full_like(sharp, ROUGH_LIT, jnp.float32)
        visible = jnp.stack([sharp.astype(jnp.float32), rough], axis=1)
    e = _direct_diffuse(lights, q, n, visible)
    ambient = jnp.where(hit, _ambient_body(n), _ambient_ground(q))
    # A metal seen in a metal: its rough lobe as if diffuse, its sharp one as the plain ground.
    metal = hit & (attributes[6] > 0.5)
    mirrored_z = direction[2] - 2 * dot(direction, n) * n[2]
    ground = 0.2 * jnp.clip(0.5 - 2 * mirrored_z, 0.0, 1.0)
    factor = jnp.where(metal, 0.4 / np.pi, 1.0 / np.pi)
    rest = jnp.where(metal, ground, ambient / np.pi)

    def channel(mix, albedo):
        albedo = jnp.where(hit, albedo, GROUND_ALBEDO)
        return jnp.where(hit | met, albedo * (factor * mix(e) + rest), 0.0)

    return _each_channel(channel, attributes[7:10])


def _shade_bodies(
    table,
    bodies: Bodies,
    lights: Lights,
    p: Vec,
    direction: Vec,
    index,
    visible,
    offsets,
    material: int,
    quality: Quality,
) -> Float[Array, "3 *p"]:
    attributes = _lookup(table, index)
    n, tangent = _body_point(attributes, p)
    view = scale(direction, -1.0)
    albedo = attributes[7:10]
    if material == 0:
        return _rubber(lights, p, n, view, albedo, visible)
    direct = _metal_direct(lights, p, n, tangent, view, visible)
    # Rough lobe: one of the half vectors of the anisotropic distribution. Sharp: the normal.
    ox, oy = offsets
    blur = add(scale(tangent, 0.15 * 1.8 * ox), scale(cross(n, tangent), 0.2667 * 1.8 * oy))

    def reflect(roughness):
        half = normalise(add(n, scale(blur, roughness)))
        way = add(direction, scale(half, -2 * dot(direction, half)))
        return normalise(add(way, scale(n, -2 * jnp.minimum(dot(way, n), 0.0))))

    both = jax.lax.map(reflect, jnp.array([0.0, 1.0]))
    seen = _environment(table, bodies, lights, p, both, offsets, index, quality)
    return _each_channel(
        lambda mix, albedo, seen: albedo * (mix(direct) + 0.6 * seen[0] + 0.4 * seen[1]),
        albedo,
        seen,
    )


def _srgb(x):
    """The sRGB transfer curve; roots in place of a power, which is slow on CPUs (within 5e-5)."""
    x = jnp.clip(x, 0.0, 1.0)
    root2 = jnp.sqrt(x)
    root4 = jnp.sqrt(root2)
    root8 = jnp.sqrt(root4)
    curve = 0.64239258 * root2 + 0.71207976 * root4 - 0.33685719 * root8 - 0.0175724 * x
    return jnp.where(x < 0.0031308, 12.92 * x, curve)


def _tent(planes, axis: int):
    """Reduce the sub-samples along one axis with the tent, two pixels wide, that PIL uses.

    Args:
        planes: ``planes[k]`` holds the k-th sub-sample of every pixel.
        axis: the axis of ``planes[0]`` along which they interleave.
    """
    grid = len(planes)
    n = planes[0].shape[axis]
    total = 0.0
    for k, plane in enumerate(planes):
        offset = (k + 0.5) / grid - 0.5
        total = total + (1 - abs(offset)) * plane
        if offset != 0:
            # A sample right of its pixel's centre counts for the next pixel as well.
            neighbour = np.clip(np.arange(n) - (1 if offset > 0 else -1), 0, n - 1)
            total = total + abs(offset) * jnp.take(plane, neighbour, axis=axis)
    return total / grid


def _render_scene(
    scene: Scene, height: int, width: int, quality: Quality
) -> Float[Array, "height width 3"]:
    """One scene in sRGB, 0 to 1.

    The loops over lights and channels are fences as well: XLA fuses what is not in a loop into each
    of its consumers, computes it that often and, beside a gather, without vector instructions.
    """
    grid = quality.grid
    bodies = scene_bodies(scene)
    lights = _lights(scene)
    table = _table(scene, bodies)
    camera: Vec = tuple(scene.camera[i] for i in range(3))  # type: ignore
    pixels = height * width
    total = grid * grid * pixels

    def position(sub_sample, pixel):
        """Pixels of the 480x320 image."""
        u = (pixel % width).astype(jnp.float32) + (sub_sample % grid + 0.5) / grid
        v = (pixel // width).astype(jnp.float32) + (sub_sample // grid + 0.5) / grid
        return u * (REFERENCE_WIDTH / width), v * (REFERENCE_HEIGHT / height)

    # Samples are [sub-sample, pixel].
    sub_samples = jnp.arange(grid * grid)[:, None]
    u, v = position(sub_samples, jnp.arange(pixels)[None, :])
    direction = camera_ray(scene.camera, u, v)
    offsets = _offsets(sub_samples, grid)
    t, index = nearest_body(bodies, camera, direction)
    seen = index >= 0
    distance = jnp.where(seen, t, ground_entry(camera, direction)[0])
    place = add(camera, scale(direction, distance))
    visible = _visibility(bodies, lights, place, offsets, skip=index)
    # The ground is smooth but for shadows: the rest is shaded once a pixel, at its middle.
    middle = camera_ray(scene.camera, jnp.mean(u, 0), jnp.mean(v, 0))
    middle = add(camera, scale(middle, ground_entry(camera, middle)[0]))
    normal = ground_normal(middle[0], middle[1])
    direct = _direct_diffuse(lights, middle, normal, jnp.ones(4))
    ambient = _ambient_ground(middle)
    bounce = jnp.stack(_bounce(_bounce_table(scene, bodies, lights), bodies, middle))

    def ground_channel(mix, bounce):
        lit = mix([direct[k] * visible[k] for k in range(4)])
        return _srgb((lit + ambient) * (GROUND_ALBEDO / np.pi) + bounce).reshape(total)

    ground = _each_channel(ground_channel, bounce)

    metals = jnp.sum(
        (scene.material[bodies.order] == 1) * (1 << jnp.arange(MAX_OBJECTS)), dtype=jnp.int32
    )
    index, seen = index.reshape(total), seen.reshape(total)
    stored = jnp.concatenate([jnp.stack(place), jnp.stack(direction), visible]).reshape(10, total)
    is_metal = ((metals >> jnp.maximum(index, 0)) & 1) == 1
    # Samples on bodies are shaded in dense chunks, rubber and metal apart. Scattering results back
    # is slow on CPUs, so each sample remembers its rank instead and fetches its color.
    masks, ranks, results = [], [], []
    for material, mask in enumerate((seen & ~is_metal, seen & is_metal)):
        rank = jnp.cumsum(mask) - 1
        count = rank[-1] + 1
        slots = jnp.zeros(total + CHUNK, jnp.int32)
        slots = slots.at[jnp.where(mask, rank, total + CHUNK)].set(jnp.arange(total), mode="drop")

        def chunk(i, shaded, slots=slots, material=material):
            slot = jax.lax.dynamic_slice(slots, (i * CHUNK,), (CHUNK,))
            rows = _lookup(stored, slot)
            color = _shade_bodies(
                table,
                bodies,
                lights,
                _three(rows[:3]),
                _three(rows[3:6]),
                jnp.maximum(index[slot], 0),
                rows[6:],
                _offsets(slot // pixels, grid),
                material,
                quality,
            )
            return jax.lax.dynamic_update_slice(shaded, _srgb(color), (0, i * CHUNK))

        shaded = jnp.zeros((3, total + CHUNK))
        shaded = jax.lax.fori_loop(0, (count + CHUNK - 1) // CHUNK, chunk, shaded)
        masks.append(mask)
        ranks.append(rank)
        results.append(shaded)

    def channel(each):
        plane, *shaded = each
        for mask, rank, body in zip(masks, ranks, shaded, strict=True):
            plane = jnp.where(mask, jnp.take(body, rank, mode="clip"), plane)
        plane = plane.reshape(grid, grid, height, width)
        rows = [_tent([plane[k, j] for j in range(grid)], 1) for k in range(grid)]
        return _tent(rows, 0)

    return jnp.moveaxis(jax.lax.map(channel, (ground, *results)), 0, -1)


# The public calls ------------------------------------------------------------------------------


def _checked(size: int | tuple[int, int], quality: str) -> tuple[int, int, Quality]:
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width) < 1:
        raise ValueError(f"size must be positive, got {size}")
    if quality not in QUALITIES:
        raise ValueError(f"quality must be one of {', '.join(QUALITIES)}, got {quality!r}")
    return height, width, QUALITIES[quality]


@functools.partial(jax.jit, static_argnames=("size", "quality", "group"))
def render(
    scenes: Scene,
    size: int | tuple[int, int] = 128,
    *,
    quality: str = "default",
    group: int | None = None,
) -> UInt8[Array, "batch height width 3"]:
    """Render a batch of scenes. Deterministic: there is no noise and hence no key.

    The image shows what the generator's 480x320 image shows, squashed to ``size`` the way the
    published preprocessing squashes it (PIL's bilinear reduction).

    Args:
        scenes: a batch of scenes.
        size: side of a square image, or (height, width).
        quality: "fast", "default" or "high": 1, 4 or 16 samples a pixel.
        group: how many scenes are rendered side by side. 1 is best on a CPU (arrays stay in cache,
            loops run as long as one scene needs), more on an accelerator; None chooses.

    Returns:
        sRGB images, 0 to 255.

    Raises:
        ValueError: a size or quality that does not exist.
    """
    height, width, chosen = _checked(size, quality)
    if scenes.positions.ndim != 3:
        raise ValueError(f"scenes must have one batch axis, got {scenes.positions.ndim - 2}")
    scenes = jax.tree.map(jnp.asarray, scenes)
    if group is None:
        group = 1 if jax.default_backend() == "cpu" else 16

    def one(scene):
        image = _render_scene(scene, height, width, chosen)
        return jnp.round(255 * image).astype(jnp.uint8)

    return lax_map(one, scenes, group)


@functools.partial(jax.jit, static_argnames=("size", "quality", "group", "num_objects"))
def procedural_examples(
    keys: PRNGKeyArray,
    size: int | tuple[int, int] = 128,
    *,
    quality: str = "default",
    group: int | None = None,
    num_objects: tuple[int, int] = (clevr_scenes.MIN_OBJECTS, clevr_scenes.MAX_OBJECTS),
) -> tuple[UInt8[Array, "batch height width 3"], Float[Array, "batch 10 19"]]:
    """Draw and render one fresh scene per key, so that an example depends on its own key alone.

    Args:
        keys: random keys [batch].
        size, quality, group: as in :func:`render`.
        num_objects: as in :func:`msdspn_jax.clevr.sampling.sample_scenes_from_keys`.

    Returns:
        Images, and objects in the layout of :mod:`msdspn_jax.clevr.objects`.
    """
    scenes = clevr_scenes.sample_scenes_from_keys(keys, group=group, num_objects=num_objects)
    return render(scenes, size, quality=quality, group=group), scene_objects(scenes)


def procedural_batch(
    key: PRNGKeyArray,
    batch: int,
    size: int | tuple[int, int] = 128,
    *,
    quality: str = "default",
    group: int | None = None,
) -> tuple[UInt8[Array, "batch height width 3"], Float[Array, "batch 10 19"]]:
    """Draw and render ``batch`` fresh scenes in one jitted call.

    Example i is that of ``jax.random.split(key, batch)[i]``; see :func:`procedural_examples`.
    """
    keys = jax.random.split(key, batch)
    return procedural_examples(keys, size, quality=quality, group=group)
