"""``msdspn data``: prepare and check data sets."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from msdspn_jax._options import parse_one_of
from msdspn_jax._progress import ProgressBar
from msdspn_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class PrepareClevr:
    """Resize real CLEVR once, into a cache that training reads (3.4 GB at 128, for train).

    May be interrupted at any moment and run again: it goes on where it stopped.
    """

    source: Path
    """An extracted CLEVR_v1.0 folder, one of `msdspn render`, or a TensorFlow Datasets folder."""
    out: Path
    """Where the cache goes: one folder clevr-SPLIT-SIZE for each split."""
    size: int = 128
    """Side of the square images, pixels."""
    splits: tuple[str, ...] = ("train", "val")
    """Which splits to prepare; the test split has no scenes."""
    threads: int = 4
    """How many threads read, decode and resize."""
    verify: bool = False
    """Afterwards read the whole cache back and compare its checksums."""

    def run(self) -> None:
        """Prepare every split."""
        from msdspn_jax.clevr.cache import cache_folder, load_cache, prepare_cache
        from msdspn_jax.clevr.tfds import open_source

        for name in ("size", "threads"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name}: expected at least 1, got {getattr(self, name)}")
        for split in self.splits:
            folder = cache_folder(self.out, split, self.size)
            with ProgressBar(f"clevr {split}") as on_progress:
                source = open_source(self.source, split)
                prepare_cache(
                    source, folder, size=self.size, threads=self.threads, on_progress=on_progress
                )
            cache = load_cache(folder, verify=self.verify)
            checked = ", checksums right" if self.verify else ""
            print(f"{folder}: {len(cache)} images of {self.size} x {self.size}{checked}")


@dataclasses.dataclass(frozen=True)
class ConvertClevr:
    """Turn an extracted CLEVR_v1.0 folder into TensorFlow Datasets files, without TensorFlow.

    What comes out is what tfds.builder("clevr") prepares, as array_record.
    """

    source: Path
    """An extracted CLEVR_v1.0 folder."""
    out: Path
    """The data folder of TensorFlow Datasets; the files go to OUT/clevr/3.1.0."""

    def run(self) -> None:
        """Convert all splits that are there."""
        from msdspn_jax.clevr.tfds import convert_to_tfds

        print(convert_to_tfds(self.source, self.out))


_Choice = (
    Annotated[PrepareClevr, tyro.conf.subcommand("clevr")]
    | Annotated[ConvertClevr, tyro.conf.subcommand("clevr-tfds")]
)


def main(argv: list[str]) -> int:
    """Run the verb; returns the exit code."""
    text = "Prepare and check data sets."
    parse_one_of(_Choice, argv, prog="msdspn data", description=text).run()
    return 0
