"""Files written whole or not at all, by one process at a time where that matters."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from msdspn_jax.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write a file so that it is whole or as before; folders are made where needed.

    The data is on the disk before the file takes its name. A file of that name is replaced, a
    link is not followed.

    Args:
        path: the file.
        data: all that shall be in it.

    Raises:
        OSError: it cannot be written; what was there is still there.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # A folder that is ours alone: nobody can plant a link in it, and the file made there has the
    # permissions of any new file (mkstemp's would have to be widened by hand).
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".writing-") as folder:
        temporary = Path(folder) / "file"
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    sync(path.parent)


def write_text(path: str | Path, text: str) -> None:
    """`write_bytes` of a text in UTF-8."""
    write_bytes(path, text.encode())


def as_json(record: Any, indent: int | None = None) -> str:
    """A record as JSON, which has no NaN and no infinity: such numbers become null."""

    def finite(value):
        if isinstance(value, dict):
            return {k: finite(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [finite(v) for v in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(finite(record), indent=indent, allow_nan=False)


@contextlib.contextmanager
def as_user_error(path: str | Path) -> Iterator[None]:
    """Turn what the system says against writing `path` into a `UserError` that names it."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{path}: expected a place that can be written, got {reason}") from error


@contextlib.contextmanager
def waiting_for(folder: Path) -> Iterator[None]:
    """Be the only one in a folder for a moment, after whoever else is.

    Where the file system knows no locks, without.
    """
    handle = None
    with contextlib.suppress(OSError):
        if fcntl is not None:
            handle = os.open(folder, os.O_RDONLY)
            fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk, as far as its file system can say."""
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some network file systems know no such thing for folders.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)
