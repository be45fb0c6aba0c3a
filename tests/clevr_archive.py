"""CLEVR_v1.0 as it is published, tiny, for the tests of everything that reads it."""

import json

import numpy as np
from PIL import Image, ImageDraw

from msdspn_jax.clevr.camera import look_at_origin, project
from msdspn_jax.clevr.objects import ATTRIBUTES, COLOR_RGB, COLORS, SIZE_RADIUS, SIZES

NUMBERS = {"train": 5, "val": 4, "test": 2}
WIDTH, HEIGHT = 48, 32


def _draw(objects, rng, mode):
    """A picture with a disc where each object is, and grain, so that no two are alike."""
    image = Image.fromarray(rng.integers(90, 140, (HEIGHT, WIDTH, 3), np.uint8))
    pen = ImageDraw.Draw(image)
    camera = look_at_origin()
    for o in objects:
        x, y, _ = project(camera, np.array(o["3d_coords"]), WIDTH, HEIGHT)
        radius = 5 if o["size"] == "large" else 3
        color = COLOR_RGB[COLORS.index(o["color"])]
        pen.ellipse([x - radius, y - radius, x + radius, y + radius], fill=color)
    return image.convert(mode)


def _random_object(rng):
    names = {name: str(rng.choice(values)) for name, values in ATTRIBUTES.items()}
    height = SIZE_RADIUS[SIZES.index(names["size"])]
    position = np.float32([*rng.uniform(-3, 3, 2), height]).tolist()
    u, v, depth = project(look_at_origin(), np.array(position)).tolist()
    return {
        **names,
        "3d_coords": position,
        "rotation": float(rng.uniform(0, 360)),
        "pixel_coords": [round(u), round(v), depth],
    }


def make_archive(folder, numbers=NUMBERS):
    """CLEVR_v1.0 as it is published, tiny."""
    root = folder / "CLEVR_v1.0"
    rng = np.random.default_rng(0)
    for sub in ("scenes", "questions", *(f"images/{split}" for split in numbers)):
        (root / sub).mkdir(parents=True)
    for split, number in numbers.items():
        scenes, questions = [], []
        for index in range(number):
            name = f"CLEVR_{split}_{index:06d}.png"
            objects = [_random_object(rng) for _ in range(rng.integers(3, 11))]
            # Published images have an alpha channel; ours need not.
            mode = "RGBA" if split == "train" else "RGB"
            _draw(objects, rng, mode).save(root / "images" / split / name)
            scenes.append(
                {
                    "split": split,
                    "image_index": index,
                    "image_filename": name,
                    "objects": objects,
                    "directions": {"right": [0.65, 0.75, 0.0]},
                }
            )
            answer = {} if split == "test" else {"answer": "yes"}
            questions += [
                {"image_filename": name, "question": f"Are there {k} things?", **answer}
                for k in range(2)
            ]
        if split != "test":
            path = root / "scenes" / f"CLEVR_{split}_scenes.json"
            path.write_text(json.dumps({"info": {"split": split}, "scenes": scenes}))
        path = root / "questions" / f"CLEVR_{split}_questions.json"
        path.write_text(json.dumps({"info": {}, "questions": questions}))
    return root


def assert_same_record(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert ours["file_name"] == theirs["file_name"]
    for name in ("image", "objects"):
        assert ours[name].dtype == theirs[name].dtype
        np.testing.assert_array_equal(ours[name], theirs[name])


def assert_same_tree(ours, theirs):
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            assert_same_tree(value, theirs[key])
    else:
        np.testing.assert_array_equal(ours, theirs)
