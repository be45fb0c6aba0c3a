"""Checkpoints of a run: saved in the background, verified when read, best and latest kept."""

from __future__ import annotations

import contextlib
import errno
import json
import shutil
import zlib
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree

from msdspn_jax.errors import UserError


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


class Checkpoints:
    """The ``checkpoints/`` folder of a run, kept by orbax.

    Saves are asynchronous and atomic: a checkpoint is there whole or not at all. Every checkpoint
    carries a checksum of its arrays, so that a file damaged later is noticed when read.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep: int = 2,
        monitor: tuple[str, Literal["min", "max"]] = ("loss", "min"),
        read_only: bool = False,
    ):
        import orbax.checkpoint as ocp
        from orbax.checkpoint.checkpoint_managers import preservation_policy as policy

        _quiet()
        self.folder = folder.absolute()
        metric, mode = monitor
        self._ocp = ocp
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policy.AnyPreservationPolicy(
                [
                    policy.LatestN(keep),
                    policy.BestN(
                        n=1,
                        get_metric_fn=lambda metrics: metrics[metric],
                        reverse=mode == "min",
                        keep_checkpoints_without_metrics=False,
                    ),
                ]
            ),
            # Without it orbax would not write the metrics to disk.
            best_fn=lambda metrics: metrics[metric],
            best_mode=mode,
            cleanup_tmp_directories=not read_only,
            enable_async_checkpointing=not read_only,
            read_only=read_only,
            create=not read_only,
        )
        # orbax reads every checkpoint's small files at once and gives up at the first bad one.
        self.set_aside_at_opening: list[tuple[Path, str]] = []
        if jax.process_index() == 0:
            for path, reason in _unreadable(self.folder):
                reason = f"checkpoint {path}: {reason}"
                if read_only:
                    raise UserError(reason)
                self.set_aside_at_opening.append((self.set_aside(path), reason))
        self._manager = ocp.CheckpointManager(self.folder, options=options)
        self._mode = mode
        self._metric = metric

    # --- writing ---

    def save(
        self, state: PyTree, step: int, notes: dict[str, Any], metrics: dict[str, float] | None
    ) -> None:
        """Begin to save; returns when ``state`` (host arrays) may be changed again.

        ``metrics``: those of an evaluation at this very step; None if there was none.
        """
        if step in self._manager.all_steps():
            return
        size = sum(np.asarray(x).nbytes for x in jax.tree.leaves(state))
        free = shutil.disk_usage(self.folder).free
        if free < size + (1 << 16):
            raise self._full(step, f"{size:,} bytes wanted, {free:,} free")
        notes = notes | {"checksum": checksum(state), "metrics": metrics}
        try:
            self._manager.save(
                step,
                args=self._ocp.args.Composite(
                    state=self._ocp.args.StandardSave(state),
                    notes=self._ocp.args.JsonSave(notes),
                ),
                metrics=metrics,
            )
        except Exception as error:
            raise self._explained(error, step) from error

    def wait(self) -> None:
        """Wait until everything is on disk."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._explained(error, None) from error

    def settle(self) -> None:
        """Wait like `wait`, but let nothing that fails hide the error being reported."""
        with contextlib.suppress(Exception):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait, and let go of the folder."""
        self.wait()
        self._manager.close()

    def _explained(self, error: Exception, step: int | None) -> Exception:
        if is_disk_full(error):
            return self._full(step, "No space left on device")
        if isinstance(error, OSError):
            return UserError(f"could not write to {self.folder}: {error}")
        return error

    def _full(self, step: int | None, detail: str) -> UserError:
        good = [s for s in self.steps() if s != step]
        which = "a checkpoint" if step is None else f"the checkpoint of step {step}"
        last = f"That of step {good[-1]} is whole." if good else "There is none yet."
        return UserError(
            f"the disk is full: could not save {which} in {self.folder} ({detail}). {last}"
            " Make room, then go on with --resume."
        )

    # --- reading ---

    def steps(self) -> list[int]:
        """Steps of the checkpoints on disk, ascending."""
        return sorted(self._manager.all_steps(read=True))

    def best_step(self) -> int | None:
        """The step whose evaluation was best among the checkpoints kept."""
        scored = []
        for step in self.steps():
            try:
                metrics = self._notes(step)["metrics"]
            except Exception:  # a damaged one; restoring will say so
                continue
            if metrics and np.isfinite(metrics.get(self._metric, np.nan)):
                scored.append((metrics[self._metric], step))
        if not scored:
            return None
        return (min if self._mode == "min" else max)(scored, key=lambda pair: pair[0])[1]

    def _notes(self, step: int) -> dict[str, Any]:
        args = self._ocp.args
        return self._manager.restore(step, args=args.Composite(notes=args.JsonRestore()))["notes"]

    def read(self, step: int, like: PyTree) -> Restored:
        """One checkpoint; ``like`` gives the tree's structure, shapes and types.

        Raises:
            UserError: it is damaged or of another model; names the folder and the reason.
        """
        args = self._ocp.args
        template = jax.tree.map(lambda x: np.empty(np.shape(x), np.asarray(x).dtype), like)
        try:
            item = self._manager.restore(
                step,
                args=args.Composite(state=args.StandardRestore(template), notes=args.JsonRestore()),
            )
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            raise UserError(f"checkpoint {self.folder / str(step)}: {reason}") from error
        state, notes = item["state"], item["notes"]
        state = jax.tree.map(np.asarray, state)
        if checksum(state) != notes["checksum"]:
            raise UserError(
                f"checkpoint {self.folder / str(step)}: its arrays do not match their checksum"
            )
        return Restored(step, state, notes, [])

    def read_latest(self, like: PyTree) -> Restored | None:
        """The newest checkpoint that is whole; None if the folder has none at all.

        Raises:
            UserError: there are checkpoints, and all are damaged.
        """
        damaged: list[tuple[Path, str]] = []
        for step in reversed(self.steps()):
            try:
                restored = self.read(step, like)
            except UserError as error:
                damaged.append((self.folder / str(step), str(error)))
            else:
                return restored._replace(damaged=damaged)
        if damaged:
            raise UserError("no checkpoint can be read:\n  " + "\n  ".join(w for _, w in damaged))
        return None

    def set_aside(self, path: Path) -> Path:
        """Move a damaged checkpoint out of orbax's way; nothing is deleted."""
        target = self.folder.parent / "damaged_checkpoints" / path.name
        number = 1
        while target.exists():
            number += 1
            target = target.with_name(f"{path.name}.{number}")
        target.parent.mkdir(exist_ok=True)
        shutil.move(path, target)
        return target

    def reload(self) -> None:
        """Look at the folder again, after `set_aside`."""
        self._manager.reload()


def _unreadable(folder: Path) -> list[tuple[Path, str]]:
    """Checkpoints whose small JSON files are damaged, and how."""
    found = []
    for path in sorted(folder.glob("[0-9]*")):
        if not path.name.isdigit():
            # What an interrupted save left behind: never a checkpoint.
            continue
        for file in (path / "_CHECKPOINT_METADATA", path / "metrics" / "metrics"):
            try:
                json.loads(file.read_text())
            except FileNotFoundError:
                if file.name != "metrics":
                    found.append((path, f"{file.name} is missing"))
                    break
            except (OSError, ValueError):
                found.append((path, f"{file.name} is damaged"))
                break
    return found


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
        if "No space left on device" in str(error) or "RESOURCE_EXHAUSTED" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _quiet() -> None:
    # orbax tells each save in a dozen log lines.
    import logging

    logging.getLogger("absl").setLevel(logging.ERROR)
