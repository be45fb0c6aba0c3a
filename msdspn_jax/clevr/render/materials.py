"""How CLEVR's two materials throw lamplight back: rubber, and the two lobes of metal."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from msdspn_jax.clevr.objects import MATERIALS
from msdspn_jax.clevr.render.lights import Lights, ambient_body, each_channel, incident
from msdspn_jax.clevr.vectors import Vec, add, cross, dot, normalise

RUBBER, METAL = (MATERIALS.index(name) for name in ("rubber", "metal"))

# Fitted against the reference renders (experiments/clevr/RENDERER.md says on which).
FOOTPRINT = 2e-4


def _fresnel(ior: float, cosine):
    g = jnp.sqrt(jnp.maximum(ior * ior - 1 + cosine * cosine, 0.0))
    a = (g - cosine) / (g + cosine)
    b = (cosine * (g + cosine) - 1) / (cosine * (g - cosine) + 1)
    return 0.5 * a * a * (1 + b * b)


def _smith(alpha2, cosine2):
    """Smith's shadowing of GGX for one direction."""
    return 2.0 / (1.0 + jnp.sqrt(1.0 + alpha2 * (1.0 - cosine2) / jnp.maximum(cosine2, 1e-6)))


def rubber(
    lights: Lights, p: Vec, n: Vec, view: Vec, albedo: Float[Array, "3 *p"], visible
) -> Float[Array, "3 *p"]:
    """Radiance towards ``view`` off rubber with normal n."""
    nv = jnp.clip(dot(n, view), 1e-3, 1.0)
    f1, f2 = _fresnel(1.2, nv), _fresnel(1.4, nv)

    def one(each):
        light, seen = each
        direction, irradiance, _ = incident(light, p)
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
    ambient = ambient_body(n)

    def channel(mix, albedo):
        soft = (1 - f2) / np.pi * (mix(diffuse) + ambient) + f2 * (mix(velvet) + ambient / np.pi)
        return (1 - f1) * albedo * soft + f1 * (mix(glossy) + 0.8 * ambient / np.pi)

    return each_channel(channel, albedo)


def metal_direct(
    lights: Lights, p: Vec, n: Vec, tangent: Vec, view: Vec, visible
) -> Float[Array, "4 *p"]:
    """Light of each lamp off both lobes, grey, before the albedo."""
    nv = jnp.clip(dot(n, view), 1e-3, 1.0)
    bitangent = cross(n, tangent)

    def one(each):
        light, seen = each
        direction, irradiance, inverse_square = incident(light, p)
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
