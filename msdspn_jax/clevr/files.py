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
import os
import stat
import warnings
import zlib
from pathlib import Path
from typing import Any, Protocol, TypedDict, runtime_checkable

import numpy as np
from jaxtyping import Float, UInt8

from msdspn_jax import _check
from msdspn_jax.clevr.entries import parse_scene
from msdspn_jax.clevr.objects import MAX_OBJECTS, NUM_FEATURES, ClevrScene, encode
from msdspn_jax.errors import UserError

#: Names of the published splits; the test split has images but no scenes.
SPLITS = ("train", "val", "test")
#: What images may be: decoders of other formats are never started, whatever a file is called.
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
MAX_PIXELS = 2**25
MAX_IMAGE_BYTES = 2**26
#: What shows through transparent pixels.
BACKGROUND = (128, 128, 128)


class Record(TypedDict):
    """One image and what is in it."""

    image: UInt8[np.ndarray, "height width 3"]
    objects: Float[np.ndarray, "10 19"]
    file_name: str


@runtime_checkable
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

    PNG, JPEG, WebP and BMP are read, by what is in the file and not by its name; of an animation
    or a file of several pictures the first one. Every other kind of pixel has one rule:

    - 16 bits a channel: the high byte, so that black stays black and white white;
    - grey, 1 bit and palette: their colours;
    - alpha, also of palettes and a transparent colour: laid over `BACKGROUND`, mid-grey, which is
      close to the background of CLEVR's images; what is opaque stays bit for bit;
    - CMYK: by plain arithmetic, without colour profiles;
    - EXIF orientation: turned upright.

    PNG files are checked chunk by chunk first: the decoder itself lets many damaged ones pass.

    Raises:
        UserError: it does not decode, or is of more than `MAX_PIXELS` pixels; ``where`` (the file's
            name) begins the message.
    """
    from PIL import Image, UnidentifiedImageError

    if len(data) > MAX_IMAGE_BYTES:
        raise UserError(f"{where}: expected at most {MAX_IMAGE_BYTES} bytes, got {len(data)}")
    if data.startswith(_PNG_SIGNATURE):
        _check_png(data, where)
    elif data.startswith(b"\xff\xd8") and data.count(b"\xff\xda") > _MAX_SCANS:
        # Every scan of a progressive file goes over all pixels once more.
        raise UserError(f"{where}: a JPEG of more than {_MAX_SCANS} scans")
    elif data[8:12] == b"WEBP":
        _check_pixels(*_webp_size(data), where)  # Its decoder allots the canvas when opened.
    try:
        with warnings.catch_warnings():
            # Of too many pixels; `_check_pixels` refuses or lets pass.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            opened = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
        with opened as image:
            _check_pixels(*image.size, where)
            return np.array(_as_rgb(image))
    except UserError:
        raise
    except UnidentifiedImageError:  # Its own words are the address of a buffer.
        known = ", ".join(IMAGE_FORMATS)
        raise UserError(f"{where}: not a readable image (expected {known})") from None
    except Exception as error:  # Pillow's decoders raise a dozen types for damaged files.
        raise UserError(f"{where}: not a readable image ({str(error)[:300]})") from error


def _as_rgb(image: Any) -> Any:
    """A Pillow image of any mode as an upright one of mode RGB, by `decode_image`'s rules."""
    from PIL import Image

    try:
        turn = _TURNS.get(image.getexif().get(_ORIENTATION))
    except Exception:  # Damaged notes about an image do not make it unreadable.
        turn = None
    if image.mode.startswith("I"):
        grey = np.asarray(image)
        opaque = grey != image.info.get("transparency", -1)
        image = Image.fromarray((grey >> 8).astype(np.uint8))
        if not opaque.all():
            image.putalpha(Image.fromarray(opaque.astype(np.uint8) * 255))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if image.getextrema()[3][0] < 255:
            background = Image.new("RGBA", image.size, (*BACKGROUND, 255))
            image = Image.alpha_composite(background, image)
    image = image.convert("RGB")
    return image if turn is None else image.transpose(Image.Transpose[turn])


def _check_pixels(width: int, height: int, where: str) -> None:
    if not 0 < width * height <= MAX_PIXELS:
        raise UserError(
            f"{where}: expected an image of 1 to {MAX_PIXELS} pixels, got {width} x {height}"
        )


def _webp_size(data: bytes) -> tuple[int, int]:
    """Width and height that a WebP file says it has; (1, 1) where the decoder will refuse it."""
    kind, head = data[12:16], data[20:30]
    if len(head) < 10:
        return 1, 1
    if kind == b"VP8X":
        return 1 + int.from_bytes(head[4:7], "little"), 1 + int.from_bytes(head[7:10], "little")
    if kind == b"VP8L":
        bits = int.from_bytes(head[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    sides = (int.from_bytes(head[i : i + 2], "little") & 0x3FFF for i in (6, 8))
    width, height = sides
    return (width, height) if kind == b"VP8 " and width and height else (1, 1)


def resize_image(
    image: UInt8[np.ndarray, "height width 3"], size: int
) -> UInt8[np.ndarray, "size size 3"]:
    """Squash an image to a square by antialiased bilinear resampling, as published."""
    from PIL import Image

    resized = Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(resized)


_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_MAX_SCANS = 500
_ORIENTATION = 0x0112
_TURNS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}


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


def read_bytes(path: Path, entry: str = "", *, limit: int = 2**32) -> bytes:
    """A whole regular file; the error names the file and the entry that asks for it.

    What is no regular file is refused: a pipe has no end that one could wait for, nor has a device.

    Args:
        path: the file.
        entry: added to its name in messages.
        limit: how many bytes it may have.

    Raises:
        UserError: it cannot be read, is no regular file, or larger.
    """
    try:
        # Without waiting: to open a pipe that nobody writes to would take for ever.
        with open(path, "rb", opener=_open_at_once) as file:
            about = os.fstat(file.fileno())
            if not stat.S_ISREG(about.st_mode):
                raise UserError(f"{path}{entry}: cannot be read (not a regular file)")
            # One byte more than allowed: files of /proc say that they have none.
            data = file.read(limit + 1) if about.st_size <= limit else None
    except (OSError, ValueError) as error:  # ValueError: a name with a null character.
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}{entry}: cannot be read ({reason})") from error
    if data is None or len(data) > limit:
        raise UserError(f"{path}{entry}: larger than the {limit} bytes that are read")
    return data


def read_image(path: Path, entry: str = "") -> UInt8[np.ndarray, "height width 3"]:
    """`decode_image` of a file."""
    return decode_image(read_bytes(path, entry, limit=MAX_IMAGE_BYTES), f"{path}{entry}")


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


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
        """Of the names, the sets, and size and time of every image; the images are not read."""
        images = {entry.name: entry.stat() for entry in os.scandir(self.image_folder)}
        seen = [images.get(Path(name).name) for name in self.file_names]
        files = [(x.st_size, x.st_mtime_ns) if x else None for x in seen]
        names = json.dumps([str(self.root.resolve()), self.file_names, files])
        return digest(names.encode(), self.objects.tobytes())

    def __len__(self) -> int:
        return len(self.file_names)

    def __getitem__(self, index: Any) -> Record:
        """Read and decode one image."""
        index = checked_index(index, len(self))
        path, entry = self.image_folder / self.file_names[index], self.entry(index)
        return {
            "image": read_image(path, entry),
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
