"""Two thousand files that nobody meant well with: every one is read, or refused in words.

None may end in a traceback, hang, or eat memory. Programs, which are native code, may bring down
the process that runs them; that is one of their own.
"""

import collections
import functools
import io
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save

from msdspn_jax import cli
from msdspn_jax.errors import UserError
from msdspn_jax.tasks.clevr import task as clevr
from msdspn_jax.trained import program as programs
from msdspn_jax.trained import weights
from msdspn_jax.trained.isolated import IsolatedProgram

BLENDER = Path(__file__).parents[1] / "data" / "clevr_blender" / "CLEVR_calib_scenes.json"
SECONDS, MEGABYTES = 30, 1500

# Reads the files of a list, one after the other, and says of each what became of it.
READER = """
import json, re, signal, sys
import jax, numpy as np
from msdspn_jax.clevr import entries, files, scene
from msdspn_jax.errors import UserError
from msdspn_jax.trained import program, weights

def image(path):
    assert files.read_image(path).dtype == np.uint8

def scenes(path):
    for i, parsed in enumerate(files.read_scenes(path)):
        json.dumps(entries.scene_to_json(parsed))
        entries.scene_camera(parsed, path)
        scene.scene_arrays(parsed, path)

def model(path):
    found = weights.load_model(path)
    found.num_inner_steps()
    size = found.config.size
    images = jax.ShapeDtypeStruct((1, size, size, 3), np.uint8)
    jax.eval_shape(found.predict, found.variables, images)

def run(path):
    found = program.load_program(path)
    size = found.settings["size"]
    try:
        np.asarray(jax.jit(found.predict)(np.zeros((2, size, size, 3), np.uint8)))
    except Exception as error:  # trained.isolated makes words of it.
        raise UserError(str(error))

def peak():
    # In kB, since the last reset; the peak that getrusage gives is that of the parent, at first.
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])

def too_long(*_):
    raise TimeoutError

signal.signal(signal.SIGALRM, too_long)
kind, seconds = sys.argv[1], int(sys.argv[2])
for path in sys.stdin.read().split("\\0"):
    open("/proc/self/clear_refs", "w").write("5")
    before = peak()
    print(json.dumps({"begun": path}), flush=True)
    signal.alarm(seconds)
    words = ""
    try:
        globals()[kind](path)
        outcome = "read"
    except UserError as error:
        outcome, words = "refused", str(error)
    except BaseException as error:
        outcome, words = "TRACEBACK", repr(error)
    signal.alarm(0)
    print(json.dumps([path, outcome, words[:3000], (peak() - before) // 1024]), flush=True)
"""


def read_all(kind, paths):
    """What becomes of every file: outcome, words and megabytes by path."""
    found, left = {}, [str(path) for path in paths]
    while left:
        with subprocess.Popen(
            [sys.executable, "-c", READER, kind, str(SECONDS)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        ) as reader:  # fmt: skip
            lines = collections.deque()
            try:
                lines += reader.communicate("\0".join(left), timeout=120 + 5 * len(left))[0].split(
                    "\n"
                )
            except subprocess.TimeoutExpired as expired:
                reader.kill()
                lines += (expired.stdout or b"").decode().split("\n")
        begun = None
        for line in filter(None, lines):
            about = json.loads(line)
            if isinstance(about, dict):
                begun = about["begun"]
            else:
                found[about[0]] = about[1:]
        if begun is None:
            raise RuntimeError("the reader does not start")
        found.setdefault(begun, ["DIED", str(reader.returncode), 0])
        left = left[left.index(begun) + 1 :]
    return found


def mutated(data, rng):
    """Bytes near these."""
    content = bytearray(data)
    kind = rng.integers(6)
    if kind == 0:
        return bytes(content[: rng.integers(len(content))])
    start = rng.integers(len(content))
    if kind == 1:
        content[start] ^= 1 << rng.integers(8)
    elif kind == 2:
        for _ in range(8):  # Headers are at the front.
            content[rng.integers(min(200, len(content)))] = rng.integers(256)
    elif kind == 3:
        content[start : start + 40] = rng.bytes(40)
    elif kind == 4:
        content[start:start] = content[: rng.integers(len(content))]
    else:
        value = int(rng.choice([0, 1, 2**31 - 1, 2**32 - 1, 2**16 - 1]))
        place = rng.integers(max(1, min(400, len(content) - 4)))
        content[place : place + 4] = value.to_bytes(4, rng.choice(["big", "little"]))
    return bytes(content)


def with_checksums(png):
    """A PNG whose chunks all have the right checksum, whatever is in them."""
    out, position = bytearray(png[:8]), 8
    while position + 8 <= len(png):
        length = int.from_bytes(png[position : position + 4], "big")
        body = png[position + 4 : position + 8 + length]
        crc = __import__("zlib").crc32(body).to_bytes(4, "big")
        out += png[position : position + 4] + body + crc
        position += 12 + length
    return bytes(out)


def saved(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def good_images(rng):
    pixels = rng.integers(0, 256, (24, 36, 4), np.uint8)
    rgb, rgba = Image.fromarray(pixels[..., :3]), Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x0112] = 6
    frames = {"save_all": True, "append_images": [rgba.transpose(Image.Transpose.ROTATE_180)]}
    deep = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    yield "png", saved(rgb, "PNG", exif=exif)
    yield "png", saved(rgba, "PNG")
    yield "png", saved(deep, "PNG")
    yield "png", saved(rgba.convert("LA"), "PNG")
    yield "png", saved(rgb.convert("P"), "PNG", transparency=3)
    yield "png", saved(rgba, "PNG", **frames)
    yield "jpg", saved(rgb, "JPEG", exif=exif)
    yield "jpg", saved(rgb, "JPEG", progressive=True)
    yield "jpg", saved(rgb.convert("CMYK"), "JPEG")
    yield "webp", saved(rgb, "WEBP")
    yield "webp", saved(rgba, "WEBP", lossless=True, exif=exif)
    yield "webp", saved(rgba, "WEBP", **frames)
    yield "bmp", saved(rgb, "BMP")
    yield "bmp", saved(rgb.convert("P"), "BMP")


def write_images(folder, number, rng):
    good = [*good_images(rng)]
    foreign = [saved(Image.new("RGB", (9, 9)), kind) for kind in ("GIF", "TIFF", "PPM", "ICO")]
    foreign += [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", b"", b"\0" * 99]
    big = Image.new("1", (20_000, 20_000))
    foreign += [saved(big, "PNG"), saved(Image.new("RGB", (9000, 9000)), "WEBP", lossless=True)]
    for i in range(number):
        suffix, data = good[i % len(good)]
        if i < len(foreign):
            data = foreign[i]
        else:
            data = mutated(data, rng)
            if suffix == "png" and i % 2:
                data = with_checksums(data)
        path = folder / f"{i}.{suffix}"
        path.write_bytes(data)
        yield path


HOSTILE = (
    10**400, -1, 0, 1e308, float("nan"), float("inf"), None, True, "", "x" * 5000, "..", "a\0b",
    "\ud800", [], {}, [[]], [10**400] * 3, {"a": 1}, [1e308, 0, 1], 10**9, "1e9", -(10**30),
)  # fmt: skip


def put_somewhere(content, rng):
    """A copy of JSON with a hostile value in place of one that is there."""
    copy = json.loads(json.dumps(content))
    place, key = copy, None
    while True:
        if isinstance(place, dict) and place:
            key = str(rng.choice(sorted(place)))
        elif isinstance(place, list) and place:
            key = int(rng.integers(len(place)))
        else:
            break
        if not isinstance(place[key], dict | list) or not place[key] or rng.random() < 0.15:
            break
        place = place[key]
    if key is None:
        return HOSTILE[rng.integers(len(HOSTILE))]
    if rng.random() < 0.1:
        del place[key]
    else:
        place[key] = HOSTILE[rng.integers(len(HOSTILE))]
    return copy


def write_scenes(folder, number, rng):
    content = json.loads(BLENDER.read_text())
    content["scenes"] = content["scenes"][:2]
    text = json.dumps(content).encode()
    for i in range(number):
        if i % 3:
            data = json.dumps(put_somewhere(content, rng)).encode()
        else:
            data = mutated(text, rng)
        path = folder / f"{i}.json"
        path.write_bytes(data if i else b"[" * 10**6)
        yield path


CONFIG = clevr.Config(model="slot-mlp", size=16, slot_dim=4, hidden_dim=4)


def small_weights(path):
    shapes = jax.eval_shape(clevr.build_predictor(CONFIG).init, jax.random.key(0))
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda x: rng.uniform(0, 0.1, x.shape).astype(x.dtype), shapes)
    weights.save_model(path, CONFIG, variables, step=1)
    return variables


def write_weights(folder, number, rng):
    good = folder / "good"
    small_weights(good)
    data, arrays = good.read_bytes(), load_file(good)
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    record = json.loads(header["__metadata__"]["msdspn_jax"])
    dtypes = ["BF16", "F8_E4M3", "I8", "F64", "BOOL", "F4", "no such"]
    for i in range(number):
        if i % 4 == 0:
            changed = mutated(data, rng)
        elif i % 4 == 1:
            text = json.dumps(put_somewhere(header, rng)).encode()
            changed = len(text).to_bytes(8, "little") + text + data[8 + size :]
        elif i % 4 == 2 and i % 8 == 2:
            name = str(rng.choice(sorted(arrays)))
            entry = {**header[name], "dtype": str(rng.choice(dtypes))}
            text = json.dumps({**header, name: entry}).encode()
            changed = len(text).to_bytes(8, "little") + text + data[8 + size :]
        else:
            new = put_somewhere(record, rng)
            changed = save(arrays, metadata={"msdspn_jax": json.dumps(new)})
        path = folder / f"{i}.safetensors"
        path.write_bytes(changed)
        yield path


def write_programs(folder, number, rng):
    good = folder / "good"
    variables = small_weights(folder / "weights")
    model = weights.Model(CONFIG, variables, 0, clevr.build_predictor(CONFIG), {})
    programs.save_program(good, functools.partial(model.predict, variables), size=16)
    with zipfile.ZipFile(good) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    settings = json.loads(parts["settings.json"])
    for i in range(number):
        path = folder / f"{i}.zip"
        if i % 4 == 0:
            path.write_bytes(mutated(good.read_bytes(), rng))
            yield path
            continue
        changed = dict(parts)
        if i % 4 == 1:
            changed["settings.json"] = json.dumps(put_somewhere(settings, rng)).encode()
        elif i == 2:
            changed["model.jax_export"] = bytes(2**30)
        else:
            changed["model.jax_export"] = mutated(parts["model.jax_export"], rng)
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in changed.items():
                archive.writestr(name, content)
        yield path


def run_by_itself(path):
    with IsolatedProgram(path, time_limit=SECONDS) as program:
        size = program.settings["size"]
        program.predict(np.zeros((2, size, size, 3), np.uint8)).result()


KINDS = {
    "image": (write_images, 1000),
    "scenes": (write_scenes, 600),
    "model": (write_weights, 400),
    "run": (write_programs, 400),
}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads its memory from /proc")
@pytest.mark.parametrize("kind", KINDS)
def test_strangers_are_read_or_refused(kind, tmp_path, capsys):
    write, number = KINDS[kind]
    paths = [*write(tmp_path, number, np.random.default_rng(0))]
    found = read_all(kind, paths)
    assert found.keys() == {*map(str, paths)}
    counts = collections.Counter(outcome for outcome, _, _ in found.values())
    with capsys.disabled():
        print(f"\n{kind}: {dict(counts)}, at most {max(x[2] for x in found.values())} MB more")
    for path, (outcome, words, megabytes) in found.items():
        if kind == "run" and outcome not in ("read", "refused"):
            # Where it has a process of its own, that is a sentence.
            with pytest.raises(UserError):
                run_by_itself(path)
            continue
        assert outcome in ("read", "refused"), (path, outcome, words)
        assert megabytes < MEGABYTES, (path, megabytes)
        if kind != "run":
            assert path in words or outcome == "read", words
            assert len(words) < 1000, (path, words)
    assert counts["refused"] > number / 4


@pytest.mark.slow
def test_no_image_ends_predict_for_all(tmp_path, capsys):
    small_weights(tmp_path / "w")
    folder = tmp_path / "folder"
    folder.mkdir()
    paths = [*write_images(folder, 300, np.random.default_rng(1))]
    argv = ["predict", folder, "--weights", tmp_path / "w", "--out", tmp_path / "out"]
    assert cli.main([*map(str, argv), "--no-pictures"]) == 1
    skipped = capsys.readouterr().err.count("msdspn predict: skipped: ")
    written = json.loads((tmp_path / "out" / "predictions.json").read_text())["scenes"]
    assert skipped + len(written) == len(paths)
    assert min(skipped, len(written)) > 20
