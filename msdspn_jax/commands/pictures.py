"""The images that ``msdspn predict`` is given: where they are, their names, what to say of them."""

from __future__ import annotations

import glob
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from msdspn_jax.errors import UserError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
STANDARD_INPUT = "-"
_LONGEST_STEM, _LONGEST_SUFFIX = 200, 10


class Picture(NamedTuple):
    """An image to predict."""

    path: Path
    name: str
    """Its image_filename: a bare name, see `portable_name`, unique among all."""
    data: bytes | None = None
    """Its file, where that came by standard input."""

    def read(self) -> np.ndarray:
        """Decode it: uint8 [height, width, 3].

        Raises:
            UserError: as `clevr.files.read_image`.
        """
        from msdspn_jax.clevr.files import decode_image, read_image

        if self.data is None:
            return read_image(self.path)
        return decode_image(self.data, "standard input")


class Reading(NamedTuple):
    """An image as the model sees it."""

    picture: Picture
    image: np.ndarray
    original: tuple[int, int]
    """Width, height."""


class Notes:
    """What the user shall know about the images, said once."""

    def __init__(self) -> None:
        self.wrong = 0
        self._sizes: Counter[tuple[int, int]] = Counter()
        self._distorted: list[str] = []
        self._side = 0

    def skip(self, message: str) -> None:
        """Name what is wrong at once."""
        self.wrong += 1
        print(f"msdspn predict: skipped: {printable(message)}", file=sys.stderr)

    def count(self, reading: Reading, side: int) -> None:
        """Remember the size of an image."""
        width, height = reading.original
        self._side = side
        if (width, height) != (side, side):
            self._sizes[width, height] += 1
            # CLEVR's proportions, or squashed to a square already.
            if not (abs(2 * width / (3 * height) - 1) < 0.02 or width == height):
                self._distorted.append(printable(str(reading.picture.path)))

    def show(self, entries: list[dict[str, Any]]) -> None:
        """Say what was done to the images, and of which there may be more to say."""
        full = [entry["image_filename"] for entry in entries if entry.get("full")]
        if full:
            number = next(len(entry["objects"]) for entry in entries if entry.get("full"))
            more = f" and {len(full) - 1} more" if len(full) > 1 else ""
            print(
                f"note: {full[0]}{more}: {number} objects found, which is all that the model can"
                " say; there may be more",
                file=sys.stderr,
            )
        if self._sizes:
            sizes = ", ".join(f"{w}x{h}" for (w, h), _ in self._sizes.most_common(3))
            more = " and other sizes" if len(self._sizes) > 3 else ""
            number = sum(self._sizes.values())
            print(
                f"note: {number} image{'s' if number > 1 else ''} resized to"
                f" {self._side}x{self._side}, from {sizes}{more}",
                file=sys.stderr,
            )
        if self._distorted:
            more = f" and {len(self._distorted) - 1} more" if len(self._distorted) > 1 else ""
            print(
                f"note: {self._distorted[0]}{more}: not in CLEVR's proportions (3:2, or squashed to"
                " a square), so the model sees its objects distorted",
                file=sys.stderr,
            )


def collect(paths: Sequence[Path], notes: Notes) -> list[Picture]:
    """The files that arguments name, each once, with names that are unique."""
    files: list[Path] = []
    piped: list[Picture] = []
    for path in paths:
        if str(path) == STANDARD_INPUT:
            if not piped:
                piped = _from_standard_input(notes)
            continue
        if not os.path.lexists(path) and glob.has_magic(str(path)):
            # A pattern, which no shell has expanded.
            matching = sorted(p for p in glob.glob(str(path), recursive=True) if os.path.isfile(p))
            if not matching:
                notes.skip(f"{path}: no file is called so")
            files += map(Path, matching)
            continue
        if not os.path.isdir(path):
            files.append(path)
            continue
        try:
            inside = sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
        except OSError as error:
            notes.skip(f"{path}: cannot be read ({error.strerror or error})")
            continue
        if not inside:
            notes.skip(f"{path}: a folder without PNG, JPEG, WebP or BMP images")
        files += inside
    # The same file named twice is one image.
    given: dict[str, Path] = {}
    for path in files:
        given.setdefault(os.path.abspath(path), path)
    once = [Picture(path, portable_name(path.name)) for path in given.values()] + piped
    names = unique_names([picture.name for picture in once])
    return [picture._replace(name=name) for picture, name in zip(once, names, strict=True)]


def _from_standard_input(notes: Notes) -> list[Picture]:
    from msdspn_jax.clevr.files import MAX_IMAGE_BYTES

    # One byte more than is read: then it is too long, which the decoder says.
    data = sys.stdin.buffer.read(MAX_IMAGE_BYTES + 1)
    if not data:
        notes.skip("standard input: empty")
        return []
    return [Picture(Path(STANDARD_INPUT), "stdin", data)]


def in_utf8(text: str) -> str:
    r"""A text that UTF-8 can hold: the bytes of a name that it cannot are written as \xff."""
    # How Python keeps such a byte.
    return "".join(
        f"\\x{ord(c) - 0xDC00:02x}" if "\udc80" <= c <= "\udcff" else c for c in text
    ).encode(errors="backslashreplace").decode()  # fmt: skip


def printable(text: str) -> str:
    """A text for a terminal: what would control it, or is not UTF-8, is escaped."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode() for c in in_utf8(text)
    )


def portable_name(name: str) -> str:
    """A file's name as ``image_filename`` has it: no backslash, all printable, not too long."""
    stem, suffix = os.path.splitext("".join(c if c.isprintable() else "_" for c in name))
    # Cut so that a number and another suffix still fit into the 255 bytes of a name.
    short = stem.encode()[:_LONGEST_STEM].decode(errors="ignore") + suffix[:_LONGEST_SUFFIX]
    return short.replace("\\", "_")


def unique_names(names: Sequence[str]) -> list[str]:
    """Numbers behind the stems of names that came before, also where only the case differs."""
    taken = {name.casefold() for name in names}
    seen: set[str] = set()
    unique = []
    for name in names:
        number, new = 1, name
        # A made-up name must not take one that a later image has by itself.
        while new.casefold() in seen or (number > 1 and new.casefold() in taken):
            number += 1
            new = f"{Path(name).stem}-{number}{Path(name).suffix}"
        seen.add(new.casefold())
        unique.append(new)
    return unique


def read_picture(picture: Picture, *, size: int) -> Reading | UserError:
    """Read and squash an image; what is wrong with it is returned, so that others go on."""
    from msdspn_jax.clevr.files import resize_image

    try:
        image = picture.read()
    except UserError as error:
        return error
    height, width = image.shape[:2]
    if (height, width) != (size, size):
        image = resize_image(image, size)
    return Reading(picture, image, (width, height))
