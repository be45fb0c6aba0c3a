import copy

import pytest

from msdspn_jax.clevr.camera import Camera
from msdspn_jax.clevr.entries import parse_scene, scene_camera, scene_to_json
from msdspn_jax.errors import UserError

# From a published CLEVR scene: floats as the generator writes them.
SCENE = {
    "split": "train",
    "image_index": 7,
    "image_filename": "CLEVR_train_000007.png",
    "objects": [
        {
            "shape": "cube",
            "size": "large",
            "material": "metal",
            "color": "red",
            "3d_coords": [-1.9571157693862915, 2.1000497341156006, 0.699999988079071],
            "rotation": 164.05954693530128,
            "pixel_coords": [247, 95, 13.883733749389648],
        },
        {
            "shape": "sphere",
            "size": "small",
            "material": "rubber",
            "color": "cyan",
            "3d_coords": [0.5, -1.25, 0.3499999940395355],
            "rotation": 12.5,
            "pixel_coords": [100, 200, 9.0],
        },
    ],
    "directions": {"right": [0.65, 0.75, 0.0]},
}


def test_scene_json_round_trip():
    scene = parse_scene(SCENE)
    assert scene_to_json(scene) == SCENE
    assert parse_scene(scene_to_json(scene)) == scene
    assert scene.extra["directions"] == SCENE["directions"]


def change(path, value):
    scene = copy.deepcopy(SCENE)
    place = scene
    for key in path[:-1]:
        place = place[key]
    if value is None:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return scene


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (
            ["objects", 1, "color"],
            "pink",
            r"objects\[1\].color: expected one of cyan, .* got \"pink",
        ),
        (["objects", 0, "shape"], 3, r"objects\[0\].shape: expected a string, got 3"),
        (["objects", 0, "size"], None, r"objects\[0\].size: expected a string, got none"),
        (["objects", 0, "3d_coords"], [0, 1], "3d_coords: expected 3 numbers"),
        (["objects", 0, "3d_coords"], [0, 1, float("nan")], "3d_coords: expected a finite number"),
        (["objects", 0, "3d_coords"], [0, 1, 1e39], "3d_coords: expected a finite number"),
        (["objects", 0, "3d_coords"], [0, 1, True], "3d_coords: expected a finite number"),
        (["objects", 0, "rotation"], "north", "rotation: expected a finite number"),
        (["objects", 0, "pixel_coords"], {"x": 1}, "pixel_coords: expected a list"),
        (["objects"], [SCENE["objects"][0]] * 11, "at most 10 objects, got 11"),
        (["objects", 0], [], r"objects\[0\]: expected an object, got \[\]"),
        (["objects"], None, "objects: expected a list, got none"),
        (["image_filename"], "../secret.png", "expected a file name"),
        (["image_filename"], None, "image_filename: expected a string"),
        (["image_index"], 1.5, "image_index: expected a whole number"),
    ],
)
def test_bad_scenes_name_the_entry(path, value, message):
    with pytest.raises(UserError, match=message) as caught:
        parse_scene(change(path, value), "scenes.json: scenes[4]")
    assert str(caught.value).startswith("scenes.json: scenes[4].")


# Read off a scene rendered by Blender from the generator's base scene: its jittered camera, and two
# objects with the pixel coordinates the generator computed (rounded to whole pixels).
CAMERA = {
    "location": [7.285567283630371, -6.92439603805542, 5.724620342254639],
    "matrix_world": [
        [0.6889119148254395, -0.35872939229011536, 0.6298519968986511, 7.285567283630371],
        [0.7248450517654419, 0.34094589948654175, -0.5986279845237732, -6.92439603805542],
        [0.0, 0.8689470291137695, 0.4949049651622772, 5.724620342254639],
        [0.0, 0.0, 0.0, 1.0],
    ],
    "lens_mm": 35.0,
    "sensor_width_mm": 32.0,
    "width": 480,
    "height": 320,
}


def test_recorded_cameras_are_read():
    camera = scene_camera(parse_scene({**SCENE, "camera": CAMERA}))
    assert isinstance(camera, Camera)
    assert camera.matrix_world.tolist() == CAMERA["matrix_world"]
    assert (camera.focal_length, camera.aspect) == (35 / 32, 1.5)
    assert scene_camera(parse_scene(SCENE)) is None


@pytest.mark.parametrize(
    ("field", "value"),
    [("matrix_world", [[1, 2], [3, 4]]), ("matrix_world", [[0] * 4] * 4), ("lens_mm", 0)],
)
def test_bad_cameras_are_named(field, value):
    scene = parse_scene({**SCENE, "camera": {**CAMERA, field: value}})
    with pytest.raises(UserError, match=r"scene.camera.*expected"):
        scene_camera(scene)
