"""The README's first picture: a rendered scene, and what the model in the box finds in it.

    python experiments/clevr/first_picture.py [--seed 7] [--num 48]

Renders scenes of full size and writes first_picture.png beside this file. Shown is no best case: of
the scenes in which something is wrong, the one whose share of right objects is closest to the mean
over all the scenes.
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np

from msdspn_jax import cli, plots, trained
from msdspn_jax.clevr.entries import scene_camera
from msdspn_jax.clevr.files import read_image, read_scenes, resize_image
from msdspn_jax.clevr.metrics import right_within
from msdspn_jax.clevr.objects import CLEVR_LAYOUT, encode
from msdspn_jax.clevr.plots import scene as draw_scene
from msdspn_jax.trained.calibration import DISTANCE

HERE = Path(__file__).parent


def rendered(seed, num):
    """Images of 480 x 320, and their scenes."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["--seed", seed, "--num", num, "--full", "--out", folder]
        assert cli.main(["render", *map(str, words)]) == 0
        (file,) = Path(folder).glob("scenes/*.json")
        scenes = read_scenes(file)
        (images,) = Path(folder).glob("images/*")
        return [read_image(images / scene.image_filename) for scene in scenes], scenes


def typical(shares):
    """The index closest to the mean among those below 1; of all, where nothing is wrong."""
    shares = np.asarray(shares)
    distance = np.abs(shares - shares.mean())
    return int(np.where((shares < 1) | (shares == 1).all(), distance, np.inf).argmin())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--num", type=int, default=48, help="scenes to choose from")
    parser.add_argument("--out", type=Path, default=HERE / "first_picture.png")
    options = parser.parse_args()
    images, scenes = rendered(options.seed, options.num)
    model = trained.find()
    small = np.stack([resize_image(image, model.config.size) for image in images])
    found = np.asarray(model.predict(model.variables, small))
    shown = found[..., CLEVR_LAYOUT.presence] > model.threshold
    targets = np.stack([encode(scene.objects) for scene in scenes])
    right = (right_within(found, targets, DISTANCE) & shown).sum(axis=1)
    # Of all that is shown or there: what is invented counts as what is missed does.
    number = np.array([len(scene.objects) for scene in scenes])
    shares = right / np.maximum(shown.sum(axis=1), number)
    chosen = typical(shares)
    order = np.argsort(-found[chosen, :, CLEVR_LAYOUT.presence], kind="stable")
    figure = draw_scene(
        images[chosen],
        found[chosen][order],
        targets[chosen],
        camera=scene_camera(scenes[chosen]),
        threshold=model.threshold,
    )
    plots.save(figure, options.out)
    about = {
        "scene": chosen,
        "objects": int(number[chosen]),
        "shown": int(shown[chosen].sum()),
        "right": int(right[chosen]),
        "mean_share": round(float(shares.mean()), 3),
    }
    print(json.dumps(about))


if __name__ == "__main__":
    main()
