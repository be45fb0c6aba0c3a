"""Our renderer beside Blender's, scene by scene: the table and the picture of RENDERER.md.

    python experiments/clevr/compare_renderer.py --folder DIR --picture sides.png

DIR holds CLEVR_calib_scenes.json (with camera and lights) and images128.npz (uint8, 128x128).
"""

import argparse
import json
from pathlib import Path

import jax
import numpy as np
from skimage.metrics import structural_similarity

from msdspn_jax import plots
from msdspn_jax.clevr.camera import look_at_origin, project
from msdspn_jax.clevr.render.trace import QUALITIES, render
from msdspn_jax.clevr.sampling import visible_pixels
from msdspn_jax.clevr.scene import scene_from_entry, stack_scenes
from msdspn_jax.tasks.summary import Result, write_results


def main() -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="where the references are")
    parser.add_argument("--quality", choices=list(QUALITIES), default="default")
    parser.add_argument("--picture", type=Path, help="PNG to write: reference, ours, difference")
    parser.add_argument("--show", type=int, nargs="*", default=[3, 9, 30, 8, 5, 2])
    flags = parser.parse_args()
    entries = json.loads((flags.folder / "CLEVR_calib_scenes.json").read_text())["scenes"]
    references = np.load(flags.folder / "images128.npz")["images"]
    scenes = stack_scenes([scene_from_entry(e) for e in entries])
    images = np.asarray(render(scenes, 128, quality=flags.quality))
    pairs = zip(scenes.camera, scenes.positions, strict=True)
    places = [project(look_at_origin(camera), positions) for camera, positions in pairs]
    counted = np.asarray(jax.jit(lambda s: jax.lax.map(visible_pixels, s))(scenes))
    rows = []
    print("| scene | objects | mean abs. difference | SSIM | centres, px | visible pixels, % |")
    print("|---|---|---|---|---|---|")
    for i, entry in enumerate(entries):
        n = len(entry["objects"])
        difference = np.abs(images[i] / 255 - references[i] / 255).mean()
        similarity = structural_similarity(
            images[i] / 255, references[i] / 255, channel_axis=2, data_range=1.0
        )
        # The generator cuts its coordinates down to whole pixels of 480x320.
        theirs = np.array([o["pixel_coords"][:2] for o in entry["objects"]]) + 0.5
        centres = np.abs((places[i][:n, :2] - theirs) * [128 / 480, 128 / 320]).max()
        pixels = np.array([o["visible_pixels"] for o in entry["objects"]])
        seen = 100 * np.abs(counted[i, :n] / pixels - 1).max()
        rows.append((difference, similarity, centres, seen))
        index = entry["image_index"]
        print(
            f"| {index} | {n} | {difference:.4f} | {similarity:.4f} | {centres:.2f} | {seen:.1f} |"
        )
    table = np.array(rows)
    for name, part in (
        ("mean", table),
        ("mean, even scenes (fitted on)", table[::2]),
        ("mean, odd scenes (held out)", table[1::2]),
    ):
        a, b, c, d = part.mean(0)
        print(f"| **{name}** | | **{a:.4f}** | **{b:.4f}** | {c:.2f} | {d:.1f} |")
    a, b, c, d = table[:, 0].max(), table[:, 1].min(), table[:, 2].max(), table[:, 3].max()
    print(f"| **worst** | | **{a:.4f}** | **{b:.4f}** | {c:.2f} | {d:.1f} |")
    result = Result(
        "[renderer](experiments/clevr/RENDERER.md) beside Blender, structural similarity",
        "",
        "",
        f"{table[:, 1].mean():.3f} (worst scene {b:.3f})",
        f"{len(entries)} scenes, 128 x 128 pixels",
        "",
        "python experiments/clevr/compare_renderer.py --folder REFERENCES",
    )
    if flags.quality == "default":
        write_results(Path(__file__).parent, [result], "renderer")
    if flags.picture:
        shown = [x[flags.show].astype(float) for x in (references, images)]
        difference = np.clip(127.5 + 4 * (shown[1] - shown[0]), 0, 255)
        rows = {"Blender": shown[0], "ours": shown[1], "ours - Blender,\n4 times": difference}
        plots.save(image_rows(rows), flags.picture)


def image_rows(rows):
    """A labelled row of images for each of ``{label: images [n, size, size, 3] of 0 to 255}``."""
    count = len(next(iter(rows.values())))
    figure = plots.new_figure(1.3 * count + 0.4, 1.3 * len(rows))
    for axes_of_row, (label, images) in zip(
        figure.subplots(len(rows), count, squeeze=False), rows.items(), strict=True
    ):
        axes_of_row[0].set_ylabel(label)
        for axes, image in zip(axes_of_row, images, strict=True):
            axes.imshow(image.astype(np.uint8))
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
    return figure


if __name__ == "__main__":
    main()
