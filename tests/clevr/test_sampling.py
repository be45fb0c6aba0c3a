import json
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msdspn_jax.clevr import sampling
from msdspn_jax.clevr.camera import BEHIND, RIGHT
from msdspn_jax.clevr.objects import ATTRIBUTES, SIZE_RADIUS
from msdspn_jax.clevr.scene import (
    MEAN_CAMERA,
    MEAN_LAMPS,
    Scene,
    directions,
    scene_from_entry,
    stack_scenes,
)

BLENDER = pathlib.Path(__file__).parents[1] / "data" / "clevr_blender"
ENTRIES = json.loads((BLENDER / "CLEVR_calib_scenes.json").read_text())["scenes"]

# One scene at a time: one program serves all tests.
visible_pixels = jax.jit(sampling.visible_pixels)


@pytest.fixture(scope="module")
def drawn():
    return jax.device_get(sampling.sample_scenes(jax.random.key(0), 120))


def scene_of(scenes: Scene, i: int) -> Scene:
    return jax.tree.map(lambda x: np.asarray(x[i]), scenes)


def check_rules(scenes: Scene) -> dict[str, int]:
    """Violations of the generator's rules, counted in NumPy from the definitions."""
    scenes = jax.device_get(scenes)
    violations = dict.fromkeys(("count", "place", "distance", "margin", "setting", "pixels"), 0)
    for i in range(len(scenes.present)):
        pixels = np.asarray(visible_pixels(scene_of(scenes, i)))
        n = int(scenes.present[i].sum())
        violations["count"] += not (3 <= n <= 10 and bool(scenes.present[i, :n].all()))
        position = scenes.positions[i, :n].astype(np.float64)
        radius = np.array(SIZE_RADIUS)[scenes.size[i, :n]]
        on_table = (np.abs(position[:, :2]) <= 3).all()
        violations["place"] += not (on_table and (np.abs(position[:, 2] - radius) < 1e-6).all())
        for a in range(n):
            for b in range(a):
                offset = (position[a] - position[b])[:2]
                gap = np.hypot(*offset) - radius[a] - radius[b]
                violations["distance"] += gap < 0.25 - 1e-5
                for name in ("left", "right", "front", "behind"):
                    margin = offset @ np.array(directions()[name])[:2]
                    violations["margin"] += 0 < margin < 0.4 - 1e-5
        violations["setting"] += bool((np.abs(scenes.camera[i] - MEAN_CAMERA) > 0.5 + 1e-6).any())
        violations["setting"] += bool((np.abs(scenes.lamps[i] - MEAN_LAMPS) > 1 + 1e-6).any())
        violations["pixels"] += int((pixels[:n] < 200).sum())
    return {name: int(count) for name, count in violations.items()}


def test_scenes_obey_the_generators_rules(drawn):
    assert set(check_rules(drawn).values()) == {0}
    counts = drawn.present.sum(1)
    # Uniform over 3 to 10: all occur among 120, and the mean is 6.5 within 4 standard errors.
    assert set(counts) == set(range(3, 11))
    assert abs(counts.mean() - 6.5) < 4 * np.sqrt(63 / 12 / 120)
    for name, values in ATTRIBUTES.items():
        seen = np.bincount(getattr(drawn, name)[drawn.present])
        share = seen / seen.sum()
        # Sizes are no longer even: scenes start over more often with large objects.
        assert len(seen) == len(values)
        if name != "size":
            assert np.abs(share - 1 / len(values)).max() < 4 * np.sqrt(1 / len(values) / seen.sum())


@pytest.mark.slow
def test_ten_thousand_scenes_without_a_violation():
    for seed in range(20):
        scenes = sampling.sample_scenes(jax.random.key(1000 + seed), 500)
        assert set(check_rules(scenes).values()) == {0}


def test_the_rules_checker_sees_violations():
    scene = scene_from_entry(ENTRIES[0])
    positions = np.array(scene.positions)
    positions[1, :2] = positions[0, :2] + 0.3
    found = check_rules(stack_scenes([scene._replace(positions=positions)]))
    assert found["distance"] == 1
    assert found["margin"] > 0
    # Behind the large cube nothing of a small sphere is left.
    positions = np.array(scene.positions)
    positions[0, :2] = positions[4, :2] + 1.2 * BEHIND[:2]
    found = check_rules(stack_scenes([scene._replace(positions=positions)]))
    assert found["pixels"] == 1


def sequential_places(rng, count):
    """The generator's placement, written as the loop it is; also how often it started over."""
    restarts = 0
    while True:
        placed = []
        for _ in range(count):
            r = rng.choice([0.7, 0.35])
            for _ in range(50):
                p = rng.uniform(-3, 3, 2)
                offsets = [(p - q, r + s) for q, s in placed]
                margins = [abs(o @ d[:2]) for o, _ in offsets for d in (RIGHT, BEHIND)]
                if (
                    all(np.hypot(*o) - s >= 0.25 for o, s in offsets)
                    and min(margins, default=1) >= 0.4
                ):
                    placed.append((p, r))
                    break
            else:
                break
        if len(placed) == count:
            return placed, restarts
        restarts += 1


def test_placement_has_the_generators_law():
    count, number = 6, 300
    rng = np.random.default_rng(0)
    loops = [sequential_places(rng, count)[0] for _ in range(number)]
    theirs_small = np.array([[r < 0.5 for _, r in placed] for placed in loops])
    theirs_reach = np.array([[np.hypot(*p) for p, _ in placed] for placed in loops])
    keys = jax.random.split(jax.random.key(5), number)
    places, sizes = jax.jit(jax.vmap(lambda k: sampling.place_objects(k, jnp.int32(count))))(keys)
    ours_small = np.asarray(sizes)[:, :count] == 1
    ours_reach = np.linalg.norm(np.asarray(places)[:, :count], axis=-1)
    # Later objects are smaller and further out: both per position in the order of placement.
    for ours, theirs in ((ours_small, theirs_small), (ours_reach, theirs_reach)):
        error = np.sqrt((ours.var(0) + theirs.var(0)) / number)
        assert np.all(np.abs(ours.mean(0) - theirs.mean(0)) < 4 * error)


@pytest.mark.slow
def test_a_scene_depends_on_its_own_key_alone():
    keys = jax.random.split(jax.random.key(3), 2)
    one = sampling.sample_scenes_from_keys(keys[1:], group=1)
    both = sampling.sample_scenes(jax.random.key(3), 2, group=2)
    chex.assert_trees_all_close(jax.tree.map(lambda x: x[1:], both), one, atol=1e-6)


def test_visible_pixels_are_blenders():
    for entry in ENTRIES:
        row = np.asarray(visible_pixels(scene_from_entry(entry)))
        theirs = np.array([o["visible_pixels"] for o in entry["objects"]])
        assert np.all(np.abs(row[: len(theirs)] - theirs) <= 4 + 0.02 * theirs)
        assert np.all(row[len(theirs) :] == 0)


def test_the_coarse_cast_decides_as_the_exact_one_does():
    # A small sphere slides behind a large cube: the verdict flips where the count crosses 200.
    scene = scene_from_entry(ENTRIES[0])
    all_visible = jax.jit(sampling.all_visible)
    flips = []
    for shift in np.linspace(0.0, 1.2, 7):
        positions = np.array(scene.positions)
        positions[0, :2] = positions[4, :2] + 1.2 * BEHIND[:2] + shift * RIGHT[:2]
        moved = scene._replace(positions=positions)
        exact = np.asarray(visible_pixels(moved))
        verdict = bool(all_visible(moved))
        assert verdict == bool((exact[:6] >= 200).all())
        flips.append(verdict)
    assert not flips[0]
    assert flips[-1]


def test_batch_must_be_positive():
    with pytest.raises(ValueError, match="batch: expected an integer >= 1, got 0"):
        sampling.sample_scenes(jax.random.key(0), 0)
