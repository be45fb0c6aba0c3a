"""Boxes in COCO's JSON format, with a folder of images, as sets.

An element is (x, y, w, h), the centre and the size of a box as shares of the image's width and
height, and its category, one-hot.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from msdspn_jax._progress import ProgressBar
from msdspn_jax.clevr.files import read_bytes, read_image, resize_image
from msdspn_jax.errors import UserError
from msdspn_jax.tasks.sets.data import Data, check, default_side

BOX = ("x", "y", "w", "h")
#: Names of features that are drawn as a box.
BOX_NAMES = (BOX, ("cx", "cy", "w", "h"))


def is_coco(path: str | Path) -> bool:
    """Whether a file is taken for one in COCO's format: by its name."""
    return Path(path).suffix.lower() == ".json"


def read(
    path: str | Path,
    images: str | Path | None,
    *,
    size: int | None,
    allow_empty: bool = False,
    need_targets: bool = True,
) -> Data:
    """Read an annotations file and its images, squashed to squares.

    Crowds (``iscrowd``) are left out, which are no single boxes, and so are boxes without area.

    Args:
        path: JSON with "images", "annotations" and "categories".
        images: the folder of the images; None: that of the file, or a folder images/ in it.
        size: side to which images are squashed; None: 64 or 128, by the longest side in the file.
        allow_empty: images without a box are allowed.
        need_targets: refuse a file without any box; its targets are None otherwise.

    Raises:
        UserError: names file and entry, and what was expected there.
    """
    path = Path(path)
    try:
        content = json.loads(read_bytes(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a readable JSON file ({error})") from error
    if isinstance(content, dict) and not need_targets:
        content.setdefault("annotations", [])
    for name in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(name), list):
            raise UserError(f'{path}: expected an object with a list "{name}", as COCO has it')
    categories = {}
    for i, entry in enumerate(content["categories"]):
        number = _field(path, "categories", i, entry, "id", int)
        categories[number] = str(entry.get("name", number))
    if len(set(categories.values())) < len(content["categories"]):
        raise UserError(f"{path}: categories: expected an id and a name of its own for each")
    listed = content["images"]
    place = {_field(path, "images", i, x, "id", int): i for i, x in enumerate(listed)}
    if not listed or len(place) < len(listed):
        raise UserError(f"{path}: images: expected at least one, each with an id of its own")
    boxes: list[list[np.ndarray]] = [[] for _ in listed]
    order = {number: i for i, number in enumerate(sorted(categories))}
    for i, entry in enumerate(content["annotations"]):
        if isinstance(entry, dict) and entry.get("iscrowd"):
            continue
        number = _field(path, "annotations", i, entry, "image_id", int)
        category = _field(path, "annotations", i, entry, "category_id", int)
        for what, value, known in (
            ("image_id", number, place),
            ("category_id", category, categories),
        ):
            if value not in known:
                raise UserError(f"{path}: annotations[{i}].{what}: expected one in the file, got"
                                f" {value}")  # fmt: skip
        width, height = (
            _field(path, "images", place[number], listed[place[number]], side, int)
            for side in ("width", "height")
        )
        box = _box(path, i, entry) / np.array([width, height, width, height])
        if not box[2:].all():
            continue
        if not ((box[:2] >= 0) & (box[:2] <= 1)).all():
            raise UserError(
                f"{path}: annotations[{i}].bbox: expected the centre of a box in its image of"
                f" {width} x {height} pixels, got {str(entry['bbox'])[:80]}"
            )
        element = np.concatenate([box, np.eye(len(categories))[order[category]]])
        boxes[place[number]].append(element)
    names = [*BOX, *(f"is {categories[number]}" for number in sorted(categories))]
    arrays: dict[str, Any] = {"names": names}
    if any(boxes):
        arrays["targets"], arrays["mask"] = _stacked(path, boxes, allow_empty)
    elif need_targets:
        raise UserError(f"{path}: annotations: expected at least one box, got none")
    arrays["inputs"] = _pictures(path, listed, images, size)
    try:
        return check(arrays, allow_empty=allow_empty)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error


def _stacked(
    path: Path, boxes: list[list[np.ndarray]], allow_empty: bool
) -> tuple[np.ndarray, np.ndarray]:
    """The elements of every image, padded, and which are there."""
    n = max(map(len, boxes))
    width = max(len(element) for elements in boxes for element in elements)
    targets = np.zeros((len(boxes), n, width), np.float32)
    mask = np.zeros((len(boxes), n), bool)
    for i, elements in enumerate(boxes):
        if elements:
            targets[i, : len(elements)], mask[i, : len(elements)] = np.stack(elements), True
        elif not allow_empty:
            raise UserError(
                f"{path}: images[{i}]: expected a box in every image (--allow-empty lifts this),"
                " got none"
            )
    return targets, mask


def _pictures(path: Path, listed: list[Any], images: Any, size: int | None) -> np.ndarray:
    folder = path.parent if images is None else Path(images)
    if images is None and (folder / "images").is_dir():
        folder = folder / "images"
    side = size or default_side(
        max(
            _field(path, "images", i, entry, name, int)
            for i, entry in enumerate(listed)
            for name in ("width", "height")
        )
    )
    pictures = np.empty((len(listed), side, side, 3), np.uint8)
    with ProgressBar("reading images") as report:
        for i, entry in enumerate(listed):
            name = _field(path, "images", i, entry, "file_name", str)
            # The name alone: a file from elsewhere names nothing outside of the folder.
            inside = Path(name)
            if inside.is_absolute() or ".." in inside.parts:
                raise UserError(f"{path}: images[{i}].file_name: expected a name below {folder}, "
                                f"got {name!r}")  # fmt: skip
            picture = read_image(folder / inside, f" (images[{i}])")
            height, width = picture.shape[:2]
            if (entry["width"], entry["height"]) != (width, height):
                raise UserError(
                    f"{path}: images[{i}]: expected {entry['width']} x {entry['height']} pixels, as"
                    f" it says, got {width} x {height} in {folder / inside}, upright"
                )
            pictures[i] = resize_image(picture, side)
            report(i + 1, len(listed))
    return pictures


def _box(path: Path, index: int, entry: dict[str, Any]) -> np.ndarray:
    """Centre and size, from COCO's corner and size."""
    try:
        x, y, w, h = (float(value) for value in entry["bbox"])
    except (KeyError, TypeError, ValueError):
        x = y = w = h = np.nan
    if not (np.isfinite([x, y, w, h]).all() and w >= 0 and h >= 0):
        raise UserError(
            f"{path}: annotations[{index}].bbox: expected [x, y, width, height], width and height"
            f" >= 0, got {str(entry.get('bbox'))[:80]}"
        )
    return np.array([x + w / 2, y + h / 2, w, h])


def _field(path: Path, group: str, index: int, entry: Any, name: str, kind: type) -> Any:
    value: Any = entry.get(name) if isinstance(entry, dict) else None
    if kind is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise UserError(
            f"{path}: {group}[{index}].{name}: expected {kind.__name__}, got {str(value)[:80]}"
        )
    if name in ("width", "height") and not 0 < value < 10**6:
        raise UserError(f"{path}: {group}[{index}].{name}: expected pixels > 0, got {value}")
    return value
