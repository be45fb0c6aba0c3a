import json
import pathlib

import chex
import jax
import numpy as np
import pytest

from msdspn_jax.clevr import sampling
from msdspn_jax.clevr.entries import parse_scene
from msdspn_jax.clevr.objects import encode
from msdspn_jax.clevr.scene import (
    MEAN_CAMERA,
    MEAN_LAMPS,
    scene_entry,
    scene_from_entry,
    scene_objects,
)
from msdspn_jax.errors import UserError

BLENDER = pathlib.Path(__file__).parents[1] / "data" / "clevr_blender"
ENTRIES = json.loads((BLENDER / "CLEVR_calib_scenes.json").read_text())["scenes"]


def test_json_round_trip_is_exact():
    draw = jax.jit(sampling.sample_scene)
    for i in range(3):
        scene = jax.device_get(draw(jax.random.key(i)))
        entry = json.loads(json.dumps(scene_entry(scene, i, "val")))
        chex.assert_trees_all_equal(scene_from_entry(entry), scene)
        parsed = parse_scene(entry)
        assert parsed.image_filename == f"CLEVR_val_{i:06d}.png"
        chex.assert_trees_all_equal(encode(parsed.objects), np.asarray(scene_objects(scene)))


def test_entries_agree_with_the_generators():
    for entry in ENTRIES:
        scene = scene_from_entry(entry)
        again = scene_entry(scene, entry["image_index"], "calib")
        assert again["relationships"] == entry["relationships"]
        assert again["image_filename"] == entry["image_filename"]
        for name, direction in entry["directions"].items():
            np.testing.assert_allclose(again["directions"][name], direction, atol=1e-6)
        camera = entry["camera"]["matrix_world"]
        np.testing.assert_allclose(again["camera"]["matrix_world"], camera, atol=1e-5)
        for ours, theirs in zip(again["objects"], entry["objects"], strict=True):
            # The generator truncates to whole pixels.
            np.testing.assert_allclose(ours["pixel_coords"], theirs["pixel_coords"], atol=1.01)


def test_plain_entries_get_the_mean_setting():
    plain = {k: v for k, v in ENTRIES[0].items() if k not in ("camera", "lights")}
    scene = scene_from_entry(plain)
    np.testing.assert_array_equal(scene.camera, MEAN_CAMERA)
    np.testing.assert_array_equal(scene.lamps, MEAN_LAMPS)


def _rolled(entry):
    matrix = np.array(entry["camera"]["matrix_world"])
    matrix[:3, :2] = np.stack([matrix[:3, 1], -matrix[:3, 0]], axis=1)
    entry["camera"]["matrix_world"] = matrix.tolist()


def _straight_above(entry):
    entry["camera"] = {"location": [0.0, 0.0, 10.0]}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda e: e["objects"][0].update({"3d_coords": [0, 0, 5.0]}), "on the ground"),
        (lambda e: e["objects"][1].update({"3d_coords": [9.0, 0, 0.35]}), "within 5"),
        (lambda e: e.update(camera=[1, 2]), "camera: expected a location"),
        (lambda e: e["camera"].update(location=[1.0, float("nan"), 2.0]), "camera.location"),
        (lambda e: e["camera"].update(location=[5.0, 5.0, 5.0]), "looks at the origin"),
        (lambda e: e["camera"].update(lens_mm=70), "camera.lens_mm: expected 35"),
        (_rolled, "expected a level camera"),
        (_straight_above, "straight above the origin"),
        (lambda e: e["lights"].pop("Lamp_Key"), "Lamp_Key"),
        (lambda e: e["lights"].update(Lamp_Back="on"), "Lamp_Back: expected a location"),
        (lambda e: e["lights"]["Lamp_Fill"].update(location="high"), "Lamp_Fill"),
    ],
)
def test_what_cannot_be_rendered_is_named(change, words):
    entry = json.loads(json.dumps(ENTRIES[0]))
    change(entry)
    with pytest.raises(UserError, match=words):
        scene_from_entry(entry, "file.json: scenes[7]")
