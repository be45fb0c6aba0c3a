"""One writer at a time in a run folder, whichever process it lives in."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import time
import warnings
from pathlib import Path
from typing import IO

from msdspn_jax.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

NAME = "lock"


class Lock:
    """The right to write in a run folder; the folder is made if there is none.

    The system gives the right back when its holder ends, however it ends: the file ``lock`` may
    stay behind, and means nothing by itself. Where the file system knows no locks, a warning says
    so and nothing is refused.

    Attributes:
        made_folder: whether there was no such folder before.
    """

    def __init__(self, folder: Path):
        """Take the right.

        Args:
            folder: the run folder.

        Raises:
            UserError: another writer has it; names who.
            OSError: the folder or the file cannot be made.
        """
        self.folder = folder
        self.made_folder = not folder.exists()
        self._file: IO[str] | None = None
        while True:
            folder.mkdir(parents=True, exist_ok=True)
            try:
                file = (folder / NAME).open("a+")
            except FileNotFoundError:
                # A writer before us that never began has just removed the folder.
                self.made_folder = True
                continue
            try:
                self._take(file)
                if _is_file_at(file, folder / NAME):
                    break
            except BaseException:
                file.close()
                raise
            file.close()
        self._file = file
        # What a writer that was killed left half written (`_files.write_bytes`).
        for path in folder.glob(".writing-*"):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > 3600:
                    shutil.rmtree(path)

    def _take(self, file: IO[str]) -> None:
        try:
            if fcntl is None:
                raise OSError("this system has no flock")
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(
                f"{self.folder} is being written by {_holder(file.read())}."
                " Wait for it to end, or choose another --run-dir."
            ) from None
        except OSError as error:
            warnings.warn(
                f"{self.folder}: cannot be locked ({error.strerror or error}): see to it that no"
                " other process trains in it",
                stacklevel=2,
            )
        record = {
            "process": os.getpid(),
            "host": socket.gethostname(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        # A full disk must not keep a run from saying that the disk is full.
        with contextlib.suppress(OSError):
            file.truncate(0)
            file.write(json.dumps(record) + "\n")
            file.flush()

    def release(self) -> None:
        """Give the right back."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None


def _is_file_at(file: IO[str], path: Path) -> bool:
    """Whether an open file still has its name: what is locked must be what others will open."""
    try:
        there = path.stat()
    except OSError:
        return False
    here = os.fstat(file.fileno())
    return (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)


def _holder(text: str) -> str:
    try:
        record = json.loads(text)
        return f"process {record['process']} on {record['host']} since {record['since']}"
    except (ValueError, KeyError, TypeError):
        return "another process"
