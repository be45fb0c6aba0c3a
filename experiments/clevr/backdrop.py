"""Light that ground and backdrop throw on each other: the constants of the renderer's `AMBIENT`.

    python experiments/clevr/backdrop.py

Radiosity of the empty scene: the backdrop cut into patches, lit by the sun and by the lamps at
their mean places, four bounces. Prints the irradiance across the sweep beside the renderer's, and
the constants fitted to it. A minute on one CPU core.
"""

import numpy as np

from msdspn_jax.clevr.render.geometry import (
    GROUND_ORIGIN,
    PROFILE_BACK,
    PROFILE_FRONT,
    SWEEP,
    SWEEP_LENGTH,
    ground_height,
    ground_normal,
    sweep_coordinates,
)
from msdspn_jax.clevr.render.lights import LIGHT_COLOR, direct_diffuse, scene_lights
from msdspn_jax.clevr.render.shading import GROUND_ALBEDO, ambient_ground
from msdspn_jax.clevr.scene import MEAN_LAMPS, Scene

BOUNCES = 4
BACK = 0.6
"""Across the sweep: the camera sees no further, and there the polynomial ends."""


def middles(edges):
    return (edges[1:] + edges[:-1]) / 2


def patches():
    """Sweep coordinates [a, b] of the patches, and by patch place, normal [a b, 3], area [a b]."""
    flat, rising = np.linspace(PROFILE_FRONT, -8, 40), np.linspace(-8, PROFILE_BACK, 81)
    across, along = np.concatenate([flat, rising[1:]]), np.linspace(-SWEEP_LENGTH, 0, 113)
    extent = np.outer(np.diff(across), np.diff(along)).ravel()
    across, along = np.meshgrid(middles(across), middles(along), indexing="ij")
    x = GROUND_ORIGIN[0] + across * SWEEP[0] - along * SWEEP[1]
    y = GROUND_ORIGIN[1] + across * SWEEP[1] + along * SWEEP[0]
    place = np.stack([x, y, ground_height(across)[0]], axis=-1).reshape(-1, 3)
    normal = np.stack(ground_normal(x, y), axis=-1).reshape(-1, 3)
    return across, along, place, normal, extent / normal[:, 2]


def gathered(place, normal, area, radiosity):
    """Irradiance [patches, lights] of every patch off all others. The surface is convex."""
    total = np.zeros_like(radiosity)
    for rows in np.array_split(np.arange(len(place)), 32):
        way = place[None] - place[rows, None]
        squared = (way * way).sum(-1) + 1e-9
        here = np.maximum(np.einsum("rsk,rk->rs", way, normal[rows]), 0)
        there = np.maximum(-np.einsum("rsk,sk->rs", way, normal), 0)
        total[rows] = (here * there / (np.pi * squared**2) * area) @ radiosity
    return total


def main():
    across, along, place, normal, area = patches()
    empty = Scene(*(None,) * len(Scene._fields))._replace(lamps=MEAN_LAMPS)
    lit = direct_diffuse(scene_lights(empty), tuple(place.T), tuple(normal.T), np.ones(4))
    direct = np.asarray(lit).T
    indirect = np.zeros_like(direct)
    for _ in range(BOUNCES):
        indirect = gathered(place, normal, area, GROUND_ALBEDO * (direct + indirect))
    # The lamps' colors mix to grey within half a per cent.
    grey = (indirect @ LIGHT_COLOR).mean(-1).reshape(across.shape)

    _, middle = sweep_coordinates(0.0, 0.0)
    used = grey[across[:, 0] < BACK][:, np.abs(along[0] - middle) < 16]
    u = (across[across[:, 0] < BACK, 0] + 12) / 12
    v = (along[0, np.abs(along[0] - middle) < 16] - middle) / 10
    relative = (used / used[:, [np.abs(v).argmin()]]).mean(0) - 1
    sideways = np.linalg.lstsq(np.stack([v, v * v], -1), relative, rcond=None)[0]
    profile = (used / (1 + sideways @ [v, v * v])).mean(1)
    constants = np.linalg.lstsq(u[:, None] ** np.arange(9), profile, rcond=None)[0]
    print("AMBIENT =", tuple(constants.round(5).tolist()))
    print("AMBIENT_ALONG =", tuple(sideways.round(4).tolist()))
    ours = np.asarray(ambient_ground(across, along))
    print("| across | height | radiosity | renderer |")
    print("|---|---|---|---|")
    column = np.abs(along[0] - middle).argmin()
    for i in range(0, int((across[:, 0] < BACK).sum()), 6):
        height = float(ground_height(across[i, 0])[0])
        pair = f"{grey[i, column]:.4f} | {ours[i, column]:.4f}"
        print(f"| {across[i, 0]:.1f} | {height:.2f} | {pair} |")


if __name__ == "__main__":
    main()
