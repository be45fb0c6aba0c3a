"""Where a data set lies: .npz, a folder of .npy files, COCO's .json, or a folder of images."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np

from msdspn_jax._progress import ProgressBar
from msdspn_jax.clevr.files import read_image, resize_image
from msdspn_jax.errors import UserError
from msdspn_jax.tasks.sets import coco, data
from msdspn_jax.tasks.sets.format import Format

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def load(
    path: str, *, images: str | None = None, size: int | None = None, allow_empty: bool = False
) -> data.Data:
    """A data set to train on; kept, so that the next call is for nothing.

    While no file changes; of COCO's only the .json is looked at, not its images.

    Args:
        path: .npz, a folder of .npy files, or COCO's .json.
        images: with .json, the folder of the images.
        size: with .json, the side to which they are squashed.
        allow_empty: sets without any element are allowed.

    Raises:
        UserError: as `data.read` and `coco.read`.
    """
    stamps = []
    for file in sorted([Path(path), *Path(path).glob("*.npy")]):
        if file.exists():
            about = file.stat()
            stamps.append((str(file), about.st_mtime_ns, about.st_size))
    if coco.is_coco(path):
        return _load(path, images, size, allow_empty, tuple(stamps))
    if images is not None:
        _refuse_image_dir(path, images)
    return _load(path, None, None, allow_empty, tuple(stamps))


def _refuse_image_dir(path: str, images: str) -> NoReturn:
    raise UserError(f"--image-dir: expected none with {path}, which is no .json, got {images}")


# Training, validation and test.
@functools.lru_cache(maxsize=3)
def _load(
    path: str, images: str | None, size: int | None, allow_empty: bool, stamps: tuple
) -> data.Data:
    del stamps
    if coco.is_coco(path):
        found = coco.read(path, images, size=size, allow_empty=allow_empty)
        # Another decoder may read other pixels of the same files.
        return data.with_fingerprint(found, of_inputs=False)
    return data.with_fingerprint(data.read(path, allow_empty=allow_empty), of_inputs=True)


class ToPredict(NamedTuple):
    """What `load_for_prediction` found.

    Attributes:
        arrays: the inputs as a model takes them, and targets where there are some.
        files: the names of the files of a folder of images.
        unread: what is wrong with those of them that cannot be read.
        no_scores: what is wrong with the targets, which are then left out.
    """

    arrays: dict[str, np.ndarray]
    files: list[str] | None = None
    unread: tuple[str, ...] = ()
    no_scores: str | None = None


def load_for_prediction(path: str, form: Format, *, images: str | None = None) -> ToPredict:
    """The inputs of a data set as a model takes them, and its targets where it has some.

    Args:
        path: as for `load`, where targets need not be there; or a folder of images.
        form: of the model.
        images: as for `load`.

    Raises:
        UserError: the inputs cannot be read, or do not fit the model; of a folder of images, none
            can be read.
    """
    folder = Path(path)
    if images is not None and not coco.is_coco(path):
        _refuse_image_dir(path, images)
    if folder.is_dir() and not any(folder.glob("*.npy")):
        files = sorted(p for p in folder.iterdir() if p.suffix.lower() in _SUFFIXES)
        if not files or form.kind != "images":
            expected = "images or " if form.kind == "images" else ""
            raise UserError(f"{path}: expected {expected}.npy files in this folder, got neither")
        files, pictures, unread = _read_all(files, form.input_shape[0])
        if not files:
            raise UserError(f"{path}: no image in it can be read: {unread[0]}")
        found = data.check({"inputs": pictures})
        names = [file.name for file in files]
        return ToPredict(data.fitted_inputs(found, form), names, tuple(unread))
    no_scores = None
    if coco.is_coco(path):
        side = form.input_shape[0] if form.kind == "images" else None
        found = coco.read(path, images, size=side, allow_empty=True, need_targets=False)
    else:
        try:
            found = data.read(path, need_targets=False, allow_empty=True)
        except UserError as error:
            # What is wrong may be the targets alone.
            found, no_scores = data.read(path, arrays=data.OF_INPUTS), str(error)
    try:
        arrays = data.fitted_inputs(found, form)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    if found.targets is not None:
        try:
            arrays |= data.fitted_targets(found, form)
        except ValueError as error:
            no_scores = f"{path}: {error}"
    return ToPredict(arrays, no_scores=no_scores)


def _read_all(files: list[Path], side: int) -> tuple[list[Path], np.ndarray, list[str]]:
    """The files that can be read, their pictures, and what is wrong with the others."""
    pictures = np.empty((len(files), side, side, 3), np.uint8)
    read, unread = [], []
    with ProgressBar("reading images") as report:
        for i, file in enumerate(files):
            try:
                pictures[len(read)] = resize_image(read_image(file), side)
                read.append(file)
            except UserError as error:
                unread.append(str(error))
            report(i + 1, len(files))
    return read, pictures[: len(read)], unread
