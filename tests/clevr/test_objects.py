import copy

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msdspn_jax.clevr import objects as clevr
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


def test_layout_is_the_published_one():
    names = [
        name for group in ("material", "color", "shape", "size") for name in clevr.ATTRIBUTES[group]
    ]
    assert clevr.NUM_FEATURES == 3 + len(names) + 1 == 19
    objects = clevr.parse_scene(SCENE).objects
    first, second, *rest = clevr.encode(objects)
    chex.assert_shape([first, second], (19,))
    np.testing.assert_allclose(first[:3] * 3, SCENE["objects"][0]["3d_coords"], rtol=1e-6)
    assert [names[i] for i in np.nonzero(first[3:18])[0]] == ["metal", "red", "cube", "large"]
    assert [names[i] for i in np.nonzero(second[3:18])[0]] == ["rubber", "cyan", "sphere", "small"]
    assert first[18] == second[18] == 1
    assert not np.any(rest)
    stops = [clevr.SLICES[name].stop for name in clevr.SLICES]
    starts = [clevr.SLICES[name].start for name in clevr.SLICES]
    assert starts == [0, *stops[:-1]], "the groups leave a gap or overlap"
    for name, values in clevr.ATTRIBUTES.items():
        assert clevr.SLICES[name].stop - clevr.SLICES[name].start == len(values)
    assert len(clevr.COLOR_RGB) == len(clevr.COLORS)


@hypothesis.given(
    positions=st.lists(
        st.tuples(*[st.floats(-8, 8, width=32)] * 3), min_size=0, max_size=clevr.MAX_OBJECTS
    ),
    seed=st.integers(0, 2**16),
)
@hypothesis.settings(deadline=None, max_examples=50)
def test_round_trip_is_exact(positions, seed):
    rng = np.random.default_rng(seed)
    objects = [
        clevr.ClevrObject(
            **{name: str(rng.choice(values)) for name, values in clevr.ATTRIBUTES.items()},
            position=position,
        )
        for position in positions
    ]
    array = clevr.encode(objects)
    assert array.dtype == np.float32
    chex.assert_shape(array, (10, 19))
    again = clevr.decode(array)
    assert [o.words for o in again] == [o.words for o in objects]
    for ours, theirs in zip(again, objects, strict=True):
        np.testing.assert_allclose(ours.position, theirs.position, rtol=2e-7, atol=1e-44)
    np.testing.assert_array_equal(clevr.encode(again), array)
    assert clevr.decode(clevr.encode(again)) == again


def test_encode_features_agrees_on_device_and_on_host():
    rng = np.random.default_rng(0)
    position = rng.uniform(-3, 3, (4, 10, 3)).astype(np.float32)
    indices = {n: rng.integers(len(v), size=(4, 10)) for n, v in clevr.ATTRIBUTES.items()}
    present = rng.random((4, 10)) < 0.7
    host = clevr.encode_features(position, **indices, present=present)
    device = jax.jit(clevr.encode_features)(
        jnp.asarray(position), **jax.tree.map(jnp.asarray, indices), present=jnp.asarray(present)
    )
    assert host.dtype == device.dtype == np.float32
    chex.assert_trees_all_close(host, np.asarray(device), rtol=2e-7)
    assert not host[~present].any()
    assert (host[present][:, 3:].sum(-1) == 5).all()


def test_decode_reads_predictions():
    prediction = np.zeros((3, 19))
    prediction[:, 18] = [0.9, 0.5, 0.2]
    prediction[0, [4, 9, 14, 17]] = [0.3, 2.0, 0.8, 0.1]
    prediction[0, 0] = 1 / 3
    (only,) = clevr.decode(prediction)
    assert str(only) == "small red metal cube at (1.00, 0.00, 0.00)"
    assert only.score == pytest.approx(0.9)
    assert len(clevr.decode(prediction, threshold=0.1)) == 3


def test_scene_json_round_trip():
    scene = clevr.parse_scene(SCENE)
    assert clevr.scene_to_json(scene) == SCENE
    assert clevr.parse_scene(clevr.scene_to_json(scene)) == scene
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
        (["objects", 1, "color"], "pink", r"objects\[1\].color: unknown color \"pink\"; expected"),
        (["objects", 0, "shape"], 3, r"objects\[0\].shape: expected a string, got 3"),
        (["objects", 0, "size"], None, r"objects\[0\].size: expected a string, but it is missing"),
        (["objects", 0, "3d_coords"], [0, 1], "3d_coords: expected 3 numbers"),
        (["objects", 0, "3d_coords"], [0, 1, float("nan")], "3d_coords: expected a finite number"),
        (["objects", 0, "3d_coords"], [0, 1, 1e39], "3d_coords: expected a finite number"),
        (["objects", 0, "3d_coords"], [0, 1, True], "3d_coords: expected a finite number"),
        (["objects", 0, "rotation"], "north", "rotation: expected a finite number"),
        (["objects", 0, "pixel_coords"], {"x": 1}, "pixel_coords: expected a list"),
        (["objects"], [SCENE["objects"][0]] * 11, "at most 10 objects, got 11"),
        (["objects", 0], [], r"objects\[0\]: expected an object, got \[\]"),
        (["objects"], None, "objects: expected a list, but it is missing"),
        (["image_filename"], "../secret.png", "expected a file name"),
        (["image_filename"], None, "image_filename: expected a string"),
        (["image_index"], 1.5, "image_index: expected a whole number"),
    ],
)
def test_bad_scenes_name_the_entry(path, value, message):
    with pytest.raises(UserError, match=message) as caught:
        clevr.parse_scene(change(path, value), "scenes.json: scenes[4]")
    assert str(caught.value).startswith("scenes.json: scenes[4].")


def test_bad_arguments_are_named():
    one = clevr.parse_scene(SCENE).objects[0]
    with pytest.raises(ValueError, match="at most 10, got 11"):
        clevr.encode([one] * 11)
    with pytest.raises(ValueError, match=r"shape \[n, 19\], got \(10, 18\)"):
        clevr.decode(np.zeros((10, 18)))
    with pytest.raises(ValueError, match="must be finite"):
        clevr.decode(np.full((10, 19), np.nan))
    with pytest.raises(ValueError, match='unknown material "wood"'):
        clevr.ClevrObject("cube", "small", "wood", "red", (0, 0, 0))


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


def test_camera_projects_as_blender_does():
    scene = clevr.parse_scene({**SCENE, "camera": CAMERA})
    camera = clevr.scene_camera(scene)
    position = np.array([-1.9571157693862915, 2.1000497341156006, 0.3499999940395355])
    pixel = clevr.project(camera, position, 480, 320)
    np.testing.assert_allclose(pixel, [247, 95], atol=0.5)
    np.testing.assert_allclose(
        clevr.project(camera, position, 128, 128), pixel * [128 / 480, 128 / 320]
    )
    aimed = clevr.look_at_origin(CAMERA["location"])
    np.testing.assert_allclose(aimed.matrix_world, camera.matrix_world, atol=1e-6)
    np.testing.assert_allclose(clevr.project(aimed, np.zeros(3), 480, 320), [240, 160], atol=1e-9)
    assert np.isnan(clevr.project(aimed, np.array([20.0, -20, 15]), 480, 320)).all()
    assert clevr.scene_camera(clevr.parse_scene(SCENE)) is None


@pytest.mark.parametrize(
    ("field", "value"),
    [("matrix_world", [[1, 2], [3, 4]]), ("matrix_world", [[0] * 4] * 4), ("lens_mm", 0)],
)
def test_bad_cameras_are_named(field, value):
    scene = clevr.parse_scene({**SCENE, "camera": {**CAMERA, field: value}})
    with pytest.raises(UserError, match=r"scene.camera.*expected"):
        clevr.scene_camera(scene)
