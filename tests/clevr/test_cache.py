import concurrent.futures
import errno
import os
import threading

import numpy as np
import pytest
from clevr_archive import assert_same_record, assert_same_tree

from msdspn_jax import cli
from msdspn_jax.clevr import cache
from msdspn_jax.clevr.cache import cache_folder, load_cache, prepare_cache
from msdspn_jax.clevr.files import ClevrFolder, pipeline, resize_image
from msdspn_jax.errors import UserError


class Counted:
    """A source that counts what is read of it, and can be made to stop."""

    def __init__(self, source, stop_at=None, error=KeyboardInterrupt):
        self.source, self.stop_at, self.error, self.read = source, stop_at, error, []
        self.fingerprint = source.fingerprint

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        if index == self.stop_at:
            raise self.error
        self.read.append(index)
        return self.source[index]


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(cache, "_CHUNK", 2)


def test_cache_holds_the_resized_records(archive, tmp_path, small_chunks):
    source = ClevrFolder(archive, "train")
    reports = []
    folder = prepare_cache(
        source, tmp_path / "c", size=16, on_progress=lambda *report: reports.append(report)
    )
    assert reports == [(i, 5) for i in range(6)]
    cache = load_cache(folder, verify=True)
    assert isinstance(cache.images, np.memmap)
    assert cache.images.shape == (5, 16, 16, 3)
    for i, record in enumerate(source):
        expected = {**record, "image": resize_image(record["image"], 16)}
        assert_same_record(cache[i], expected)
    assert sorted(path.name for path in folder.iterdir()) == [
        "images.npy",
        "manifest.json",
        "objects.npy",
    ]
    batch = next(iter(pipeline(cache, size=16, batch_size=5, seed=3)))
    same = next(iter(pipeline(source, size=16, batch_size=5, seed=3)))
    assert_same_tree(dict(batch), dict(same))

    again = Counted(source)
    prepare_cache(again, folder, size=16)
    assert again.read == [], "a finished cache is left as it is"


def test_of_two_jobs_one_prepares_and_the_other_waits(archive, tmp_path, small_chunks):
    source, begun, go_on = ClevrFolder(archive, "train"), threading.Event(), threading.Event()

    class Slow(Counted):
        def __getitem__(self, index):
            begun.set()
            assert go_on.wait(60)
            return super().__getitem__(index)

    first, second = Slow(source), Counted(source)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        jobs = [pool.submit(prepare_cache, first, tmp_path, size=8)]
        assert begun.wait(60)
        jobs.append(pool.submit(prepare_cache, second, tmp_path, size=8))
        assert concurrent.futures.wait(jobs[1:], timeout=0.3).not_done
        go_on.set()
        assert [job.result(60) for job in jobs] == [tmp_path, tmp_path]
    load_cache(tmp_path, verify=True)
    assert (sorted(first.read), second.read) == ([0, 1, 2, 3, 4], [])


@pytest.mark.parametrize("stop_at", range(5))
def test_cache_goes_on_where_it_was_interrupted(archive, tmp_path, small_chunks, stop_at):
    source = ClevrFolder(archive, "train")
    whole = prepare_cache(source, tmp_path / "whole", size=8)
    folder = tmp_path / "c"
    with pytest.raises(KeyboardInterrupt):
        prepare_cache(Counted(source, stop_at), folder, size=8, threads=1)
    with pytest.raises(UserError, match="no finished cache here"):
        load_cache(folder)
    resumed = Counted(source)
    prepare_cache(resumed, folder, size=8, threads=1)
    assert resumed.read == list(range(stop_at // 2 * 2, 5)), "finished chunks are kept"
    load_cache(folder, verify=True)
    for name in ("images.npy", "objects.npy", "manifest.json"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes()


def test_cache_interrupted_at_its_last_step_is_finished(archive, tmp_path, small_chunks):
    source = ClevrFolder(archive, "train")
    folder = prepare_cache(source, tmp_path / "c", size=8)
    (folder / "manifest.json").rename(folder / "unfinished.json")
    (folder / "objects.npy").rename(folder / "objects.partial.npy")
    resumed = Counted(source)
    prepare_cache(resumed, folder, size=8)
    assert resumed.read == []
    load_cache(folder, verify=True)


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "journal"])
def test_what_was_damaged_while_unfinished_is_done_again(archive, tmp_path, small_chunks, damage):
    source = ClevrFolder(archive, "train")
    folder = tmp_path / "c"
    with pytest.raises(KeyboardInterrupt):
        prepare_cache(Counted(source, 4), folder, size=8, threads=1)
    path = folder / "images.partial.npy"
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[128 + 3 * 8 * 8 * 3] ^= 1  # in record 3, of the second chunk
        path.write_bytes(data)
    elif damage == "cut":
        path.write_bytes(data[:200])
    elif damage == "remove":
        path.unlink()
    else:
        (folder / "unfinished.json").write_text("{")
    resumed = Counted(source)
    prepare_cache(resumed, folder, size=8, threads=1)
    assert resumed.read == ([2, 3, 4] if damage == "flip" else [0, 1, 2, 3, 4])
    cache = load_cache(folder, verify=True)
    assert_same_record(cache[3], {**source[3], "image": resize_image(source[3]["image"], 8)})


def test_damaged_caches_are_named(archive, tmp_path, small_chunks):
    source = ClevrFolder(archive, "train")
    folder = prepare_cache(source, tmp_path / "c", size=8)
    other = ClevrFolder(archive, "val")
    with pytest.raises(UserError, match="holds the cache of other data"):
        prepare_cache(other, folder, size=8)
    with pytest.raises(UserError, match="holds the cache of other data"):
        prepare_cache(source, folder, size=16)

    images = (folder / "images.npy").read_bytes()
    flipped = bytearray(images)
    flipped[-1] ^= 1
    (folder / "images.npy").write_bytes(flipped)
    with pytest.raises(UserError, match=r"images.npy: wrong checksum in records 4 to 5"):
        load_cache(folder, verify=True)
    (folder / "images.npy").write_bytes(images[:-1])
    with pytest.raises(UserError, match=r"images.npy: damaged or missing"):
        load_cache(folder)
    np.save(folder / "images.npy", np.zeros((5, 8, 8, 4), np.uint8))
    with pytest.raises(UserError, match=r"images.npy: expected uint8 \(5, 8, 8, 3\), got"):
        load_cache(folder)
    manifest = folder / "manifest.json"
    text = manifest.read_text()
    for changed in (text[:-5], "[]", text.replace('"num": 5', '"num": 6')):
        manifest.write_text(changed)
        with pytest.raises(UserError, match=r"manifest.json: damaged"):
            load_cache(folder)
    manifest.write_text(text.replace('"format": 1', '"format": 2'))
    with pytest.raises(UserError, match="format 2, expected 1"):
        load_cache(folder)


def test_a_full_disk_is_an_error_that_can_be_mended(archive, tmp_path, small_chunks, monkeypatch):
    source = ClevrFolder(archive, "train")

    def full(fd):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(cache.os, "fsync", full)
        with pytest.raises(UserError, match="can be written, got No space left"):
            prepare_cache(source, tmp_path / "c", size=8)
    load_cache(prepare_cache(source, tmp_path / "c", size=8), verify=True)


def test_command_prepares_both_kinds(archive, tfds_folder, tmp_path, capsys):
    for kind, source in (("folder", archive.parent), ("tfds", tfds_folder)):
        out = tmp_path / kind
        command = ["data", "clevr", "--source", str(source), "--out", str(out), "--size", "8"]
        assert cli.main([*command, "--verify"]) == 0
        said = capsys.readouterr().out
        assert "clevr-train-8: 5 images of 8 x 8, checksums right" in said
        assert "clevr-val-8: 4 images" in said
    by_name = []
    for kind in ("folder", "tfds"):
        cache = load_cache(cache_folder(tmp_path / kind, "train", 8))
        by_name.append({record["file_name"]: record for record in cache})
    for name, record in by_name[0].items():
        assert_same_record(record, by_name[1][name])


@pytest.mark.parametrize(
    ("key", "change", "words"),
    [
        ("image", np.float32, "source: expected images of shape .* and uint8, got .* float32"),
        ("objects", np.int32, "source: expected objects of shape .* and float32, got .* int32"),
    ],
)
def test_a_source_of_another_dtype_is_refused(key, change, words):
    array = np.zeros({"image": (8, 8, 3), "objects": (10, 19)}[key], change)
    with pytest.raises(UserError, match=words):
        cache._as_kept({"image": "images"}.get(key, key), [array], {"num": 1, "size": 8})


def test_objects_of_wider_floats_are_kept_in_32_bits():
    kept = cache._as_kept("objects", [np.full((10, 19), 0.5)], {"num": 1, "size": 8})
    assert kept.dtype == np.float32
    assert (kept == 0.5).all()
