"""How fast the renderer is, and how far that is from what the machine could do."""

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from msdspn_jax import _check
from msdspn_jax.clevr.camera import IMAGE_HEIGHT, IMAGE_WIDTH, camera_ray
from msdspn_jax.clevr.render.geometry import ground_entry, nearest_body
from msdspn_jax.clevr.render.lights import visibility
from msdspn_jax.clevr.render.materials import METAL, RUBBER
from msdspn_jax.clevr.render.shading import body_color, ground_color, ground_light, prepare
from msdspn_jax.clevr.render.trace import QUALITIES, Quality, render
from msdspn_jax.clevr.sampling import sample_scenes_from_keys, visible_pixels
from msdspn_jax.clevr.scene import Scene

# fmt: off
_ARITHMETIC = {
    "abs", "add", "and", "clamp", "div", "eq", "exp", "floor", "ge", "gt", "integer_pow", "le",
    "log", "lt", "max", "min", "mul", "ne", "neg", "not", "or", "pow", "rem", "round", "rsqrt",
    "select_n", "shift_right_arithmetic", "sign", "sqrt", "square", "sub",
}
# fmt: on
"""Primitives that count as one operation for each element of their result."""


def _operations(jaxpr: Any) -> tuple[int, list[int]]:
    """Arithmetic operations of a program: outside loops, and in each loop's body.

    Loops of a known length count as outside, that often.
    """
    outside, loops = 0, []
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name == "while":
            body, inner = _operations(equation.params["body_jaxpr"].jaxpr)
            loops += [body, *inner]
        elif "jaxpr" in equation.params:
            inner = equation.params["jaxpr"]
            more, deeper = _operations(getattr(inner, "jaxpr", inner))
            times = equation.params["length"] if name == "scan" else 1
            outside += times * more
            loops += [times * body for body in deeper]
        elif name in _ARITHMETIC:
            outside += equation.outvars[0].aval.size
    return outside, loops


def _count(function, trips: list[float], *arguments) -> float:
    """Operations for one ray; the function's loops run ``trips`` times, cycled."""
    outside, loops = _operations(jax.make_jaxpr(function)(*arguments).jaxpr)
    return outside + sum(body * trips[i % len(trips)] for i, body in enumerate(loops))


def operations_per_image(scenes: Scene, size: int, quality: str) -> float:
    """Arithmetic operations (each counted as one) an image takes, mean over scenes.

    Counted from the traced program: what one ray costs, times the samples of the image (those on
    rubber and metal from a cast of the same scenes), with loops running over the bodies there are.
    Work on chunk slots left empty, compaction and the reduction to pixels are not counted.
    """
    count = len(scenes.present)
    each = (jax.tree.map(lambda x, i=i: jnp.asarray(x[i]), scenes) for i in range(count))
    chosen = _check.lookup("quality", quality, QUALITIES)
    return size * size * sum(_operations_per_pixel(scene, chosen) for scene in each) / count


def _operations_per_pixel(scene: Scene, quality: Quality) -> float:
    stage = prepare(scene)
    bodies, lights = stage.bodies, stage.lights
    number = np.diff(np.asarray(bodies.first)).astype(float).tolist()
    pixels = np.asarray(jax.jit(visible_pixels)(scene))
    share = pixels / (IMAGE_WIDTH * IMAGE_HEIGHT)
    metal = float(share[np.asarray(scene.material) == METAL].sum())
    one = jnp.float32(1.0)
    p, offsets, index, visible = (one, one, one), (one, one), jnp.int32(0), jnp.ones(4)
    light = jax.eval_shape(ground_light, stage, p)

    def primary(u, v):
        d = camera_ray(scene.camera, u, v)
        return nearest_body(bodies, p, d), ground_entry(p, d)

    def shadows(p):
        return visibility(bodies, lights, p, offsets, skip=index)

    def ground(p):
        return ground_entry(p, p), ground_light(stage, p)

    def on_body(p, material):
        return body_color(
            stage, p, p, index, visible, offsets,
            material=material, rough_shadows=quality.rough_shadows,
        )  # fmt: skip

    sample = _count(primary, number, one, one) + _count(shadows, number, p)
    sample += _count(ground_color, number, light, visible)
    sample += (share.sum() - metal) * _count(lambda p: on_body(p, RUBBER), number, p)
    sample += metal * _count(lambda p: on_body(p, METAL), number, p)
    return quality.grid**2 * sample + _count(ground, [sum(number)], p)


def machine_rate(repeat: int = 5) -> float:
    """Operations a second of a fused chain of multiplications and additions, the best of a few."""
    x = jnp.ones(1 << 20, jnp.float32)

    @jax.jit
    def chain(x):
        for _ in range(64):
            x = x * 1.0001 + 0.0001
        return x

    jax.block_until_ready(chain(x))
    return 128 * x.size / min(_seconds(chain, (x,)) for _ in range(repeat))


def _seconds(function, arguments) -> float:
    start = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    return time.perf_counter() - start


def bench_render(
    size: int = 128, quality: str = "default", batch: int = 32, repeat: int = 5
) -> dict[str, Any]:
    """Time :func:`msdspn_jax.clevr.render.trace.render` on procedural scenes, compiled beforehand.

    Args:
        size: side of the images.
        quality: of the renderer.
        batch: images a call.
        repeat: calls timed; the fastest and the median are reported.

    Returns:
        Plain values for JSON. ``images_per_second`` is that of the fastest call;
        ``procedural_images_per_second`` includes drawing the scenes, in a call of its own.
    """
    _check.require_positive("batch", batch)
    _check.require_positive("repeat", repeat)
    keys = jax.random.split(jax.random.key(0), batch)
    scenes = jax.block_until_ready(sample_scenes_from_keys(keys))

    def images(scenes):
        return render(scenes, size, quality=quality)

    compile_seconds = _seconds(images, (scenes,))
    times = sorted(_seconds(images, (scenes,)) for _ in range(repeat))
    drawing = min(_seconds(sample_scenes_from_keys, (keys,)) for _ in range(repeat))
    some = jax.tree.map(lambda x: x[:4], scenes)
    operations = operations_per_image(some, size, quality)
    peak = machine_rate()
    rate = batch / times[0]
    return {
        "images_per_second": rate,
        "images_per_second_median": batch / float(np.median(times)),
        "procedural_images_per_second": batch / (times[0] + drawing),
        "compile_seconds": compile_seconds,
        "operations_per_image": operations,
        "operations_per_second": operations * rate,
        "machine_operations_per_second": peak,
        "share_of_machine": operations * rate / peak,
        "size": size,
        "quality": quality,
        "batch": batch,
        "repeat": repeat,
        "backend": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
    }
