"""CLEVR as TensorFlow Datasets' array_record files, read and prepared without TensorFlow."""

import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from msdspn_jax.clevr.files import (
    MAX_IMAGE_BYTES,
    SPLITS,
    ClevrFolder,
    Record,
    checked_index,
    clevr_root,
    decode_image,
    digest,
    import_extra,
    read_bytes,
    read_scenes,
)
from msdspn_jax.clevr.objects import ATTRIBUTES, MAX_OBJECTS, ClevrScene, encode_features
from msdspn_jax.errors import UserError


class ClevrTfds:
    """One split of ``tfds.builder("clevr")``, prepared as array_record; no TensorFlow is needed.

    Args:
        data_dir: where TensorFlow Datasets keeps its data (it holds ``clevr/3.1.0``).
        split: ``"train"``, ``"val"`` or ``"test"``, or any split expression of TFDS.
    """

    def __init__(self, data_dir: str | Path, split: str):
        tfds = import_extra("tensorflow_datasets")
        self.data_dir, self.split = Path(data_dir), split
        split = {"val": "validation"}.get(split, split)
        try:
            builder: Any = tfds.builder("clevr", data_dir=data_dir, try_gcs=False)
            decoders = {"image": tfds.decode.SkipDecoding()}
            self._records = builder.as_data_source(split=split, decoders=decoders)
        except Exception as error:  # TFDS raises many types for data that is not there.
            raise UserError(
                f"{self.data_dir}: no array_record data of clevr, split {split!r} ({error}). "
                "Prepare it with `msdspn data clevr-tfds`"
            ) from error
        features = builder.info.features["objects"]
        # TFDS numbers colors and shapes in its own order.
        self._to_ours = {
            name: np.array([values.index(value) for value in features.feature[name].names])
            for name, values in ATTRIBUTES.items()
        }
        files = sorted(Path(builder.data_dir).glob(f"*-{split}.*"))
        # Their places, sizes and times: two data sets may have as many records.
        shards = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
        number = builder.info.splits[split].num_examples
        self._identity = json.dumps([builder.info.full_name, number, shards])

    @property
    def fingerprint(self) -> str:
        """Of version, split, and place, size and time of every file of records."""
        return digest(self._identity.encode(), self.split.encode())

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: Any) -> Record:
        """Read and decode one record."""
        index = checked_index(index, len(self))
        where = f"{self.data_dir}: clevr/{self.split} record {index}"
        try:
            record = self._records[index]
        except Exception as error:  # array_record and protobuf raise many types for damaged files.
            raise UserError(f"{where}: cannot be read ({error})") from error
        objects = record["objects"]
        file_name = record["file_name"].decode()
        position = np.asarray(objects["3d_coords"], np.float64).reshape(-1, 3)
        number = len(position)
        if number > MAX_OBJECTS:
            raise UserError(f"{where}: expected at most {MAX_OBJECTS} objects, got {number}")
        indices = {
            name: table[np.asarray(objects[name], np.int64)]
            for name, table in self._to_ours.items()
        }
        features = encode_features(position, **indices, present=np.ones(number, bool))
        return {
            "image": decode_image(record["image"], f"{where} ({file_name})"),
            "objects": np.pad(np.asarray(features), ((0, MAX_OBJECTS - number), (0, 0))),
            "file_name": file_name,
        }

    def __repr__(self) -> str:
        return f"ClevrTfds({str(self.data_dir)!r}, {self.split!r})"


def open_source(path: str | Path, split: str) -> ClevrFolder | ClevrTfds:
    """Whichever of the two kinds of source is at ``path``.

    Raises:
        UserError: neither is there.
    """
    if (clevr_root(path) / "images").is_dir():
        return ClevrFolder(path, split)
    if (Path(path) / "clevr").is_dir():
        return ClevrTfds(path, split)
    raise UserError(
        f"{path}: expected an extracted CLEVR_v1.0 folder (with images/ and scenes/) or a "
        "TensorFlow Datasets folder (with clevr/)"
    )


def convert_to_tfds(root: str | Path, data_dir: str | Path) -> Path:
    """Prepare ``tfds.builder("clevr")``'s array_record files from an extracted folder.

    The same records as the stock builder writes, without TensorFlow and without the download: read
    them with `ClevrTfds`, or with the stock ``tfds.data_source("clevr", data_dir=data_dir)``. All
    of the published splits whose images are there are converted.

    Returns:
        The folder of the prepared data.

    Raises:
        UserError: a file is missing or damaged; nothing is left behind then.
    """
    root = clevr_root(root)
    splits = [split for split in SPLITS if (root / "images" / split).is_dir()]
    if not splits:
        raise UserError(f"{root}: expected images/train, images/val or images/test")
    builder = _tfds_builder(root, splits, data_dir)
    try:
        builder.download_and_prepare(file_format="array_record")
    except Exception as error:
        # TFDS wraps what the generator raises; the message underneath is the one to show.
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, UserError):
            cause = cause.__cause__
        raise (error if cause is None else cause) from error
    return Path(builder.data_dir)


def _tfds_builder(root: Path, splits: Sequence[str], data_dir: str | Path) -> Any:
    registered = import_extra("tensorflow_datasets.core.registered")
    stock = import_extra("tensorflow_datasets.datasets.clevr.clevr_dataset_builder")

    # Stock features under the stock name: what reads the one reads the other. Not registered, so
    # that `tfds.builder("clevr")` still means the stock class.
    with registered.skip_registration():

        class Builder(stock.Builder):
            name = "clevr"
            # Where to look for checksums of downloads, of which there are none. Finding the place
            # would need importlib_resources, which TFDS 4.9 does not ask for.
            code_path = None

            def _split_generators(self, dl_manager) -> Any:
                return {{"val": "validation"}.get(s, s): _examples(root, s) for s in splits}

    return Builder(data_dir=data_dir)


def _examples(root: Path, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
    source = ClevrFolder(root, split)
    scenes: Sequence[ClevrScene | None] = [None] * len(source)
    if source.scenes_file.exists():
        scenes = read_scenes(source.scenes_file, keep_extra=False)
    questions = _read_questions(root / "questions" / f"CLEVR_{split}_questions.json")
    for i, (name, scene) in enumerate(zip(source.file_names, scenes, strict=True)):
        path = source.image_folder / name
        data = read_bytes(path, source.entry(i), limit=MAX_IMAGE_BYTES)
        decode_image(data, f"{path}{source.entry(i)}")
        objects = []
        for j, o in enumerate(scene.objects if scene else ()):
            if o.rotation is None or o.pixel_coords is None:
                raise UserError(
                    f"{source.scenes_file}: scenes[{i}].objects[{j}]: TensorFlow Datasets needs "
                    "rotation and pixel_coords, and one is missing"
                )
            attributes = {attribute: getattr(o, attribute) for attribute in ATTRIBUTES}
            numbers = {"rotation": o.rotation, "pixel_coords": o.pixel_coords}
            objects.append({**attributes, **numbers, "3d_coords": o.position})
        yield (
            name,
            {
                "image": io.BytesIO(data),
                "file_name": name,
                "question_answer": questions.get(name, []),
                "objects": objects,
            },
        )


def _read_questions(path: Path) -> dict[str, list[dict[str, str]]]:
    if not path.exists():
        return {}
    questions: dict[str, list[dict[str, str]]] = {}
    where = str(path)
    try:
        for i, entry in enumerate(json.loads(read_bytes(path))["questions"]):
            where = f"{path}: questions[{i}]"
            answer = {"question": entry["question"], "answer": entry.get("answer", "")}
            questions.setdefault(entry["image_filename"], []).append(answer)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a readable JSON file ({error})") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{where}: expected question and image_filename ({error!r})") from error
    return questions
