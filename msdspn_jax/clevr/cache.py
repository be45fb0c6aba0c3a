"""A cache of resized CLEVR images on disk, made once, that may be interrupted at any moment."""

import concurrent.futures
import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from msdspn_jax import _check
from msdspn_jax._files import as_user_error, waiting_for, write_text
from msdspn_jax.clevr.files import (
    Record,
    Source,
    checked_index,
    digest,
    read_bytes,
    resize_record,
)
from msdspn_jax.clevr.objects import MAX_OBJECTS, NUM_FEATURES
from msdspn_jax.errors import UserError

CACHE_FORMAT = 1
_NAMES = ("images", "objects")
_CHUNK = 256


@dataclasses.dataclass(frozen=True)
class ClevrCache:
    """Resized images of one split, memory-mapped: a source of records, and whole arrays.

    ``jax.device_put(cache.images)`` puts all of them on the device: 3.4 GB for the published
    training split at 128 x 128.
    """

    images: UInt8[np.ndarray, "num size size 3"]
    objects: Float[np.ndarray, "num 10 19"]
    file_names: list[str]
    fingerprint: str

    def __len__(self) -> int:
        return len(self.file_names)

    def __getitem__(self, index: Any) -> Record:
        """One record, its image already resized."""
        index = checked_index(index, len(self))
        return {
            "image": np.asarray(self.images[index]),
            "objects": np.asarray(self.objects[index]),
            "file_name": self.file_names[index],
        }


def cache_folder(out: str | Path, split: str, size: int) -> Path:
    """Where under ``out`` the cache of a split at a size lives."""
    return Path(out) / f"clevr-{split}-{size}"


def prepare_cache(
    source: Source,
    folder: str | Path,
    *,
    size: int,
    threads: int = 4,
    on_progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Resize all images of a source once, into ``images.npy`` and ``objects.npy`` under ``folder``.

    It may be interrupted at any moment and run again: finished chunks are checked against their
    checksums and kept. ``manifest.json`` is written last, and without it a cache does not load. A
    cache that is complete is left as it is; one that another process prepares is waited for.

    Args:
        source: where the records come from.
        folder: made where needed; see `cache_folder`.
        size: side of the square images.
        threads: that read, decode and resize.
        on_progress: called with (images done, images in all).

    Returns:
        ``folder``.

    Raises:
        UserError: a record is damaged; ``folder`` holds another source's cache; the disk is full.
    """
    _check.require_positive("size", size)
    folder, number = Path(folder), len(source)
    identity = {"format": CACHE_FORMAT, "size": size, "num": number, "source": source.fingerprint}
    report = on_progress or (lambda done, total: None)
    if not _is_finished(folder, identity):
        with as_user_error(folder):
            folder.mkdir(parents=True, exist_ok=True)
            # Of two jobs that need the same images one prepares them, and the other waits.
            with waiting_for(folder):
                if not _is_finished(folder, identity):
                    _fill_cache(source, folder, identity, threads, report)
                    return folder
    report(number, number)
    return folder


def load_cache(folder: str | Path, *, verify: bool = False) -> ClevrCache:
    """Open a prepared cache.

    Args:
        folder: what `prepare_cache` returned.
        verify: read everything and compare checksums (seconds a gigabyte); without it, only sizes.

    Raises:
        UserError: the cache is missing, unfinished or damaged.
    """
    folder = Path(folder)
    if not (folder / "manifest.json").exists():
        raise UserError(
            f"{folder}: no finished cache here; run `msdspn data clevr` (again, if it was stopped)"
        )
    manifest = _read_manifest(folder)
    identity, chunks = manifest["identity"], manifest["chunks"]
    arrays = {}
    for name, (shape, dtype) in _arrays_of(identity).items():
        path = folder / f"{name}.npy"
        try:
            arrays[name] = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{path}: damaged or missing ({error}); prepare it again") from error
        if arrays[name].shape != shape or arrays[name].dtype != dtype:
            raise UserError(
                f"{path}: expected {np.dtype(dtype)} {shape}, got {arrays[name].dtype} "
                f"{arrays[name].shape}; remove {folder} and prepare it again"
            )
    if verify:
        for i, chunk in enumerate(chunks):
            for name, array in arrays.items():
                if _chunk_digest(array, i) != chunk[name]:
                    first = i * _CHUNK
                    raise UserError(
                        f"{folder / name}.npy: wrong checksum in records {first} to "
                        f"{first + _CHUNK - 1}; remove {folder} and prepare it again"
                    )
    file_names = [name for chunk in chunks for name in chunk["file_names"]]
    return ClevrCache(**arrays, file_names=file_names, fingerprint=identity["source"])


def _is_finished(folder: Path, identity: dict[str, Any]) -> bool:
    """Whether the cache of this data is there, whole; refuses another's."""
    if not (folder / "manifest.json").exists():
        return False
    manifest = _read_manifest(folder)
    if manifest["identity"] != identity:
        raise UserError(
            f"{folder}: holds the cache of other data ({manifest['identity']}, expected "
            f"{identity}); remove it or choose another folder"
        )
    load_cache(folder)
    return True


def _fill_cache(
    source: Source,
    folder: Path,
    identity: dict[str, Any],
    threads: int,
    report: Callable[[int, int], None],
) -> None:
    journal = folder / "unfinished.json"
    number, size = identity["num"], identity["size"]
    chunks = _resumable_chunks(folder, journal, identity)
    files = {name: _open_array(folder, name, *spec) for name, spec in _arrays_of(identity).items()}
    try:
        report(len(chunks) * _CHUNK, number)
        with concurrent.futures.ThreadPoolExecutor(threads) as pool:
            for start in range(len(chunks) * _CHUNK, number, _CHUNK):
                indices = range(start, min(start + _CHUNK, number))

                def record(index: int) -> Record:
                    return resize_record(source[index], size)

                records = []
                try:
                    for finished in pool.map(record, indices):
                        records.append(finished)
                        report(start + len(records), number)
                except BaseException:
                    pool.shutdown(cancel_futures=True)
                    raise
                entry: dict[str, Any] = {"file_names": [r["file_name"] for r in records]}
                for name, key in (("images", "image"), ("objects", "objects")):
                    data = _as_kept(name, [r[key] for r in records], identity).tobytes()
                    file, header = files[name]
                    file.seek(header + start * (len(data) // len(records)))
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                    entry[name] = digest(data)
                # Only now: a chunk that the journal names is a chunk that is on the disk.
                chunks.append(entry)
                write_text(journal, json.dumps({"identity": identity, "chunks": chunks}))
    finally:
        for file, _ in files.values():
            file.close()
    for name in files:
        partial = folder / f"{name}.partial.npy"
        if partial.exists():
            os.replace(partial, folder / f"{name}.npy")
    write_text(folder / "manifest.json", json.dumps({"identity": identity, "chunks": chunks}))
    journal.unlink(missing_ok=True)


def _as_kept(name: str, arrays: list[np.ndarray], identity: dict[str, Any]) -> np.ndarray:
    """Arrays of some records as one, of the shape and dtype that the file has."""
    shape, dtype = _arrays_of(identity)[name]
    for array in arrays:
        # Objects may be of any floats; of float images it is not known what white is.
        kind = np.floating if name == "objects" else dtype
        if array.shape != shape[1:] or not np.issubdtype(array.dtype, kind):
            raise UserError(
                f"source: expected {name} of shape {shape[1:]} and {np.dtype(dtype)}, got shape "
                f"{array.shape} and {array.dtype}"
            )
    return np.stack(arrays).astype(dtype)


def _arrays_of(identity: dict[str, Any]) -> dict[str, tuple[tuple[int, ...], type]]:
    number, size = identity["num"], identity["size"]
    return {
        "images": ((number, size, size, 3), np.uint8),
        "objects": ((number, MAX_OBJECTS, NUM_FEATURES), np.float32),
    }


def _path_of(folder: Path, name: str) -> Path:
    finished = folder / f"{name}.npy"
    return finished if finished.exists() else folder / f"{name}.partial.npy"


def _open_array(folder: Path, name: str, shape: tuple[int, ...], dtype: type):
    """The file of an array, open for writing, and how many bytes its header has.

    Not a memory map for writing: that dies of a bus error where the disk is full.
    """
    path = _path_of(folder, name)
    if not path.exists():
        np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    header = path.stat().st_size - int(np.prod(shape)) * np.dtype(dtype).itemsize
    return path.open("r+b"), header


def _resumable_chunks(
    folder: Path, journal: Path, identity: dict[str, Any]
) -> list[dict[str, Any]]:
    """The leading chunks of an earlier, unfinished run that are as they were written."""
    kept: list[dict[str, Any]] = []
    try:
        earlier = json.loads(journal.read_bytes())
        if earlier["identity"] != identity:
            raise ValueError("other data")
        arrays = {}
        for name, (shape, dtype) in _arrays_of(identity).items():
            arrays[name] = np.load(_path_of(folder, name), mmap_mode="r", allow_pickle=False)
            if arrays[name].shape != shape or arrays[name].dtype != dtype:
                raise ValueError("other data")
        for i, chunk in enumerate(earlier["chunks"]):
            if any(_chunk_digest(array, i) != chunk[name] for name, array in arrays.items()):
                break
            kept.append(chunk)
    except (OSError, ValueError, KeyError, TypeError, EOFError):
        # Nothing of it can be trusted: start over.
        for path in (*folder.glob("*.partial.npy"), *(folder / f"{n}.npy" for n in _NAMES)):
            path.unlink(missing_ok=True)
        return []
    return kept


def _chunk_digest(array: np.ndarray, chunk: int) -> str:
    return digest(array[chunk * _CHUNK : (chunk + 1) * _CHUNK].tobytes())


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / "manifest.json"
    try:
        manifest = json.loads(read_bytes(path))
        identity = manifest["identity"]
        if identity["format"] != CACHE_FORMAT:
            raise UserError(
                f"{path}: format {identity['format']}, expected {CACHE_FORMAT}; remove {folder} "
                "and prepare it again"
            )
        names = [name for chunk in manifest["chunks"] for name in chunk["file_names"]]
        if len(names) != identity["num"]:
            raise ValueError(f"{len(names)} names for {identity['num']} records")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged ({error!r}); remove {folder} and prepare it") from error
    return manifest
