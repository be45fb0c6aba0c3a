"""A ray tracer for CLEVR scenes: a batch of scenes to images in one jitted call."""

import functools
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from msdspn_jax import _check
from msdspn_jax.clevr.camera import IMAGE_HEIGHT, IMAGE_WIDTH, camera_ray
from msdspn_jax.clevr.objects import MAX_OBJECTS
from msdspn_jax.clevr.render.geometry import ground_entry, nearest_body
from msdspn_jax.clevr.render.lights import lamp_offsets, visibility
from msdspn_jax.clevr.render.materials import METAL, RUBBER
from msdspn_jax.clevr.render.shading import (
    body_color,
    ground_color,
    ground_light,
    lookup,
    prepare,
)
from msdspn_jax.clevr.scene import Scene, map_scenes
from msdspn_jax.clevr.vectors import add, scale, unstack, vec

CHUNK = 2048
"""Samples on bodies that are shaded together."""


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
    height, width = checked_size(size)
    chosen = _check.lookup("quality", quality, QUALITIES)
    if np.ndim(scenes.positions) != 3:
        raise ValueError(f"scenes: expected one batch axis, got {np.ndim(scenes.positions) - 2}")
    if group is None:
        group = 1 if jax.default_backend() == "cpu" else 16
    with jax.enable_x64(False):
        return _render(jax.tree.map(jnp.asarray, scenes), height, width, chosen, group)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _render(scenes: Scene, height: int, width: int, quality: Quality, group: int):
    def one(scene):
        image = _render_scene(scene, height, width, quality)
        return jnp.round(255 * image).astype(jnp.uint8)

    return map_scenes(one, scenes, group)


def checked_size(size: Any) -> tuple[int, int]:
    """Height and width of an image, of either or of the side of a square."""
    try:
        height, width = map(operator.index, size if np.ndim(size) else (size, size))
    except (TypeError, ValueError):
        height, width = 0, 0
    if min(height, width) < 1:
        raise ValueError(f"size: expected an integer >= 1 or (height, width), got {size!r}")
    return height, width


def _render_scene(
    scene: Scene, height: int, width: int, quality: Quality
) -> Float[Array, "height width 3"]:
    """One scene in sRGB, 0 to 1.

    The loops over lights and channels are fences as well: XLA fuses what is not in a loop into each
    of its consumers, computes it that often and, beside a gather, without vector instructions.
    """
    grid = quality.grid
    stage = prepare(scene)
    bodies, lights = stage.bodies, stage.lights
    camera = unstack(scene.camera)
    pixels = height * width
    total = grid * grid * pixels

    def position(sub_sample, pixel):
        """Pixels of the 480x320 image."""
        u = (pixel % width).astype(jnp.float32) + (sub_sample % grid + 0.5) / grid
        v = (pixel // width).astype(jnp.float32) + (sub_sample // grid + 0.5) / grid
        return u * (IMAGE_WIDTH / width), v * (IMAGE_HEIGHT / height)

    # Samples are [sub-sample, pixel].
    sub_samples = jnp.arange(grid * grid)[:, None]
    u, v = position(sub_samples, jnp.arange(pixels)[None, :])
    direction = camera_ray(scene.camera, u, v)
    offsets = lamp_offsets(sub_samples, grid)
    t, index = nearest_body(bodies, camera, direction)
    seen = index >= 0
    distance = jnp.where(seen, t, ground_entry(camera, direction)[0])
    place = add(camera, scale(direction, distance))
    visible = visibility(bodies, lights, place, offsets, skip=index)
    # The ground is smooth but for shadows: the rest is shaded once a pixel, at its middle.
    middle = camera_ray(scene.camera, jnp.mean(u, 0), jnp.mean(v, 0))
    middle = add(camera, scale(middle, ground_entry(camera, middle)[0]))
    ground = ground_color(ground_light(stage, middle), visible).reshape(3, total)

    metals = jnp.sum(
        (scene.material[bodies.order] == METAL) * (1 << jnp.arange(MAX_OBJECTS)), dtype=jnp.int32
    )
    index, seen = index.reshape(total), seen.reshape(total)
    stored = jnp.concatenate([jnp.stack(place), jnp.stack(direction), visible]).reshape(10, total)
    is_metal = ((metals >> jnp.maximum(index, 0)) & 1) == 1
    # Samples on bodies are shaded in dense chunks, rubber and metal apart. Scattering results back
    # is slow on CPUs, so each sample remembers its rank instead and fetches its color.
    masks, ranks, results = [], [], []
    for material, mask in ((RUBBER, seen & ~is_metal), (METAL, seen & is_metal)):
        rank = jnp.cumsum(mask) - 1
        count = rank[-1] + 1
        slots = jnp.zeros(total + CHUNK, jnp.int32)
        slots = slots.at[jnp.where(mask, rank, total + CHUNK)].set(jnp.arange(total), mode="drop")

        def chunk(i, shaded, slots=slots, material=material):
            slot = jax.lax.dynamic_slice(slots, (i * CHUNK,), (CHUNK,))
            rows = lookup(stored, slot)
            color = body_color(
                stage,
                vec(rows[:3]),
                vec(rows[3:6]),
                jnp.maximum(index[slot], 0),
                rows[6:],
                lamp_offsets(slot // pixels, grid),
                material=material,
                rough_shadows=quality.rough_shadows,
            )
            return jax.lax.dynamic_update_slice(shaded, color, (0, i * CHUNK))

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
        rows = [tent([plane[k, j] for j in range(grid)], 1) for k in range(grid)]
        return tent(rows, 0)

    return jnp.moveaxis(jax.lax.map(channel, (ground, *results)), 0, -1)


def tent(planes, axis: int):
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
