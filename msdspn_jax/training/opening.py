"""Opening a run folder: what must be so before a run may write there, in every process alike."""

from __future__ import annotations

from pathlib import Path

import jax

from msdspn_jax.errors import UserError
from msdspn_jax.training import run_folder
from msdspn_jax.training.config import TrainConfig
from msdspn_jax.training.lock import Lock
from msdspn_jax.training.parallel import agree
from msdspn_jax.training.task import Task


def must_write_record(folder: Path, task: Task, config: TrainConfig) -> bool:
    """Check that a run may be begun or gone on with; whether its config.json must change.

    Raises:
        UserError: another run is there, or one with other settings.
    """
    if not run_folder.is_run(folder):
        if config.run.resume is True:
            run_folder.require_run(folder)
        return True
    if not config.run.resume:
        raise UserError(
            f"{folder} holds a run already; go on with it by --resume, or choose another --run-dir"
        )
    name = run_folder.read_record(folder)["task"]
    if name != task.name:
        raise UserError(f"{folder} is a run of {name}, not of {task.name}")
    saved = run_folder.read_config(folder, type(config))
    difference = run_folder.config_difference(saved, config)
    fixed = [f"--{name.replace('_', '-')}" for name in config.fixed]
    if lines := [line for line in difference if line.split(":")[0] in fixed]:
        raise UserError(
            f"what {folder} has learned rests on these flags, which cannot change:\n  "
            + "\n  ".join(lines)
            + "\nBegin another run; --init-from takes the weights of this one along."
        )
    if difference and not config.run.allow_config_change:
        raise UserError(
            f"the flags differ from those {folder} was begun with:\n  "
            + "\n  ".join(difference)
            + "\nUse the same flags, or --allow-config-change to go on with these."
        )
    changed = saved.numerical() != config.numerical()
    return changed or not (folder / "config.json").exists()


def take(folder: Path) -> Lock | None:
    """The right to write in the folder, which process 0 takes for all.

    Raises:
        UserError: another writer has it, or the folder cannot be written.
    """
    barrier("looked at the run folder")
    lock, refusal = None, None
    if jax.process_index() == 0:
        try:
            lock = Lock(folder)
        except UserError as error:
            refusal = error
        except OSError as error:
            refusal = cannot_write(folder, error)
    refused, _ = agree(int(refusal is not None), 0)
    if refused:
        raise refusal or UserError(f"process 0 cannot write to the run folder {folder}")
    return lock


def cannot_write(folder: Path, error: OSError) -> UserError:
    """What to tell the user of a folder that refuses."""
    return UserError(
        f"cannot write to the run folder {folder}: {error.strerror or error}."
        " Choose another with --run-dir."
    )


def barrier(name: str) -> None:
    """Wait until every process has come here."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)
