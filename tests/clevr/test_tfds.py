import importlib.resources
import importlib.util
import os
import shutil
import sys
import types

import numpy as np
import pytest
from clevr_archive import NUMBERS, assert_same_record, assert_same_tree, make_archive

from msdspn_jax import cli
from msdspn_jax.clevr.files import ClevrFolder
from msdspn_jax.clevr.tfds import ClevrTfds, convert_to_tfds, open_source
from msdspn_jax.errors import UserError


@pytest.mark.parametrize("split", NUMBERS)
def test_tfds_gives_the_records_of_the_folder(archive, tfds_folder, split):
    folder = ClevrFolder(archive, split)
    source = open_source(tfds_folder, split)
    assert isinstance(source, ClevrTfds)
    records = {record["file_name"]: record for record in source}
    assert len(records) == len(source) == NUMBERS[split]
    for record in folder:
        assert_same_record(records[record["file_name"]], record)
    assert "tensorflow" not in sys.modules or HAS_TENSORFLOW


def raw_records(folder, split):
    """Everything that the stock data source gives, images undecoded."""
    import tensorflow_datasets as tfds

    builder = tfds.builder("clevr", data_dir=folder, try_gcs=False)
    source = builder.as_data_source(split=split, decoders={"image": tfds.decode.SkipDecoding()})
    return {record["file_name"]: record for record in source}


def prepare_stock(archive, folder, monkeypatch):
    """The stock builder, its download replaced by the archive."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.datasets.clevr import clevr_dataset_builder as stock

    monkeypatch.setattr(
        tfds.download.DownloadManager,
        "download_and_extract",
        lambda self, url: os.fspath(archive.parent),
    )
    # TFDS 4.9 imports this back-port, which it does not ask for.
    monkeypatch.setitem(sys.modules, "importlib_resources", importlib.resources)
    stock.Builder(data_dir=folder).download_and_prepare(file_format="array_record")


def assert_ours_is_stock(archive, tfds_folder, folder, monkeypatch):
    prepare_stock(archive, folder, monkeypatch)
    for split in ("train", "validation", "test"):
        ours, theirs = raw_records(tfds_folder, split), raw_records(folder, split)
        assert len(theirs) == len(ours) > 1
        assert_same_tree(ours, theirs)


HAS_TENSORFLOW = importlib.util.find_spec("tensorflow") is not None


def stand_in_for_tensorflow(monkeypatch):
    """The two functions of it that the stock builder calls."""
    from tensorflow_datasets.datasets.clevr import clevr_dataset_builder as stock

    gfile = types.SimpleNamespace(listdir=os.listdir, exists=os.path.exists)
    monkeypatch.setattr(stock, "tf", types.SimpleNamespace(io=types.SimpleNamespace(gfile=gfile)))


def test_ours_writes_what_the_stock_code_writes(archive, tfds_folder, tmp_path, monkeypatch):
    stand_in_for_tensorflow(monkeypatch)
    assert_ours_is_stock(archive, tfds_folder, tmp_path, monkeypatch)


@pytest.mark.slow
def test_rendered_archives_go_through_both_builders(tmp_path, monkeypatch):
    archive = tmp_path / "archive" / "CLEVR_v1.0"
    (archive / "questions").mkdir(parents=True)
    for seed, split in enumerate(NUMBERS):
        options = ["--split", split, "--seed", str(seed), "--num", "2", "--size", "48"]
        assert cli.main(["render", "--out", str(archive), "--quality", "fast", *options]) == 0
        (archive / f"questions/CLEVR_{split}_questions.json").write_text('{"questions": []}')
    if not HAS_TENSORFLOW:
        stand_in_for_tensorflow(monkeypatch)
    convert_to_tfds(archive, tmp_path / "ours")
    assert_ours_is_stock(archive, tmp_path / "ours", tmp_path / "stock", monkeypatch)
    for split in NUMBERS:
        records = {r["file_name"]: r for r in ClevrTfds(tmp_path / "stock", split)}
        for record in ClevrFolder(archive, split):
            assert_same_record(records[record["file_name"]], record)
            assert record["image"].std() > 5


@pytest.mark.skipif(not HAS_TENSORFLOW, reason="the stock builder prepares with TensorFlow")
def test_ours_writes_what_the_stock_builder_writes(archive, tfds_folder, tmp_path, monkeypatch):
    assert_ours_is_stock(archive, tfds_folder, tmp_path, monkeypatch)


def test_a_damaged_archive_is_not_converted(tmp_path):
    archive = make_archive(tmp_path / "archive", {"val": 2})
    path = archive / "images/val/CLEVR_val_000001.png"
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(UserError, match=r"CLEVR_val_000001.png \(scenes\[1\] of .*\): damaged PNG"):
        convert_to_tfds(archive, tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.array_record*"))
    with pytest.raises(UserError, match="no array_record data of clevr"):
        ClevrTfds(tmp_path / "out", "val")


def test_damaged_record_files_do_not_pass_silently(archive, tfds_folder, tmp_path):
    folder = tmp_path / "tfds"
    shutil.copytree(tfds_folder, folder)
    (path,) = folder.rglob("clevr-train.array_record*")
    original, rng = path.read_bytes(), np.random.default_rng(0)
    expected = {r["file_name"]: r for r in ClevrFolder(archive, "train")}
    errors = 0
    for _ in range(20):
        damaged = bytearray(original)
        damaged[rng.integers(len(damaged))] ^= 0x55
        path.write_bytes(damaged)
        try:
            records = list(ClevrTfds(folder, "train"))
        except UserError:
            errors += 1
        else:
            for record in records:
                assert_same_record(record, expected[record["file_name"]])
    assert errors > 0, "nothing was damaged"


def test_command_converts(archive, tmp_path, capsys):
    out = tmp_path / "tfds"
    assert cli.main(["data", "clevr-tfds", "--source", str(archive), "--out", str(out)]) == 0
    assert len(ClevrTfds(out, "val")) == NUMBERS["val"]


def test_command_names_what_is_missing(tmp_path, capsys):
    arguments = ["--source", str(tmp_path), "--out", str(tmp_path / "out")]
    assert cli.main(["data", "clevr", *arguments]) == 2
    assert f"{tmp_path}: expected an extracted CLEVR_v1.0 folder" in capsys.readouterr().err
    assert cli.main(["data", "clevr-tfds", *arguments]) == 2
    assert "expected images/train, images/val or images/test" in capsys.readouterr().err
    assert cli.main(["data", "clevr", *arguments, "--size", "0"]) == 2
    assert "--size: expected at least 1" in capsys.readouterr().err
