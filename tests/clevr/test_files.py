import errno
import importlib.resources
import importlib.resources.abc
import io
import itertools
import json
import os
import shutil
import sys
import types

import numpy as np
import pytest
from PIL import Image, ImageDraw

from msdspn_jax import cli
from msdspn_jax.clevr import cache as clevr_cache
from msdspn_jax.clevr import files as clevr_files
from msdspn_jax.clevr import objects as clevr
from msdspn_jax.clevr import tfds as clevr_tfds
from msdspn_jax.errors import UserError

NUMBERS = {"train": 5, "val": 4, "test": 2}
WIDTH, HEIGHT = 48, 32


def draw(objects, rng, mode):
    """A picture with a disc where each object is, and grain, so that no two are alike."""
    image = Image.fromarray(rng.integers(90, 140, (HEIGHT, WIDTH, 3), np.uint8))
    pen = ImageDraw.Draw(image)
    camera = clevr.look_at_origin()
    for o in objects:
        x, y = clevr.project(camera, np.array(o["3d_coords"]), WIDTH, HEIGHT)
        radius = 5 if o["size"] == "large" else 3
        color = clevr.COLOR_RGB[clevr.COLORS.index(o["color"])]
        pen.ellipse([x - radius, y - radius, x + radius, y + radius], fill=color)
    return image.convert(mode)


def random_object(rng):
    names = {name: str(rng.choice(values)) for name, values in clevr.ATTRIBUTES.items()}
    height = clevr.SIZE_RADIUS[clevr.SIZES.index(names["size"])]
    position = np.float32([*rng.uniform(-3, 3, 2), height]).tolist()
    pixels = clevr.project(clevr.look_at_origin(), np.array(position), 480, 320).round().tolist()
    return {
        **names,
        "3d_coords": position,
        "rotation": float(rng.uniform(0, 360)),
        "pixel_coords": [*pixels, float(rng.uniform(8, 14))],
    }


def make_archive(folder, numbers=NUMBERS):
    """CLEVR_v1.0 as it is published, tiny."""
    root = folder / "CLEVR_v1.0"
    rng = np.random.default_rng(0)
    for sub in ("scenes", "questions", *(f"images/{split}" for split in numbers)):
        (root / sub).mkdir(parents=True)
    for split, number in numbers.items():
        scenes, questions = [], []
        for index in range(number):
            name = f"CLEVR_{split}_{index:06d}.png"
            objects = [random_object(rng) for _ in range(rng.integers(3, 11))]
            # Published images have an alpha channel; ours need not.
            mode = "RGBA" if split == "train" else "RGB"
            draw(objects, rng, mode).save(root / "images" / split / name)
            scenes.append(
                {
                    "split": split,
                    "image_index": index,
                    "image_filename": name,
                    "objects": objects,
                    "directions": {"right": [0.65, 0.75, 0.0]},
                }
            )
            answer = {} if split == "test" else {"answer": "yes"}
            questions += [
                {"image_filename": name, "question": f"Are there {k} things?", **answer}
                for k in range(2)
            ]
        if split != "test":
            path = root / "scenes" / f"CLEVR_{split}_scenes.json"
            path.write_text(json.dumps({"info": {"split": split}, "scenes": scenes}))
        path = root / "questions" / f"CLEVR_{split}_questions.json"
        path.write_text(json.dumps({"info": {}, "questions": questions}))
    return root


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    return make_archive(tmp_path_factory.mktemp("archive"))


@pytest.fixture(scope="module")
def tfds_folder(archive, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    clevr_tfds.convert_to_tfds(archive, folder)
    return folder


def assert_same_record(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert ours["file_name"] == theirs["file_name"]
    for name in ("image", "objects"):
        assert ours[name].dtype == theirs[name].dtype
        np.testing.assert_array_equal(ours[name], theirs[name])


# Folder -----------------------------------------------------------------------------------------


def test_folder_reads_images_and_objects(archive):
    source = clevr_files.ClevrFolder(archive.parent, "train")
    assert len(source) == NUMBERS["train"]
    scenes = json.loads((archive / "scenes" / "CLEVR_train_scenes.json").read_text())["scenes"]
    for record, scene in zip(source, scenes, strict=True):
        assert record["file_name"] == scene["image_filename"]
        with Image.open(archive / "images/train" / record["file_name"]) as image:
            np.testing.assert_array_equal(record["image"], np.asarray(image)[..., :3])
        words = [o.words for o in clevr.decode(record["objects"])]
        assert words == [clevr.parse_scene(scene).objects[i].words for i in range(len(words))]
        assert len(words) == len(scene["objects"])
    assert record["image"].shape == (HEIGHT, WIDTH, 3)


def test_test_split_has_images_and_empty_sets(archive):
    source = clevr_files.ClevrFolder(archive, "test")
    assert source.file_names == ["CLEVR_test_000000.png", "CLEVR_test_000001.png"]
    assert not source[1]["objects"].any()


def test_resize_is_antialiased():
    stripes = np.zeros((64, 96, 3), np.uint8)
    stripes[:, ::2] = 200
    small = clevr_files.resize_image(stripes, 16)
    assert small.shape == (16, 16, 3)
    assert small.dtype == np.uint8
    assert abs(small.astype(int) - 100).max() <= 8, "stripes finer than a pixel average out"


# TensorFlow Datasets ----------------------------------------------------------------------------


@pytest.mark.parametrize("split", NUMBERS)
def test_tfds_gives_the_records_of_the_folder(archive, tfds_folder, split):
    folder = clevr_files.ClevrFolder(archive, split)
    source = clevr_tfds.open_source(tfds_folder, split)
    assert isinstance(source, clevr_tfds.ClevrTfds)
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


def assert_same_tree(ours, theirs):
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            assert_same_tree(value, theirs[key])
    else:
        np.testing.assert_array_equal(ours, theirs)


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
    clevr_tfds.convert_to_tfds(archive, tmp_path / "ours")
    assert_ours_is_stock(archive, tmp_path / "ours", tmp_path / "stock", monkeypatch)
    for split in NUMBERS:
        records = {r["file_name"]: r for r in clevr_tfds.ClevrTfds(tmp_path / "stock", split)}
        for record in clevr_files.ClevrFolder(archive, split):
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
        clevr_tfds.convert_to_tfds(archive, tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.array_record*"))
    with pytest.raises(UserError, match="no array_record data of clevr"):
        clevr_tfds.ClevrTfds(tmp_path / "out", "val")


def test_damaged_record_files_do_not_pass_silently(archive, tfds_folder, tmp_path):
    folder = tmp_path / "tfds"
    shutil.copytree(tfds_folder, folder)
    (path,) = folder.rglob("clevr-train.array_record*")
    original, rng = path.read_bytes(), np.random.default_rng(0)
    expected = {r["file_name"]: r for r in clevr_files.ClevrFolder(archive, "train")}
    errors = 0
    for _ in range(20):
        damaged = bytearray(original)
        damaged[rng.integers(len(damaged))] ^= 0x55
        path.write_bytes(damaged)
        try:
            records = list(clevr_tfds.ClevrTfds(folder, "train"))
        except UserError:
            errors += 1
        else:
            for record in records:
                assert_same_record(record, expected[record["file_name"]])
    assert errors > 0, "nothing was damaged"


# Pipeline ---------------------------------------------------------------------------------------


def names_of(batches):
    return [batch["file_name"].tolist() for batch in batches]


def take(iterator, number):
    return [next(iterator) for _ in range(number)]


def test_pipeline_batches_shuffles_and_resizes(archive):
    source = clevr_files.ClevrFolder(archive, "train")
    batches = take(iter(clevr_files.pipeline(source, size=16, batch_size=5, seed=3)), 4)
    for batch in batches:
        assert batch["image"].shape == (5, 16, 16, 3)
        assert batch["image"].dtype == np.uint8
        assert batch["objects"].shape == (5, 10, 19)
        assert sorted(batch["file_name"]) == source.file_names, "an epoch is every record once"
        for name, image, objects in zip(
            batch["file_name"], batch["image"], batch["objects"], strict=True
        ):
            record = source[source.file_names.index(name)]
            np.testing.assert_array_equal(objects, record["objects"])
            np.testing.assert_array_equal(image, clevr_files.resize_image(record["image"], 16))
    orders = names_of(batches)
    assert len({tuple(order) for order in orders}) > 1, "every epoch has its own order"
    again = clevr_files.pipeline(source, size=16, batch_size=5, seed=3, threads=1)
    assert names_of(take(iter(again), 4)) == orders
    other = clevr_files.pipeline(source, size=16, batch_size=5, seed=4)
    assert names_of(take(iter(other), 4)) != orders


def test_pipeline_in_order_ends(archive):
    source = clevr_files.ClevrFolder(archive, "train")
    options = {"size": 8, "batch_size": 2, "shuffle": False, "num_epochs": 1}
    batches = clevr_files.pipeline(source, **options, drop_remainder=False)
    assert list(itertools.chain(*names_of(batches))) == source.file_names
    assert [len(names) for names in names_of(clevr_files.pipeline(source, **options))] == [2, 2]


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_pipeline_resumes_exactly(archive, tfds_folder, workers):
    kinds = (clevr_files.ClevrFolder(archive, "train"), clevr_tfds.ClevrTfds(tfds_folder, "train"))
    for source in kinds[: 1 if workers else 2]:
        options = {"size": 8, "batch_size": 2, "seed": 7}
        uninterrupted = take(iter(clevr_files.pipeline(source, **options)), 9)
        first = iter(clevr_files.pipeline(source, **options, workers=workers))
        start = take(first, 4)
        state = json.loads(json.dumps(first.get_state()))
        second = iter(clevr_files.pipeline(source, **options, workers=workers))
        second.set_state(state)
        for ours, theirs in zip(start + take(second, 5), uninterrupted, strict=True):
            assert_same_tree(dict(ours), dict(theirs))


def test_pipeline_reports_what_is_damaged(tmp_path):
    archive = make_archive(tmp_path, {"val": 3})
    (archive / "images/val/CLEVR_val_000002.png").write_bytes(b"not an image")
    source = clevr_files.ClevrFolder(archive, "val")
    with pytest.raises(
        UserError, match=r"CLEVR_val_000002.png \(scenes\[2\] of .*\): not a readable"
    ):
        list(clevr_files.pipeline(source, size=8, batch_size=1, num_epochs=1))
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        clevr_files.pipeline(source, size=8, batch_size=0)


# Cache ------------------------------------------------------------------------------------------


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
    monkeypatch.setattr(clevr_cache, "_CHUNK", 2)


def test_cache_holds_the_resized_records(archive, tmp_path, small_chunks):
    source = clevr_files.ClevrFolder(archive, "train")
    reports = []
    folder = clevr_cache.prepare_cache(
        source, tmp_path / "c", size=16, on_progress=lambda *report: reports.append(report)
    )
    assert reports == [(i, 5) for i in range(6)]
    cache = clevr_cache.load_cache(folder, verify=True)
    assert isinstance(cache.images, np.memmap)
    assert cache.images.shape == (5, 16, 16, 3)
    for i, record in enumerate(source):
        expected = {**record, "image": clevr_files.resize_image(record["image"], 16)}
        assert_same_record(cache[i], expected)
    assert sorted(path.name for path in folder.iterdir()) == [
        "images.npy",
        "manifest.json",
        "objects.npy",
    ]
    batch = next(iter(clevr_files.pipeline(cache, size=16, batch_size=5, seed=3)))
    same = next(iter(clevr_files.pipeline(source, size=16, batch_size=5, seed=3)))
    assert_same_tree(dict(batch), dict(same))

    again = Counted(source)
    clevr_cache.prepare_cache(again, folder, size=16)
    assert again.read == [], "a finished cache is left as it is"


@pytest.mark.parametrize("stop_at", range(5))
def test_cache_goes_on_where_it_was_interrupted(archive, tmp_path, small_chunks, stop_at):
    source = clevr_files.ClevrFolder(archive, "train")
    whole = clevr_cache.prepare_cache(source, tmp_path / "whole", size=8)
    folder = tmp_path / "c"
    with pytest.raises(KeyboardInterrupt):
        clevr_cache.prepare_cache(Counted(source, stop_at), folder, size=8, threads=1)
    with pytest.raises(UserError, match="no finished cache here"):
        clevr_cache.load_cache(folder)
    resumed = Counted(source)
    clevr_cache.prepare_cache(resumed, folder, size=8, threads=1)
    assert resumed.read == list(range(stop_at // 2 * 2, 5)), "finished chunks are kept"
    clevr_cache.load_cache(folder, verify=True)
    for name in ("images.npy", "objects.npy", "manifest.json"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes()


def test_cache_interrupted_at_its_last_step_is_finished(archive, tmp_path, small_chunks):
    source = clevr_files.ClevrFolder(archive, "train")
    folder = clevr_cache.prepare_cache(source, tmp_path / "c", size=8)
    (folder / "manifest.json").rename(folder / "unfinished.json")
    (folder / "objects.npy").rename(folder / "objects.partial.npy")
    resumed = Counted(source)
    clevr_cache.prepare_cache(resumed, folder, size=8)
    assert resumed.read == []
    clevr_cache.load_cache(folder, verify=True)


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "journal"])
def test_what_was_damaged_while_unfinished_is_done_again(archive, tmp_path, small_chunks, damage):
    source = clevr_files.ClevrFolder(archive, "train")
    folder = tmp_path / "c"
    with pytest.raises(KeyboardInterrupt):
        clevr_cache.prepare_cache(Counted(source, 4), folder, size=8, threads=1)
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
    clevr_cache.prepare_cache(resumed, folder, size=8, threads=1)
    assert resumed.read == ([2, 3, 4] if damage == "flip" else [0, 1, 2, 3, 4])
    cache = clevr_cache.load_cache(folder, verify=True)
    assert_same_record(
        cache[3], {**source[3], "image": clevr_files.resize_image(source[3]["image"], 8)}
    )


def test_damaged_caches_are_named(archive, tmp_path, small_chunks):
    source = clevr_files.ClevrFolder(archive, "train")
    folder = clevr_cache.prepare_cache(source, tmp_path / "c", size=8)
    other = clevr_files.ClevrFolder(archive, "val")
    with pytest.raises(UserError, match="holds the cache of other data"):
        clevr_cache.prepare_cache(other, folder, size=8)
    with pytest.raises(UserError, match="holds the cache of other data"):
        clevr_cache.prepare_cache(source, folder, size=16)

    images = (folder / "images.npy").read_bytes()
    flipped = bytearray(images)
    flipped[-1] ^= 1
    (folder / "images.npy").write_bytes(flipped)
    with pytest.raises(UserError, match=r"images.npy: wrong checksum in records 4 to 5"):
        clevr_cache.load_cache(folder, verify=True)
    (folder / "images.npy").write_bytes(images[:-1])
    with pytest.raises(UserError, match=r"images.npy: damaged or missing"):
        clevr_cache.load_cache(folder)
    np.save(folder / "images.npy", np.zeros((5, 8, 8, 4), np.uint8))
    with pytest.raises(UserError, match=r"images.npy: expected uint8 \(5, 8, 8, 3\), got"):
        clevr_cache.load_cache(folder)
    manifest = folder / "manifest.json"
    text = manifest.read_text()
    for changed in (text[:-5], "[]", text.replace('"num": 5', '"num": 6')):
        manifest.write_text(changed)
        with pytest.raises(UserError, match=r"manifest.json: damaged"):
            clevr_cache.load_cache(folder)
    manifest.write_text(text.replace('"format": 1', '"format": 2'))
    with pytest.raises(UserError, match="format 2, expected 1"):
        clevr_cache.load_cache(folder)


def test_a_full_disk_is_an_error_that_can_be_mended(archive, tmp_path, small_chunks, monkeypatch):
    source = clevr_files.ClevrFolder(archive, "train")

    def full(fd):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(clevr_cache.os, "fsync", full)
        with pytest.raises(UserError, match=r"cannot be written \(No space left"):
            clevr_cache.prepare_cache(source, tmp_path / "c", size=8)
    clevr_cache.load_cache(clevr_cache.prepare_cache(source, tmp_path / "c", size=8), verify=True)


# Command line -----------------------------------------------------------------------------------


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
        cache = clevr_cache.load_cache(clevr_cache.cache_folder(tmp_path / kind, "train", 8))
        by_name.append({record["file_name"]: record for record in cache})
    for name, record in by_name[0].items():
        assert_same_record(record, by_name[1][name])


def test_command_converts(archive, tmp_path, capsys):
    out = tmp_path / "tfds"
    assert cli.main(["data", "clevr-tfds", "--source", str(archive), "--out", str(out)]) == 0
    assert len(clevr_tfds.ClevrTfds(out, "val")) == NUMBERS["val"]


def test_command_names_what_is_missing(tmp_path, capsys):
    arguments = ["--source", str(tmp_path), "--out", str(tmp_path / "out")]
    assert cli.main(["data", "clevr", *arguments]) == 2
    assert f"{tmp_path}: expected an extracted CLEVR_v1.0 folder" in capsys.readouterr().err
    assert cli.main(["data", "clevr-tfds", *arguments]) == 2
    assert "expected images/train, images/val or images/test" in capsys.readouterr().err
    assert cli.main(["data", "clevr", *arguments, "--size", "0"]) == 2
    assert "--size: expected at least 1" in capsys.readouterr().err


# Fuzzing ----------------------------------------------------------------------------------------

WRONG_TEXT = (5, None, [], {}, True, "", "pink", "../x.png", 0.5)
WRONG_NUMBER = ("1", None, [], {}, True, float("nan"), float("inf"), -1e300, 10**400)
WRONG_LIST = (5, None, {}, "list", True, [1, 2], [1, 2, 3, 4], [[0], [0], [0]])


def places(content):
    """Every value of a scenes file that is read: where it is, and what must not be there."""
    yield ["scenes"], (5, None, {}, "list", True)
    for i, scene in enumerate(content["scenes"]):
        at = ["scenes", i]
        yield at, (5, None, [], "scene", True)
        yield [*at, "image_filename"], WRONG_TEXT
        yield [*at, "image_index"], ("1", None, [], {}, True, 0.5)
        yield [*at, "objects"], (*WRONG_LIST, [scene["objects"][0]] * 11)
        for j, _ in enumerate(scene["objects"]):
            here = [*at, "objects", j]
            yield here, (5, None, [], "object", True)
            for name in clevr.ATTRIBUTES:
                yield [*here, name], WRONG_TEXT
            for name in ("3d_coords", "pixel_coords"):
                yield [*here, name], WRONG_LIST
                for k in range(3):
                    yield [*here, name, k], WRONG_NUMBER
            yield [*here, "rotation"], WRONG_NUMBER


def replaced(content, path, value):
    copy = json.loads(json.dumps(content))
    place = copy
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return copy


def removed(content, path):
    copy = replaced(content, path, None)
    place = copy
    for key in path[:-1]:
        place = place[key]
    del place[path[-1]]
    return copy


def mutated_scenes(text, rng):
    content = json.loads(text)
    for _ in range(40):
        yield "cut", text[: rng.integers(len(text))].encode()
    for _ in range(10):
        garbled = bytearray(text.encode())
        garbled[rng.integers(len(garbled))] = 0xFF
        yield "not UTF-8", bytes(garbled)
    everywhere = list(places(content))
    for _ in range(160):
        path, wrong = everywhere[rng.integers(len(everywhere))]
        value = wrong[rng.integers(len(wrong))]
        yield f"{path} = {value!r}", json.dumps(replaced(content, path, value)).encode()
    optional = {"image_index", "pixel_coords", "rotation"}
    needed = [
        path for path, _ in everywhere if isinstance(path[-1], str) and path[-1] not in optional
    ]
    for _ in range(30):
        path = needed[rng.integers(len(needed))]
        yield f"{path} removed", json.dumps(removed(content, path)).encode()
    yield (
        "same name twice",
        json.dumps(
            replaced(content, ["scenes", 1, "image_filename"], "CLEVR_val_000000.png")
        ).encode(),
    )
    yield "deep", b'{"scenes": ' + b"[" * 100_000
    yield "empty", b""
    yield "list", b"[]"


def mutated_images(data, rng):
    for _ in range(40):
        yield "cut", data[: rng.integers(len(data))]
    for _ in range(60):
        flipped = bytearray(data)
        flipped[rng.integers(len(flipped))] ^= 1 << rng.integers(8)
        yield "flipped", bytes(flipped)
    for _ in range(20):
        blank = bytearray(data)
        start = rng.integers(len(data) - 40)
        blank[start : start + 40] = bytes(40)
        yield "zeros", bytes(blank)
    for size in (0, 1, 100):
        yield "noise", rng.bytes(size)
    yield "jpeg header", b"\xff\xd8\xff\xe0" + data
    # All checksums right, and still not an image.
    end = data.index(b"IDAT") - 4
    yield "no pixels", data[:end] + data[-12:]


def test_no_mutated_file_passes_silently_or_crashes(tmp_path):
    archive = make_archive(tmp_path, {"val": 2})
    scenes_file = archive / "scenes/CLEVR_val_scenes.json"
    image_file = archive / "images/val/CLEVR_val_000001.png"
    text, data = scenes_file.read_text(), image_file.read_bytes()
    rng = np.random.default_rng(0)
    number = 0

    def check(path, what, content):
        path.write_bytes(content)
        message = None
        try:
            list(clevr_files.ClevrFolder(archive, "val"))
        except UserError as error:
            message = str(error)
        assert message is not None, f"passed silently: {path.name} {what}"
        assert path.name in message
        assert str(archive) in message
        assert len(message) < 600
        return 1

    for what, content in mutated_scenes(text, rng):
        number += check(scenes_file, what, content)
    scenes_file.write_text(text)
    for what, content in mutated_images(data, rng):
        number += check(image_file, what, content)
    image_file.unlink()
    with pytest.raises(UserError, match=r"CLEVR_val_000001.png \(scenes\[1\].*: cannot be read"):
        list(clevr_files.ClevrFolder(archive, "val"))
    image_file.mkdir()
    with pytest.raises(UserError, match=r"CLEVR_val_000001.png \(scenes\[1\].*: cannot be read"):
        list(clevr_files.ClevrFolder(archive, "val"))
    scenes_file.unlink()
    with pytest.raises(UserError, match=r"CLEVR_val_scenes.json: cannot be read"):
        clevr_files.ClevrFolder(archive, "val")
    assert number >= 200


def test_other_image_formats_decode():
    image = Image.fromarray(np.full((4, 6, 3), 128, np.uint8))
    for mode, kind in (("L", "PNG"), ("LA", "PNG"), ("RGB", "JPEG"), ("RGB", "BMP")):
        file = io.BytesIO()
        image.convert(mode).save(file, kind)
        decoded = clevr_files.decode_image(file.getvalue(), "image")
        assert decoded.shape == (4, 6, 3)
        assert abs(decoded.astype(int) - 128).max() <= 2
