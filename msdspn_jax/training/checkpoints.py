"""Checkpoints of a run: saved in the background, sealed, verified when read."""

from __future__ import annotations

import concurrent.futures
import contextlib
import errno
import glob
import hashlib
import importlib
import json
import logging
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree

from msdspn_jax import _files
from msdspn_jax.errors import UserError

SEAL = "seal.json"
NOTES = "notes.json"
# Where version 0.1.0 kept the notes, and no seal.
_OLD_NOTES = Path("notes") / "metadata"
# What an interrupted save, of this version or of orbax, and an interrupted deletion leave behind.
DAMAGED = "damaged_checkpoints"
"""The folder beside them into which damaged ones are set aside."""
_SAVING, _DELETING, _ORBAX = ".saving-", ".deleting-", "orbax-checkpoint-tmp"


class Restored(NamedTuple):
    """A checkpoint read back.

    Attributes:
        step: its step.
        state: the tree that was saved, as NumPy arrays.
        notes: the JSON object that was saved with it.
        damaged: newer checkpoints that could not be read, with the reason.
    """

    step: int
    state: PyTree
    notes: dict[str, Any]
    damaged: list[tuple[Path, str]]


class OtherModelError(UserError):
    """A checkpoint is whole, but of a model with other parameters."""


class Checkpoints:
    """The ``checkpoints/`` folder of a run; orbax writes the arrays.

    Saves are asynchronous and atomic: a checkpoint is there whole or not at all, and has its name
    only once all of it is on the disk. A seal lists every file in it with its SHA-256, so that
    whatever is damaged later is noticed before any of it is used.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep: int = 2,
        monitor: tuple[str, Literal["min", "max"]] = ("loss", "min"),
        read_only: bool = False,
    ):
        """Open the folder; to write in it, one must hold the run folder's `Lock`.

        Args:
            folder: where the checkpoints are.
            keep: how many of the latest to keep, besides the best.
            monitor: the metric that says which is best, and whether small or large is good.
            read_only: change nothing. Otherwise the folder is made, and damaged checkpoints are
                set aside.
        """
        logging.getLogger("absl").setLevel(logging.ERROR)  # orbax: a dozen lines a save.
        self.folder = folder.absolute()
        self.set_aside_at_opening: list[tuple[Path, str]] = []
        self._keep, (self._metric, self._mode) = keep, monitor
        self._leader = jax.process_index() == 0
        self._saving: concurrent.futures.Future[None] | None = None
        self._read_back = False
        self._values: dict[int, float | None] = {}
        if read_only or not self._leader:
            return
        # Where it is missing, training shall not begin.
        importlib.import_module("orbax.checkpoint")
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in self.folder.iterdir():
            if path.name.startswith((_SAVING, _DELETING)) or _ORBAX in path.name:
                shutil.rmtree(path, ignore_errors=True)
        for step in self.steps():
            reason = damage(self.folder / str(step))
            if reason is not None:
                path = self.folder / str(step)
                kept = self.set_aside(path)
                self.set_aside_at_opening.append((kept, f"checkpoint {path}: {reason}"))

    # --- writing ---

    def save(
        self, state: PyTree, step: int, notes: dict[str, Any], metrics: dict[str, float] | None
    ) -> None:
        """Begin to save ``state`` (host arrays that nobody changes); process 0 alone writes.

        The first save is read back before this returns.

        Args:
            state: what to save.
            step: its name.
            notes: a JSON object, kept beside it.
            metrics: those of an evaluation at this very step; None if there was none.

        Raises:
            UserError: this or the save before could not be written.
        """
        self.wait()
        path = self.folder / str(step)
        if not self._leader or path.exists():
            return
        size = sum(np.asarray(x).nbytes for x in jax.tree.leaves(state))
        free = shutil.disk_usage(self.folder).free
        if free < size + (1 << 16):
            raise self._full(step, f"{size:,} bytes wanted, {free:,} free")
        notes = notes | {
            "checksum": checksum(state),
            "metrics": metrics,
            "shapes": shapes_of(state),
        }
        self._saving_step = step
        executor = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._saving = executor.submit(self._write, state, step, notes)
        executor.shutdown(wait=False)
        if not self._read_back:
            self.wait()
            try:
                self.read(step, state)
            except UserError as error:
                raise UserError(
                    f"what is saved in {self.folder} cannot be read back ({error})."
                    " Choose another --run-dir."
                ) from error
            self._read_back = True

    def _write(self, state: PyTree, step: int, notes: dict[str, Any]) -> None:
        path, making = self.folder / str(step), self.folder / f"{_SAVING}{step}"
        if making.exists():
            shutil.rmtree(making)
        making.mkdir()
        with _without_wildcards(making) as plain, _orbax() as (orbax, args):
            orbax.save(plain / "state", args=args.StandardSave(state))
        (making / NOTES).write_text(json.dumps(notes))
        (making / SEAL).write_text(_seal(making))
        for folder, _, files in os.walk(making):
            for name in (*files, "."):
                _files.sync(Path(folder) / name)
        making.rename(path)
        _files.sync(self.folder)
        self._delete_what_is_not_kept()

    def _delete_what_is_not_kept(self) -> None:
        steps = self.steps()
        for step in set(steps) - set(steps[-self._keep :]) - {self.best_step()}:
            # Renamed first: nobody ever sees half a checkpoint under a checkpoint's name.
            doomed = self.folder / f"{_DELETING}{step}"
            (self.folder / str(step)).rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)

    def wait(self) -> None:
        """Wait until everything is on disk.

        Raises:
            UserError: it could not be written.
        """
        saving, self._saving = self._saving, None
        if saving is None:
            return
        try:
            saving.result()
        except Exception as error:
            shutil.rmtree(self.folder / f"{_SAVING}{self._saving_step}", ignore_errors=True)
            raise self._explained(error, self._saving_step) from error

    def settle(self) -> None:
        """Wait like `wait`, but let nothing that fails hide the error being reported."""
        with contextlib.suppress(Exception):
            self.wait()

    def _explained(self, error: Exception, step: int) -> Exception:
        if is_disk_full(error):
            return self._full(step, "No space left on device")
        if isinstance(error, OSError):
            return UserError(f"could not write to {self.folder}: {error}")
        return error

    def _full(self, step: int, detail: str) -> UserError:
        good = [s for s in self.steps() if s != step]
        last = f"That of step {good[-1]} is whole." if good else "There is none yet."
        return UserError(
            f"the disk is full: could not save the checkpoint of step {step} in {self.folder}"
            f" ({detail}). {last} Make room, then go on with --resume."
        )

    # --- reading ---

    def steps(self) -> list[int]:
        """Steps of the checkpoints on disk, ascending."""
        return steps_in(self.folder)

    def best_step(self) -> int | None:
        """The step whose evaluation was best among the checkpoints that are whole."""
        values = {step: self._value(step) for step in self.steps()}
        scored = [(value, step) for step, value in values.items() if value is not None]
        if not scored:
            return None
        return (min if self._mode == "min" else max)(scored, key=lambda pair: pair[0])[1]

    def _value(self, step: int) -> float | None:
        if step not in self._values:
            value = None
            with contextlib.suppress(UserError):  # a damaged one; restoring will say so
                value = (read_notes(self.folder / str(step))["metrics"] or {}).get(self._metric)
            scored = isinstance(value, int | float) and np.isfinite(value)
            self._values[step] = value if scored else None
        return self._values[step]

    def read(self, step: int, like: PyTree) -> Restored:
        """One checkpoint; ``like`` gives the tree's structure, shapes and types.

        Raises:
            OtherModelError: it is whole, but of another model; names the parameters.
            UserError: it is damaged; names the folder and the reason.
        """
        path = self.folder / str(step)
        notes = read_notes(path)
        if "shapes" in notes:
            _require_same_shapes(path, notes["shapes"], shapes_of(like))
        template = jax.tree.map(lambda x: np.empty(np.shape(x), np.asarray(x).dtype), like)
        try:
            with _without_wildcards(path) as plain, _orbax() as (orbax, args):
                state = orbax.restore(plain / "state", args=args.StandardRestore(template))
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            raise UserError(f"checkpoint {path}: {reason}") from error
        state = jax.tree.map(np.asarray, state)
        if checksum(state) != notes["checksum"]:
            raise UserError(f"checkpoint {path}: its arrays do not match their checksum")
        return Restored(step, state, notes, [])

    def read_latest(self, like: PyTree) -> Restored | None:
        """The newest checkpoint that is whole; None if the folder has none at all.

        Raises:
            OtherModelError: it is of another model.
            UserError: there are checkpoints, and all are damaged.
        """
        damaged: list[tuple[Path, str]] = []
        for step in reversed(self.steps()):
            try:
                restored = self.read(step, like)
            except OtherModelError:
                raise
            except UserError as error:
                damaged.append((self.folder / str(step), str(error)))
            else:
                return restored._replace(damaged=damaged)
        if damaged:
            raise UserError("no checkpoint can be read:\n  " + "\n  ".join(w for _, w in damaged))
        return None

    def set_aside(self, path: Path) -> Path:
        """Move a damaged checkpoint out of the way; nothing is deleted."""
        target = self.folder.parent / DAMAGED / path.name
        number = 1
        while target.exists():
            number += 1
            target = target.with_name(f"{path.name}.{number}")
        target.parent.mkdir(exist_ok=True)
        shutil.move(path, target)
        return target


def steps_in(folder: Path) -> list[int]:
    """Steps of the checkpoints in a folder, damaged ones too, ascending."""
    try:
        names = [path.name for path in folder.iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(int(name) for name in names if name.isascii() and name.isdigit())


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint's files; None if it is whole."""
    try:
        read_notes(path)
    except UserError as error:
        return str(error).removeprefix(f"checkpoint {path}: ")
    return None


def read_notes(path: Path) -> dict[str, Any]:
    """The notes of a checkpoint, once all its files are found to be as they were saved.

    Version 0.1.0 had no seal: there, what can be read is taken, and the arrays have a checksum.

    Raises:
        UserError: it is damaged; names the folder and the reason.
    """
    try:
        new = (path / NOTES).exists() or (path / SEAL).exists()
        if new and (wrong := _broken_seal(path)) is not None:
            raise ValueError(wrong)
        notes = json.loads((path / (NOTES if new else _OLD_NOTES)).read_bytes())
        if not isinstance(notes, dict) or not isinstance(notes.get("checksum"), str):
            raise ValueError("its notes are damaged")
        if not isinstance(notes.get("metrics", {}), dict | None):
            raise ValueError("its notes are damaged")
    except FileNotFoundError as error:
        raise UserError(f"checkpoint {path}: {Path(error.filename).name} is missing") from None
    except OSError as error:
        raise UserError(f"checkpoint {path}: cannot be read ({error.strerror})") from None
    except ValueError as error:  # JSON and UTF-8 as well
        reason = error if type(error) is ValueError else "its notes are damaged"
        raise UserError(f"checkpoint {path}: {reason}") from None
    return {"metrics": None} | notes


def newest_record(folder: Path) -> dict[str, Any] | None:
    """The record of the run that the newest whole checkpoint holds; None if none holds one."""
    for step in reversed(steps_in(folder)):
        with contextlib.suppress(UserError):
            record = read_notes(folder / str(step)).get("record")
            if record is not None:
                return record
    return None


def _seal(path: Path) -> str:
    """What the seal of the files below a folder must be, byte for byte."""
    digests = {}
    for folder, _, files in os.walk(path):
        for name in files:
            file = Path(folder) / name
            if file != path / SEAL:
                with file.open("rb") as content:
                    digest = hashlib.file_digest(content, "sha256").hexdigest()
                digests[file.relative_to(path).as_posix()] = digest
    return json.dumps(digests, sort_keys=True, indent=0)


def _broken_seal(path: Path) -> str | None:
    there, expected = _seal(path), (path / SEAL).read_text()
    if there == expected:
        return None
    try:
        found, sealed = json.loads(there), dict(json.loads(expected))
    except ValueError:
        return f"{SEAL} is damaged"
    for name in sorted(found.keys() | sealed.keys()):
        if name not in found:
            return f"{name} is missing"
        if name not in sealed:
            return f"{name} does not belong to it"
        if found[name] != sealed[name]:
            return f"{name} is damaged"
    return f"{SEAL} is damaged"


def shapes_of(tree: PyTree) -> dict[str, str]:
    """Type and shape of every array of a tree by its name, such as "params/w": "float32[4]"."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): (
            f"{np.asarray(leaf).dtype}[{','.join(map(str, np.shape(leaf)))}]"
        )
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _require_same_shapes(path: Path, saved: dict[str, str], asked: dict[str, str]) -> None:
    names = list(saved | asked)
    # The optimiser repeats the parameters' shapes: the parameters are what a reader knows.
    differing = [
        f"{name}: the checkpoint has {saved.get(name, 'none')}, asked for {asked.get(name, 'none')}"
        for name in sorted(names, key=lambda n: not n.startswith("params/"))
        if saved.get(name) != asked.get(name)
    ]
    if differing:
        more = len(differing) - 5
        raise OtherModelError(
            f"checkpoint {path} is of another model:\n  "
            + "\n  ".join(differing[:5])
            + (f"\n  and {more} more" if more > 0 else "")
        )


@contextlib.contextmanager
def _without_wildcards(path: Path) -> Iterator[Path]:
    """A name of a folder that means the same to those who take ``[1]`` for a pattern: orbax."""
    if not glob.has_magic(str(path)):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="msdspn-") as folder:
        link = Path(folder) / "checkpoint"
        link.symlink_to(path, target_is_directory=True)
        yield link


@contextlib.contextmanager
def _orbax() -> Iterator[tuple[Any, Any]]:
    """orbax's checkpointer, working in this process alone, and its kinds of arguments."""
    import orbax.checkpoint as ocp

    here = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=here, active_processes={here}, barrier_sync_key_prefix=f"process{here}"
    )
    handler = ocp.StandardCheckpointHandler(multiprocessing_options=alone)
    with ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
        yield checkpointer, ocp.args


def checksum(tree: PyTree) -> str:
    """CRC-32 over all arrays of a tree, in the order of its leaves, with shapes and types."""
    value = 0
    for leaf in jax.tree.leaves(tree):
        array = np.ascontiguousarray(leaf)
        value = zlib.crc32(f"{array.dtype}{np.shape(leaf)}".encode(), value)
        value = zlib.crc32(array.tobytes(), value)
    return f"{value:08x}"


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, is the disk being full (or over quota)."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        text = str(error)
        # Of memory the same word is used.
        exhausted = "RESOURCE_EXHAUSTED" in text and "Out of memory" not in text
        if "No space left on device" in text or exhausted:
            return True
        error = error.__cause__ or error.__context__
    return False
