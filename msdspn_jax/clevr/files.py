"""Real CLEVR: scenes files, images, the extracted folder, and the pipeline that makes batches.

However the data is stored, a source is a sequence of records ``{"image": uint8 [height, width, 3],
"objects": float32 [10, 19], "file_name": str}``, the same bit for bit (`clevr.tfds` reads
TensorFlow Datasets, `clevr.cache` resized images). What is damaged is a `UserError` that names file
and entry.
"""

import dataclasses
import functools
import hashlib
import importlib
import io
import json
import zlib
from pathlib import Path
from typing import Any, Protocol, TypedDict

import numpy as np
from jaxtyping import Float, UInt8

from msdspn_jax import _check
from msdspn_jax.clevr.entries import parse_scene
from msdspn_jax.clevr.objects import MAX_OBJECTS, NUM_FEATURES, ClevrScene, encode
from msdspn_jax.errors import UserError

#: Names of the published splits; the test split has images but no scenes.
SPLITS = ("train", "val", "test")


class Record(TypedDict):
    """One image and what is in it."""

    image: UInt8[np.ndarray, "height width 3"]
    objects: Float[np.ndarray, "10 19"]
    file_name: str


class Source(Protocol):
    """A sequence of records that knows its own identity."""

    @property
    def fingerprint(self) -> str:
        """Equal for equal data: what a cache made from the source is bound to."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any) -> Record: ...


# Scenes and images ------------------------------------------------------------------------------


def read_scenes(path: str | Path, *, keep_extra: bool = True) -> list[ClevrScene]:
    """Read a scenes file, every field checked.

    Args:
        path: ``CLEVR_{split}_scenes.json`` or any file of that form.
        keep_extra: keep what the sets do not need (camera, lights, relationships, …); the latter
            fill gigabytes in the published training split.

    Raises:
        UserError: names file, entry and field.
    """
    path = Path(path)
    try:
        content = json.loads(read_bytes(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a readable JSON file ({error}); it may be cut off") from error
    if not isinstance(content, dict) or not isinstance(content.get("scenes"), list):
        raise UserError(f'{path}: expected an object with a list "scenes"')
    scenes, seen = [], {}
    for i, entry in enumerate(content["scenes"]):
        where = f"{path}: scenes[{i}]"
        scene = parse_scene(entry, where)
        if scene.image_filename in seen:
            raise UserError(
                f"{where}.image_filename: {scene.image_filename!r} is that of "
                f"scenes[{seen[scene.image_filename]}] already"
            )
        seen[scene.image_filename] = i
        scenes.append(scene if keep_extra else dataclasses.replace(scene, extra={}))
    return scenes


def decode_image(data: bytes, where: str) -> UInt8[np.ndarray, "height width 3"]:
    """Decode an image file to RGB.

    PNG files are checked chunk by chunk first: the decoder itself lets many damaged ones pass.

    Raises:
        UserError: it does not decode; ``where`` (the file's name) begins the message.
    """
    from PIL import Image, UnidentifiedImageError

    if data.startswith(_PNG_SIGNATURE):
        _check_png(data, where)
    try:
        with Image.open(io.BytesIO(data)) as image:
            return np.array(image.convert("RGB"))
    except UnidentifiedImageError:  # Its own words are the address of a buffer.
        raise UserError(f"{where}: not a readable image (of no known format)") from None
    except Exception as error:  # Pillow's decoders raise a dozen types for damaged files.
        raise UserError(f"{where}: not a readable image ({error})") from error


def resize_image(
    image: UInt8[np.ndarray, "height width 3"], size: int
) -> UInt8[np.ndarray, "size size 3"]:
    """Squash an image to a square by antialiased bilinear resampling, as published."""
    from PIL import Image

    resized = Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(resized)


_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def _check_png(data: bytes, where: str) -> None:
    position, chunk = len(_PNG_SIGNATURE), b""
    view = memoryview(data)
    while chunk != b"IEND":
        length = int.from_bytes(view[position : position + 4], "big")
        end = position + 8 + length
        chunk = bytes(view[position + 4 : position + 8])
        if end + 4 > len(data):
            raise UserError(f"{where}: damaged PNG: cut off after {len(data)} bytes")
        if zlib.crc32(view[position + 4 : end]) != int.from_bytes(view[end : end + 4], "big"):
            raise UserError(f"{where}: damaged PNG: wrong checksum at byte {end}")
        position = end + 4


def read_bytes(path: Path, entry: str = "") -> bytes:
    """A whole file; the error names the file and the entry that asks for it."""
    try:
        return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a name with a null character.
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}{entry}: cannot be read ({reason})") from error


# Sources ----------------------------------------------------------------------------------------


class ClevrFolder:
    """One split of an extracted ``CLEVR_v1.0`` folder, or of one that ``msdspn render`` wrote.

    Images are ``images/{split}/{image_filename}``, scenes ``scenes/CLEVR_{split}_scenes.json``.
    The test split has no scenes: its images come sorted by name, with empty sets.
    """

    def __init__(self, root: str | Path, split: str):
        self.root = clevr_root(root)
        self.split = split
        self.image_folder = self.root / "images" / split
        self.scenes_file = self.root / "scenes" / f"CLEVR_{split}_scenes.json"
        if not self.image_folder.is_dir():
            raise UserError(f"{self.image_folder}: no such folder of images")
        if split == "test" and not self.scenes_file.exists():
            self.file_names = sorted(path.name for path in self.image_folder.glob("*.png"))
            self.objects = np.zeros((len(self.file_names), MAX_OBJECTS, NUM_FEATURES), np.float32)
        else:
            scenes = read_scenes(self.scenes_file, keep_extra=False)
            self.file_names = [scene.image_filename for scene in scenes]
            sets = [encode(scene.objects) for scene in scenes]
            self.objects = np.stack(sets) if sets else np.zeros((0, MAX_OBJECTS, NUM_FEATURES))
        if not self.file_names:
            raise UserError(f"{self.image_folder}: no images to read")

    @property
    def fingerprint(self) -> str:
        """Of the names and the sets; the images are not read."""
        return digest(json.dumps(self.file_names).encode(), self.objects.tobytes())

    def __len__(self) -> int:
        return len(self.file_names)

    def __getitem__(self, index: Any) -> Record:
        """Read and decode one image."""
        index = checked_index(index, len(self))
        path, entry = self.image_folder / self.file_names[index], self.entry(index)
        return {
            "image": decode_image(read_bytes(path, entry), f"{path}{entry}"),
            "objects": self.objects[index],
            "file_name": self.file_names[index],
        }

    def entry(self, index: int) -> str:
        """Which entry a record is, for messages."""
        return f" (scenes[{index}] of {self.scenes_file.name})"

    def __repr__(self) -> str:
        return f"ClevrFolder({str(self.root)!r}, {self.split!r})"


def clevr_root(path: str | Path) -> Path:
    """``path`` itself, or the ``CLEVR_v1.0`` in it."""
    path = Path(path)
    inner = path / "CLEVR_v1.0"
    return inner if inner.is_dir() else path


def import_extra(module: str) -> Any:
    """A module of the ``clevr`` extra, or an error that says how to install it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UserError(
            f"this needs {error.name}, which is not installed: pip install 'msdspn-jax[clevr]'"
        ) from error


def checked_index(index: Any, length: int) -> int:
    index = int(index)
    if not -length <= index < length:
        raise IndexError(f"index: expected a number below {length}, got {index}")
    return index % length


def digest(*parts: bytes) -> str:
    hashed = hashlib.sha256()
    for part in parts:
        hashed.update(part)
    return hashed.hexdigest()


# Pipeline ---------------------------------------------------------------------------------------


def pipeline(
    source: Source,
    *,
    size: int,
    batch_size: int,
    seed: int = 0,
    shuffle: bool = True,
    num_epochs: int | None = None,
    threads: int = 4,
    workers: int = 0,
    drop_remainder: bool = True,
) -> Any:
    """Batches for training, as a ``grain.IterDataset``.

    Every epoch has its own order, fixed by ``seed``. ``iterator.get_state()`` and ``set_state()``
    resume exactly: the next batch is the one an uninterrupted run would have had.

    Args:
        source: any sequence of records: a folder, TFDS or a cache.
        size: images are squashed to ``size`` x ``size`` (antialiased bilinear).
        batch_size: records a batch; batches run across the ends of epochs.
        seed: of the order.
        shuffle: without it, the order of the source.
        num_epochs: None for no end.
        threads: that read and decode (Pillow releases the interpreter's lock while it decodes).
        workers: processes that prefetch batches; 0 for none. Scripts that use them need the usual
            ``if __name__ == "__main__"`` guard.
        drop_remainder: leave out the last, smaller batch.

    Yields:
        ``{"image": uint8 [batch, size, size, 3], "objects": float32 [batch, 10, 19], "file_name":
        str [batch]}``.
    """
    grain = import_extra("grain")
    for name, value in (("size", size), ("batch_size", batch_size), ("threads", threads)):
        _check.require_positive(name, value)
    dataset: Any = grain.MapDataset.source(source).seed(seed)
    if shuffle:
        dataset = dataset.shuffle()
    dataset = dataset.repeat(num_epochs).map(functools.partial(resize_record, size=size))
    dataset = dataset.batch(batch_size, drop_remainder=drop_remainder)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    dataset = dataset.to_iter_dataset(options)
    if workers:
        flags = import_extra("absl.flags").FLAGS
        if not flags.is_parsed():
            # Grain's worker processes read absl flags, which only absl's own main would parse.
            flags.mark_as_parsed()
        dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
    return dataset


def resize_record(record: Record, size: int) -> Record:
    if record["image"].shape[:2] == (size, size):
        return record
    return {**record, "image": resize_image(record["image"], size)}
