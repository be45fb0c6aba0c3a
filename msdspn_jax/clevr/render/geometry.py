"""Where rays meet a CLEVR scene: bodies and ground.

Bodies are the generator's three meshes in closed form, in units of the body's radius r: a ball of
radius 0.9992; a box of half side 1, and a cylinder of radius and half height 1, both rounded. A
ray is first clipped by the unrounded shape; where it enters at an edge, Newton's iteration on the
signed distance finds the rounded surface. The signed distance of a convex body is convex along a
ray, so that Newton from outside never overshoots, and a slope that turns positive is a miss.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from msdspn_jax.clevr.objects import SHAPES
from msdspn_jax.clevr.scene import RADII, Scene
from msdspn_jax.clevr.vectors import Vec, add, dot, normalise, scale, where

SPHERE, CUBE, CYLINDER = (SHAPES.index(name) for name in ("sphere", "cube", "cylinder"))
SPHERE_RADIUS = 0.9992
ROUNDING = (0.0, 0.18, 0.06)

FAR = 1e6

# log z of the backdrop's profile as a polynomial of u = (x + 8) / 12.5, x along the sweep plane;
# within 1.2% where z > 0.005.
_PROFILE = (
    -2.6845810523236815,
    4.613536350165198,
    -0.5290965656291108,
    2.582056707189377,
    -0.1266187595529179,
    -7.402733243540151,
    0.41823519503939205,
    15.673803465041425,
    0.1031182077943137,
    -9.34095231064687,
)
PROFILE_FRONT, PROFILE_BACK = -23.476, 4.0747
SWEEP_LENGTH = 56.485
SWEEP = (-0.9032076597213745, 0.4292037785053253)
"""World direction (x, y) in which the backdrop rises."""
GROUND_ORIGIN = (-24.062761306762695, -17.99666976928711)


class Bodies(NamedTuple):
    """The objects of one scene, sorted by shape so that a loop over one shape has no branches."""

    x: Float[Array, "10"]
    y: Float[Array, "10"]
    radius: Float[Array, "10"]
    cos: Float[Array, "10"]
    sin: Float[Array, "10"]
    first: Int[Array, "4"]
    """Bodies first[s] to first[s + 1] have shape s (sphere, cube, cylinder)."""
    order: Int[Array, "10"]
    """The scene's index of each body."""


def scene_bodies(scene: Scene) -> Bodies:
    """Sort the objects of one scene (no batch axes) by shape; absent ones last."""
    rank = jnp.where(scene.present, scene.shape, 3)
    order = jnp.argsort(rank, stable=True)
    first = jnp.sum(rank[:, None] < jnp.arange(4)[None, :], axis=0)
    # The generator hands degrees to a field that takes radians; kept, for the images show it.
    angle = scene.rotation[order]
    return Bodies(
        x=scene.positions[order, 0],
        y=scene.positions[order, 1],
        radius=jnp.asarray(RADII)[scene.size][order],
        cos=jnp.cos(angle),
        sin=jnp.sin(angle),
        first=first,
        order=order,
    )


# Bodies ---------------------------------------------------------------------------------------


def _local(scene: Bodies, i, v: Vec, *, point: bool) -> Vec:
    """A point or direction in the frame of body i, in which it has radius one."""
    x, y, z = v
    inverse = 1.0 / scene.radius[i]
    if point:
        x, y, z = x - scene.x[i], y - scene.y[i], z - scene.radius[i]
    c, s = scene.cos[i] * inverse, scene.sin[i] * inverse
    return c * x + s * y, c * y - s * x, z * inverse


def _inverse(d: jax.Array) -> jax.Array:
    return 1.0 / jnp.where(jnp.abs(d) < 1e-9, 1e-9, d)


def _slab(o: jax.Array, d: jax.Array) -> tuple[jax.Array, jax.Array]:
    inverse = _inverse(d)
    middle, half = -o * inverse, jnp.abs(inverse)
    return middle - half, middle + half


def _box_span(o: Vec, d: Vec) -> tuple[jax.Array, jax.Array]:
    near, far = zip(*(_slab(a, b) for a, b in zip(o, d, strict=True)), strict=True)
    return jnp.maximum(jnp.maximum(near[0], near[1]), near[2]), jnp.minimum(
        jnp.minimum(far[0], far[1]), far[2]
    )


def _cylinder_span(o: Vec, d: Vec) -> tuple[jax.Array, jax.Array]:
    a = jnp.maximum(d[0] * d[0] + d[1] * d[1], 1e-12)
    b = o[0] * d[0] + o[1] * d[1]
    c = o[0] * o[0] + o[1] * o[1] - 1.0
    discriminant = b * b - a * c
    root = jnp.sqrt(jnp.maximum(discriminant, 0.0))
    inverse = 1.0 / a
    near, far = _slab(o[2], d[2])
    near = jnp.maximum((-b - root) * inverse, near)
    far = jnp.minimum((root - b) * inverse, far)
    return near, jnp.where(discriminant > 0, far, -FAR)


def _box_excess(p: Vec) -> tuple[Vec, jax.Array]:
    """How far p lies outside the core box, per axis (signed as p), and its length."""
    core = 1.0 - ROUNDING[CUBE]
    q = tuple(jnp.sign(a) * jnp.maximum(jnp.abs(a) - core, 0.0) for a in p)
    return q, jnp.sqrt(dot(q, q) + 1e-12)  # type: ignore


def _cylinder_excess(p: Vec) -> tuple[Vec, jax.Array]:
    core = 1.0 - ROUNDING[CYLINDER]
    squared = p[0] * p[0] + p[1] * p[1]
    inverse = jax.lax.rsqrt(jnp.maximum(squared, 1e-12))
    radial = jnp.maximum(squared * inverse - core, 0.0) * inverse
    q = (p[0] * radial, p[1] * radial, jnp.sign(p[2]) * jnp.maximum(jnp.abs(p[2]) - core, 0.0))
    return q, jnp.sqrt(dot(q, q) + 1e-12)


_SPAN = {CUBE: _box_span, CYLINDER: _cylinder_span}
_EXCESS = {CUBE: _box_excess, CYLINDER: _cylinder_excess}


def _entry(shape: int, scene: Bodies, i, o: Vec, d: Vec, steps: int) -> jax.Array:
    """Distance along d at which body i of this shape is entered; FAR where it is missed."""
    if shape == SPHERE:
        oc = (o[0] - scene.x[i], o[1] - scene.y[i], o[2] - scene.radius[i])
        b = dot(oc, d)
        c = dot(oc, oc) - (SPHERE_RADIUS * scene.radius[i]) ** 2
        discriminant = b * b - c
        t = -b - jnp.sqrt(jnp.maximum(discriminant, 0.0))
        return jnp.where((discriminant > 0) & (t > 0), t, FAR)
    o, d = _local(scene, i, o, point=True), _local(scene, i, d, point=False)
    t, far = _SPAN[shape](o, d)

    def newton(_, t):
        q, length = _EXCESS[shape](add(o, scale(d, t)))
        slope = dot(q, d)
        distance = (length - ROUNDING[shape]) * length
        t = t - jnp.where(distance > 0, distance / jnp.minimum(slope, -1e-6), 0.0)
        return jnp.where((slope < 0) | (distance < 1e-4), t, FAR)

    # A loop, though short, compiles faster; what is missed is FAR and stays beyond the far end.
    t = jax.lax.fori_loop(0, steps, newton, jnp.where((t < far) & (t > 0), t, FAR))
    return jnp.where(t < far, t, FAR)


def nearest_body(
    scene: Bodies, origin: Vec, direction: Vec, *, skip=None, steps: int = 3
) -> tuple[Float[Array, "*rays"], Int[Array, "*rays"]]:
    """Distance and index of the first body along each unit direction; FAR and -1 where none.

    Args:
        skip: index of a body that the ray cannot meet (the one it leaves), or None.
        steps: Newton steps onto rounded edges.
    """
    shape = jnp.broadcast_shapes(*(jnp.shape(a) for a in (*origin, *direction)))
    state = (jnp.full(shape, FAR), jnp.full(shape, -1, jnp.int32))
    for kind in (SPHERE, CUBE, CYLINDER):

        def body(i, state, kind=kind):
            t, index = state
            entry = _entry(kind, scene, i, origin, direction, steps)
            closer = entry < t
            if skip is not None:
                closer = closer & (skip != i)
            return jnp.where(closer, entry, t), jnp.where(closer, i, index)

        state = jax.lax.fori_loop(scene.first[kind], scene.first[kind + 1], body, state)
    return state


def _blocks(shape: int, o: Vec, d: Vec) -> jax.Array:
    """Whether the ray from o along d (local frame, d of any length) meets the body."""
    if shape == SPHERE:
        a, b = dot(d, d), dot(o, d)
        return (b < 0) & (b * b > a * (dot(o, o) - SPHERE_RADIUS**2))
    near, far = _SPAN[shape](o, d)
    # The middle of the chord is all but the deepest point: inside the rounded body or not.
    _, length = _EXCESS[shape](add(o, scale(d, 0.5 * (near + far))))
    return (near < far) & (far > 0) & (length < ROUNDING[shape])


def blocked(scene: Bodies, point: Vec, towards: Vec, *, skip=None) -> Bool[Array, "*rays"]:
    """Whether a body lies between ``point`` and the light in the direction ``towards``.

    Args:
        point, towards: broadcast against each other. Only directions count, not lengths: lights
            must lie beyond all bodies.
        skip: index of a body that does not block (the one the point is on), or None.
    """
    shape = jnp.broadcast_shapes(*(jnp.shape(a) for a in (*point, *towards)))
    mask = jnp.zeros(shape, bool)
    for kind in (SPHERE, CUBE, CYLINDER):

        def body(i, mask, kind=kind):
            o = _local(scene, i, point, point=True)
            d = _local(scene, i, towards, point=False)
            met = _blocks(kind, o, d)
            return mask | (met if skip is None else met & (skip != i))

        mask = jax.lax.fori_loop(scene.first[kind], scene.first[kind + 1], body, mask)
    return mask


def body_normal(shape, p: Vec) -> Vec:
    """Outward normal at p (local frame, unrotated axes) of a body of the given shape (an array)."""
    box, _ = _box_excess(p)
    cylinder, _ = _cylinder_excess(p)
    return normalise(where(shape == SPHERE, p, where(shape == CUBE, box, cylinder)))


# Ground ---------------------------------------------------------------------------------------


def ground_height(sweep: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Height of the backdrop and its slope at a coordinate along the sweep plane."""
    u = jnp.clip((sweep + 8.0) / 12.5, -1.0, (PROFILE_BACK + 8.0) / 12.5)
    log_z = jnp.full_like(u, _PROFILE[-1])
    slope = jnp.zeros_like(u)
    for coefficient in reversed(_PROFILE[:-1]):
        slope = slope * u + log_z
        log_z = log_z * u + coefficient
    z = jnp.exp(log_z)
    return z, z * slope / 12.5


def sweep_coordinates(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Coordinates of a world point across and along the backdrop's sweep."""
    dx, dy = x - GROUND_ORIGIN[0], y - GROUND_ORIGIN[1]
    return dx * SWEEP[0] + dy * SWEEP[1], -dx * SWEEP[1] + dy * SWEEP[0]


def ground_entry(origin: Vec, direction: Vec, steps: int = 3) -> tuple[jax.Array, jax.Array]:
    """Distance to the backdrop along each direction, and whether it is met at all.

    Height along the ray minus the profile is concave: Newton from beyond the root converges
    monotonically. It starts where the ray meets the plane z = 0 or leaves the backdrop's top.
    """
    start, _ = sweep_coordinates(origin[0], origin[1])
    rate = direction[0] * SWEEP[0] + direction[1] * SWEEP[1]
    t_plane = jnp.where(direction[2] < -1e-6, -origin[2] / direction[2], FAR)
    t_back = jnp.where(rate > 1e-6, (PROFILE_BACK - start) / rate, FAR)
    t = jnp.minimum(jnp.minimum(t_plane, t_back), 1e4)

    def newton(_, t):
        z, slope = ground_height(start + t * rate)
        height = origin[2] + t * direction[2] - z
        return t - height / jnp.minimum(direction[2] - slope * rate, -1e-6)

    t = jax.lax.fori_loop(0, steps, newton, t)
    x, y, z = add(origin, scale(direction, t))
    across, along = sweep_coordinates(x, y)
    met = (
        (t > 0)
        & (jnp.minimum(t_plane, t_back) < FAR)
        & (across > PROFILE_FRONT)
        & (across < PROFILE_BACK + 0.1)
        & (along < 0)
        & (along > -SWEEP_LENGTH)
        & (z > -0.5)
    )
    return t, met


def ground_normal(x: jax.Array, y: jax.Array) -> Vec:
    across, _ = sweep_coordinates(x, y)
    _, slope = ground_height(across)
    inverse = jax.lax.rsqrt(1 + slope * slope)
    return -slope * inverse * SWEEP[0], -slope * inverse * SWEEP[1], inverse
