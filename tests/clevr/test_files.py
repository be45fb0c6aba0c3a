import io
import itertools
import json
import os
import subprocess
import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import pytest
from clevr_archive import HEIGHT, NUMBERS, WIDTH, assert_same_tree, make_archive
from PIL import Image, ImageOps

from msdspn_jax.clevr import files
from msdspn_jax.clevr.entries import parse_scene
from msdspn_jax.clevr.files import ClevrFolder, decode_image, pipeline, resize_image
from msdspn_jax.clevr.objects import ATTRIBUTES, decode
from msdspn_jax.clevr.tfds import ClevrTfds
from msdspn_jax.errors import UserError


def test_folder_reads_images_and_objects(archive):
    source = ClevrFolder(archive.parent, "train")
    assert len(source) == NUMBERS["train"]
    scenes = json.loads((archive / "scenes" / "CLEVR_train_scenes.json").read_text())["scenes"]
    for record, scene in zip(source, scenes, strict=True):
        assert record["file_name"] == scene["image_filename"]
        with Image.open(archive / "images/train" / record["file_name"]) as image:
            np.testing.assert_array_equal(record["image"], np.asarray(image)[..., :3])
        words = [o.words for o in decode(record["objects"])]
        assert words == [parse_scene(scene).objects[i].words for i in range(len(words))]
        assert len(words) == len(scene["objects"])
    assert record["image"].shape == (HEIGHT, WIDTH, 3)


def test_test_split_has_images_and_empty_sets(archive):
    source = ClevrFolder(archive, "test")
    assert source.file_names == ["CLEVR_test_000000.png", "CLEVR_test_000001.png"]
    assert not source[1]["objects"].any()


def test_resize_is_antialiased():
    stripes = np.zeros((64, 96, 3), np.uint8)
    stripes[:, ::2] = 200
    small = resize_image(stripes, 16)
    assert small.shape == (16, 16, 3)
    assert small.dtype == np.uint8
    assert abs(small.astype(int) - 100).max() <= 8, "stripes finer than a pixel average out"


# Pipeline ---------------------------------------------------------------------------------------


def names_of(batches):
    return [batch["file_name"].tolist() for batch in batches]


def take(iterator, number):
    return [next(iterator) for _ in range(number)]


def test_pipeline_batches_shuffles_and_resizes(archive):
    source = ClevrFolder(archive, "train")
    batches = take(iter(pipeline(source, size=16, batch_size=5, seed=3)), 4)
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
            np.testing.assert_array_equal(image, resize_image(record["image"], 16))
    orders = names_of(batches)
    assert len({tuple(order) for order in orders}) > 1, "every epoch has its own order"
    again = pipeline(source, size=16, batch_size=5, seed=3, threads=1)
    assert names_of(take(iter(again), 4)) == orders
    other = pipeline(source, size=16, batch_size=5, seed=4)
    assert names_of(take(iter(other), 4)) != orders


def test_pipeline_in_order_ends(archive):
    source = ClevrFolder(archive, "train")
    options = {"size": 8, "batch_size": 2, "shuffle": False, "num_epochs": 1}
    batches = pipeline(source, **options, drop_remainder=False)
    assert list(itertools.chain(*names_of(batches))) == source.file_names
    assert [len(names) for names in names_of(pipeline(source, **options))] == [2, 2]


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_pipeline_resumes_exactly(archive, tfds_folder, workers):
    kinds = (ClevrFolder(archive, "train"), ClevrTfds(tfds_folder, "train"))
    for source in kinds[: 1 if workers else 2]:
        options = {"size": 8, "batch_size": 2, "seed": 7}
        uninterrupted = take(iter(pipeline(source, **options)), 9)
        first = iter(pipeline(source, **options, workers=workers))
        start = take(first, 4)
        state = json.loads(json.dumps(first.get_state()))
        second = iter(pipeline(source, **options, workers=workers))
        second.set_state(state)
        for ours, theirs in zip(start + take(second, 5), uninterrupted, strict=True):
            assert_same_tree(dict(ours), dict(theirs))


def test_pipeline_reports_what_is_damaged(tmp_path):
    archive = make_archive(tmp_path, {"val": 3})
    (archive / "images/val/CLEVR_val_000002.png").write_bytes(b"not an image")
    source = ClevrFolder(archive, "val")
    with pytest.raises(
        UserError, match=r"CLEVR_val_000002.png \(scenes\[2\] of .*\): not a readable"
    ):
        list(pipeline(source, size=8, batch_size=1, num_epochs=1))
    with pytest.raises(ValueError, match="batch_size: expected a number > 0, got 0"):
        pipeline(source, size=8, batch_size=0)


# Fuzzing ----------------------------------------------------------------------------------------

WRONG_TEXT = (5, None, [], {}, True, "", "pink", "../x.png", "..", "a\0.png", "\ud800.png", 0.5)
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
            for name in ATTRIBUTES:
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
            list(ClevrFolder(archive, "val"))
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
        list(ClevrFolder(archive, "val"))
    image_file.mkdir()
    with pytest.raises(UserError, match=r"CLEVR_val_000001.png \(scenes\[1\].*: cannot be read"):
        list(ClevrFolder(archive, "val"))
    scenes_file.unlink()
    with pytest.raises(UserError, match=r"CLEVR_val_scenes.json: cannot be read"):
        ClevrFolder(archive, "val")
    assert number >= 200


# What images may be ------------------------------------------------------------------------------


def saved(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def of_mode(mode, *pixel):
    return Image.new(mode, (3, 2), pixel if len(pixel) > 1 else pixel[0])


RAMP = np.arange(0, 2**16, 16, dtype=np.uint16).reshape(64, 64)


def palette(transparent):
    image = Image.fromarray(np.full((2, 3), 1, np.uint8)).convert("P")
    image.putpalette([10, 20, 30, 200, 100, 0])
    return saved(image, "PNG", **({"transparency": 1} if transparent else {}))


def animation(kind):
    frames = [of_mode("RGB", 200, 0, 0), of_mode("RGB", 0, 0, 200)]
    options = {"lossless": True} if kind == "WEBP" else {}
    return saved(frames[0], kind, save_all=True, append_images=frames[1:], **options)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (saved(of_mode("1", 1), "PNG"), 255),
        (saved(of_mode("L", 77), "PNG"), 77),
        (saved(of_mode("RGB", 1, 2, 3), "BMP"), (1, 2, 3)),
        (saved(of_mode("RGB", 1, 2, 3), "WEBP", lossless=True), (1, 2, 3)),
        (saved(of_mode("LA", 77, 255), "PNG"), 77),
        # Nothing of a pixel's hidden colour shows through.
        (saved(of_mode("LA", 77, 0), "PNG"), 128),
        (saved(of_mode("RGBA", 255, 0, 0, 0), "PNG"), 128),
        (saved(of_mode("RGBA", 255, 0, 0, 255), "PNG"), (255, 0, 0)),
        (saved(of_mode("RGBA", 228, 28, 128, 51), "PNG"), (148, 108, 128)),
        (saved(of_mode("RGBA", 255, 0, 0, 0), "WEBP", lossless=True), 128),
        (palette(transparent=False), (200, 100, 0)),
        (palette(transparent=True), 128),
        (saved(of_mode("L", 77), "PNG", transparency=77), 128),
        (saved(of_mode("RGB", 1, 2, 3), "PNG", transparency=(1, 2, 3)), 128),
        (saved(of_mode("I;16", 77 * 256 + 200), "PNG"), 77),
        (saved(of_mode("I;16", 65535), "PNG"), 255),
        (saved(of_mode("I;16", 999), "PNG", transparency=999), 128),
        (animation("PNG"), (200, 0, 0)),
        (animation("WEBP"), (200, 0, 0)),
    ],
)
def test_every_kind_of_pixel_has_its_rule(data, expected):
    decoded = decode_image(data, "image")
    assert decoded.shape == (2, 3, 3)
    np.testing.assert_array_equal(decoded, np.broadcast_to(np.uint8(expected), (2, 3, 3)))


def test_cmyk_is_plain_arithmetic():
    decoded = decode_image(saved(of_mode("CMYK", 255, 0, 0, 51), "JPEG", quality=100), "image")
    assert abs(decoded.astype(int) - (0, 204, 204)).max() <= 2


def test_sixteen_bits_become_eight():
    expected = np.broadcast_to((RAMP >> 8)[..., None], (64, 64, 3))
    np.testing.assert_array_equal(
        decode_image(saved(Image.fromarray(RAMP), "PNG"), "image"), expected
    )
    eight = (RAMP >> 8).astype(np.uint8)
    as_sixteen = Image.fromarray(eight.astype(np.uint16) * 257)
    np.testing.assert_array_equal(
        decode_image(saved(as_sixteen, "PNG"), "image"),
        decode_image(saved(Image.fromarray(eight), "PNG"), "image"),
    )


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_images_are_turned_upright(orientation, kind):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (4, 6, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {}
    turned = ImageOps.exif_transpose(Image.open(io.BytesIO(saved(image, "PNG", exif=exif))))
    decoded = decode_image(saved(image, kind, exif=exif, **options), "image")
    np.testing.assert_array_equal(decoded, np.asarray(turned))


def test_damaged_notes_do_not_make_an_image_unreadable():
    for exif in (b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\xff\xff"):
        data = saved(of_mode("RGB", 1, 2, 3), "PNG", exif=exif)
        assert decode_image(data, "image")[0, 0].tolist() == [1, 2, 3]


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "PPM", "TGA", "ICO", "PCX", "JPEG2000"])
def test_other_formats_are_not_opened(kind):
    try:
        data = saved(Image.new("RGB", (16, 16)), kind)
    except OSError:
        pytest.skip(f"no {kind} here")
    with pytest.raises(UserError, match="expected PNG, JPEG, WEBP, BMP"):
        decode_image(data, "photo.png")


def test_a_picture_starts_no_program(monkeypatch):
    def poisoned(*args, **kwargs):
        raise AssertionError("a program was started")

    monkeypatch.setattr(subprocess, "Popen", poisoned)
    with pytest.raises(UserError, match="expected PNG, JPEG, WEBP, BMP"):
        decode_image(EPS, "photo.png")


def test_large_images_are_refused_before_they_are_decoded(monkeypatch):
    side = 6000
    data = {
        "PNG": saved(Image.new("1", (side, side)), "PNG"),
        "WEBP": saved(Image.new("RGB", (side, side)), "WEBP", lossless=True, method=0),
        "BMP": saved(Image.new("1", (side, side)), "BMP"),
    }
    for kind, content in data.items():
        tracemalloc.start()
        with pytest.raises(UserError, match=f"1 to {2**25} pixels, got 6000 x 6000"):
            decode_image(content, kind)
        assert tracemalloc.get_traced_memory()[1] < 2e7 + 2 * len(content)
        tracemalloc.stop()
    content = saved(Image.new("1", (10_000, 9_500)), "BMP")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Pillow has a warning of its own, in words of its own.
        with pytest.raises(UserError, match="got 10000 x 9500"):
            decode_image(content, "a")
    monkeypatch.setattr(files, "MAX_IMAGE_BYTES", 10)
    with pytest.raises(UserError, match="a: expected at most 10 bytes, got 11"):
        decode_image(b"x" * 11, "a")


def test_the_size_of_a_webp_is_known_without_its_decoder():
    image = Image.new("RGB", (300, 70), (9, 9, 9))
    frames = {"save_all": True, "append_images": [Image.new("RGB", (300, 70))]}
    for options in ({}, {"lossless": True}, frames, {"exif": Image.Exif().tobytes()}):
        assert files._webp_size(saved(image, "WEBP", **options)) == (300, 70)


def test_a_jpeg_of_endless_scans_is_refused():
    data = saved(Image.new("RGB", (16, 16)), "JPEG", progressive=True)
    start = data.index(b"\xff\xda")
    with pytest.raises(UserError, match="a JPEG of more than 500 scans"):
        decode_image(data[:start] + data[start:-2] * 100, "image")


def test_only_regular_files_are_read(tmp_path):
    if not hasattr(os, "mkfifo"):
        pytest.skip("no pipes with names here")
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path / "pipe.png", Path("/dev/zero")):
        with pytest.raises(UserError, match=r"cannot be read \(not a regular file\)"):
            files.read_image(path)
    with pytest.raises(UserError, match="cannot be read"):
        files.read_image(tmp_path)
    with (tmp_path / "large.png").open("wb") as file:
        file.truncate(2**40)  # Of which nothing is on the disk.
    for read in (files.read_image, files.read_scenes):
        with pytest.raises(UserError, match=r"large\.png: larger than the \d+ bytes that are read"):
            read(tmp_path / "large.png")
    with pytest.raises(UserError, match="larger than the 3 bytes"):
        files.read_bytes(Path(__file__), limit=3)


def test_other_image_formats_decode():
    image = Image.fromarray(np.full((4, 6, 3), 128, np.uint8))
    for mode, kind in (("L", "PNG"), ("LA", "PNG"), ("RGB", "JPEG"), ("RGB", "BMP")):
        file = io.BytesIO()
        image.convert(mode).save(file, kind)
        decoded = decode_image(file.getvalue(), "image")
        assert decoded.shape == (4, 6, 3)
        assert abs(decoded.astype(int) - 128).max() <= 2
