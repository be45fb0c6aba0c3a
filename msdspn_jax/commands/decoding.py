"""Flags that `msdspn predict` and `msdspn export` share: which model, and how it decodes."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Annotated

import tyro

from msdspn_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoding:
    """How a trained model decodes; the verbs say in their own words what else they take."""

    threshold: float | None = None
    """Score above which an element is an object, 0 to 1. Default: the model's own; 0.5 where it was
    not calibrated."""
    inner_steps: Annotated[int | None, tyro.conf.arg(name="inner.num-steps")] = None
    """Inner steps, also more than in training. Default: those the model is evaluated with."""
    num_starts: Annotated[int | None, tyro.conf.arg(name="inner.num-starts")] = None
    """Initial sets to descend from, of which the lowest energy counts: better, and as many times
    the cost. Default: as the model is evaluated."""
    seed: int = 0
    """Of random initial sets and slots, where the model has them: the same for every input."""

    def check(self, *, program: Path | None = None, batch_size: int = 1) -> None:
        """Refuse values out of range, and with a program those that it has inside.

        Raises:
            UserError: names the flag.
        """
        counts = {"--inner.num-steps": self.inner_steps, "--inner.num-starts": self.num_starts}
        for flag, value in (counts | {"--batch-size": batch_size}).items():
            if value is not None and value < 1:
                raise UserError(f"{flag}: expected at least 1, got {value}")
        if program is not None:
            for flag, value in (counts | {"--seed": self.seed or None}).items():
                if value is not None:
                    raise UserError(f"{flag}: fixed in a program when it was exported")
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise UserError(f"--threshold: expected a number from 0 to 1, got {self.threshold}")


#: A field of this type: flags without a prefix.
DecodingFlags = Annotated[Decoding, tyro.conf.OmitArgPrefixes]


def check_new(path: Path, *, overwrite: bool) -> None:
    """Refuse to replace a file unless it is asked for.

    Raises:
        UserError: it exists.
    """
    # os.path says of names that no file can have that they do not exist; pathlib raises.
    if os.path.exists(path) and not overwrite:
        raise UserError(f"{path} exists; give --overwrite to replace it")
