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
from msdspn_jax.data.clevr_scenes import Scene, lax_map, scene_bodies, scene_objects

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
    places: list[Vec]
    axes: list[tuple[Vec, Vec, Vec]]


def _lights(scene: Scene) -> Lights:
    places, axes = [], []
    for k in range(3):
        axis = tracking_axes(scene.lamps[k])
        axes.append(axis)
        places.append(tuple(scene.lamps[k][i] for i in range(3)))
    return Lights(places, axes)


_SUN_ACROSS = np.array([-SUN_DIRECTION[1], SUN_DIRECTION[0], 0.0])
_SUN_ACROSS /= np.linalg.norm(_SUN_ACROSS)
_SUN_UP = np.cross(SUN_DIRECTION, _SUN_ACROSS)


def _offsets(sub_sample, grid: int):
    """Point of the unit square centred at 0 for each sub-sample: one per row, column and cell."""
    a = (sub_sample % grid).astype(jnp.float32)
    b = (sub_sample // grid).astype(jnp.float32)
    return (
        (a + (b + 0.5) / grid) / grid - 0.5,
        (b + (grid - 0.5 - a) / grid) / grid - 0.5,
    )


def _visibility(bodies: Bodies, lights: Lights, p: Vec, offsets, skip=None):
    """Whether a point of the key, fill and back lamp and of the sun is seen from p: 0.0 or 1.0."""
    ox, oy = offsets
    targets = [
        add(place, add(scale(axes[0], ox * side), scale(axes[1], oy * side)))
        for place, axes, side in zip(lights.places, lights.axes, LAMP_SIDE, strict=True)
    ]
    r = 1.7 * float(np.tan(SUN_HALF_ANGLE))
    sun = add(
        SUN_DIRECTION,  # type: ignore
        add(scale(_three(_SUN_ACROSS.tolist()), ox * r), scale(_three(_SUN_UP.tolist()), oy * r)),
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


def _three(values) -> Vec:
    x, y, z = values
    return x, y, z


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


def _shade_ground(bodies, lights, p: Vec, offsets) -> Vec:
    n = ground_normal(p[0], p[1])
    visible = _visibility(bodies, lights, p, offsets)
    e = add(_direct_diffuse(lights, p, n, visible), _ambient_ground(p))
    return scale(e, GROUND_ALBEDO / np.pi)


def _environment(
    table, bodies, lights, p: Vec, direction: Vec, offsets, skip, shadows: bool
) -> Vec:
    """Radiance that arrives at p along -direction: one hit, shaded."""
    t, index = nearest_body(bodies, p, direction, skip=skip, steps=2)
    tg, met = ground_entry(p, direction, steps=3)
    hit = index >= 0
    met = met & ~hit
    t = jnp.where(hit, t, jnp.where(met, tg, 1.0))
    q = add(p, scale(direction, t))
    attributes = _lookup(table, jnp.maximum(index, 0))
    n, _, _ = _body_point(attributes, q)
    n = where(hit, n, ground_normal(q[0], q[1]))
    if shadows:
        visible = _visibility(bodies, lights, q, offsets, skip=jnp.where(hit, index, -1))
    else:
        visible = (ROUGH_LIT,) * 4
    e = _direct_diffuse(lights, q, n, visible)
    ambient = where(hit, _ambient_body(n, q), _ambient_ground(q))
    albedo = where(hit, _three(attributes[7:10]), _three([GROUND_ALBEDO] * 3))
    diffuse = tuple(a * (x + y) / np.pi for a, x, y in zip(albedo, e, ambient, strict=True))
    # A metal seen in a metal: its rough lobe as if diffuse, its sharp one as the plain ground.
    metal = hit & (attributes[6] > 0.5)
    mirrored_z = direction[2] - 2 * dot(direction, n) * n[2]
    ground = 0.2 * jnp.clip(0.5 - 2 * mirrored_z, 0.0, 1.0)
    specular = tuple(a * (0.4 / np.pi * x + ground) for a, x in zip(albedo, e, strict=True))
    result = where(metal, _three(specular), _three(diffuse))
    return where(hit | met, result, (0.0, 0.0, 0.0))


def _shade_bodies(
    table,
    bodies,
    lights,
    origin: Vec,
    direction: Vec,
    t,
    index,
    offsets,
    material,
    quality: Quality,
):
    p = add(origin, scale(direction, t))
    attributes = _lookup(table, index)
    n, tangent, q = _body_point(attributes, p)
    view = scale(direction, -1.0)
    albedo = _three(attributes[7:10])
    visible = _visibility(bodies, lights, p, offsets, skip=index)
    if material == 0:
        return _rubber(lights, p, n, view, albedo, visible, _ambient_body(n, q))
    direct = _metal_direct(lights, p, n, tangent, view, visible, FOOTPRINT)
    mirrored = add(direction, scale(n, -2 * dot(direction, n)))
    sharp = _environment(table, bodies, lights, p, mirrored, offsets, index, True)
    # Rough lobe: one of four half vectors of the anisotropic distribution.
    ox, oy = offsets
    bitangent = cross(n, tangent)
    half = normalise(
        add(
            n,
            add(
                scale(tangent, 0.15 * 1.8 * ox),
                scale(bitangent, 0.2667 * 1.8 * oy),
            ),
        )
    )
    rough = add(direction, scale(half, -2 * dot(direction, half)))
    below = jnp.minimum(dot(rough, n), 0.0)
    rough = normalise(add(rough, scale(n, -2 * below)))
    rough = _environment(table, bodies, lights, p, rough, offsets, index, quality.rough_shadows)
    return tuple(
        c * (d + 0.6 * s + 0.4 * r) for c, d, s, r in zip(albedo, direct, sharp, rough, strict=True)
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
    """One scene in sRGB, 0 to 1."""
    grid = quality.grid
    bodies = scene_bodies(scene)
    lights = _lights(scene)
    table = _table(scene, bodies)
    camera: Vec = tuple(scene.camera[i] for i in range(3))  # type: ignore
    pixels = height * width
    total = grid * grid * pixels

    def ray(index):
        sub_sample, pixel = index // pixels, index % pixels
        y, x = pixel // width, pixel % width
        u = x.astype(jnp.float32) + (sub_sample % grid + 0.5) / grid
        v = y.astype(jnp.float32) + (sub_sample // grid + 0.5) / grid
        u, v = u * (REFERENCE_WIDTH / width), v * (REFERENCE_HEIGHT / height)
        return camera_ray(scene.camera, u, v), _offsets(sub_sample, grid)

    samples = jnp.arange(total)
    direction, offsets = ray(samples)
    t, index = nearest_body(bodies, camera, direction)
    tg, _ = ground_entry(camera, direction)
    floor = add(camera, scale(direction, tg))
    ground = _shade_ground(bodies, lights, floor, offsets)
    # The bounce is smooth: once a pixel is enough.
    coarse = tuple(x[:pixels] for x in floor)
    bounce = _bounce(_bounce_table(scene, bodies, lights), bodies, coarse)
    ground, bounce = jax.lax.optimization_barrier((ground, bounce))
    colors = [
        (a.reshape(grid * grid, pixels) + b).reshape(total)
        for a, b in zip(ground, bounce, strict=True)
    ]

    metals = jnp.sum(
        (scene.material[bodies.order] == 1) * (1 << jnp.arange(MAX_OBJECTS)), dtype=jnp.int32
    )
    is_metal = ((metals >> jnp.maximum(index, 0)) & 1) == 1
    seen = index >= 0
    # Samples on bodies are shaded in dense chunks, rubber and metal apart. Scattering results back
    # is slow on CPUs, so each sample remembers its rank instead and fetches its color.
    for material, mask in enumerate((seen & ~is_metal, seen & is_metal)):
        rank = jnp.cumsum(mask) - 1
        count = rank[-1] + 1
        slots = jnp.zeros(total + CHUNK, jnp.int32)
        slots = slots.at[jnp.where(mask, rank, total + CHUNK)].set(samples, mode="drop")

        def chunk(i, shaded, slots=slots, material=material):
            slot = jax.lax.dynamic_slice(slots, (i * CHUNK,), (CHUNK,))
            d, offsets = ray(slot)
            color = _shade_bodies(
                table,
                bodies,
                lights,
                camera,
                d,
                t[slot],
                jnp.maximum(index[slot], 0),
                offsets,
                material,
                quality,
            )
            color = jax.lax.optimization_barrier(color)
            return [
                jax.lax.dynamic_update_slice(a, b, (i * CHUNK,))
                for a, b in zip(shaded, color, strict=True)
            ]

        shaded = [jnp.zeros(total + CHUNK)] * 3
        shaded = jax.lax.fori_loop(0, (count + CHUNK - 1) // CHUNK, chunk, shaded)
        colors = [
            jnp.where(mask, jnp.take(a, rank, mode="clip"), b)
            for a, b in zip(shaded, colors, strict=True)
        ]
        colors = jax.lax.optimization_barrier(colors)
    out = []
    for plane in colors:
        plane = jax.lax.optimization_barrier(_srgb(plane)).reshape(grid, grid, height, width)
        rows = [_tent([plane[k, j] for j in range(grid)], 1) for k in range(grid)]
        out.append(_tent(rows, 0))
    return jnp.stack(jax.lax.optimization_barrier(out), axis=-1)


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
        num_objects: as in :func:`msdspn_jax.data.clevr_scenes.sample_scenes_from_keys`.

    Returns:
        Images, and objects in the layout of :mod:`msdspn_jax.data.clevr`.
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
