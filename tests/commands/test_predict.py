import concurrent.futures
import dataclasses
import io
import json
import os

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from msdspn_jax import cli
from msdspn_jax.clevr import objects as clevr
from msdspn_jax.clevr.entries import scene_to_json
from msdspn_jax.clevr.files import ClevrFolder, read_scenes, resize_image
from msdspn_jax.commands.pictures import portable_name, printable, unique_names
from msdspn_jax.trained import isolated, weights
from msdspn_jax.trained import program as programs

SIZE = 16
OBJECTS = (
    clevr.ClevrObject("cube", "large", "metal", "red", (1.0, 2.0, 0.7), score=0.75),
    clevr.ClevrObject("sphere", "small", "rubber", "cyan", (0.0, 0.0, 0.35), score=0.25),
    clevr.ClevrObject("cylinder", "large", "rubber", "gray", (-1.5, 0.5, 0.7), score=1.0),
)


def see(images):
    """Predicts OBJECTS; the first one's x is the green of the image's first pixel / 64."""
    sets = jnp.broadcast_to(jnp.asarray(clevr.encode(OBJECTS)), (images.shape[0], 10, 19))
    green = images[:, 0, 0, 1].astype(jnp.float32)
    sets = sets.at[:, 0, 0].set(green / 64 / 3)
    # An image that breaks the model.
    return jnp.where((images[:, 0, 0, 0] == 255)[:, None, None], jnp.nan, sets)


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    path = tmp_path_factory.mktemp("program") / "see.zip"
    programs.save_program(path, see, size=SIZE, facts={"model": "see"})
    return path


class InThisProcess:
    """Stands in for a process of its own, which takes seconds to start."""

    def __init__(self, path, *, time_limit):
        self._program = programs.load_program(path)
        self.settings, self.source = self._program.settings, self._program.source

    def predict(self, images):
        future = concurrent.futures.Future()
        future.set_result(np.asarray(self._program.predict(images)))
        return future

    def close(self):
        pass


@pytest.fixture
def run(program, tmp_path, monkeypatch):
    monkeypatch.setattr(isolated, "IsolatedProgram", InThisProcess)

    def run(*images, out="out", **flags):
        argv = ["--program", program, "--out", tmp_path / out, *images]
        for name, value in flags.items():
            argv += [f"--{name}"] if value is True else [f"--{name}", value]
        return cli.main(["predict", *map(str, argv)])

    return run


def picture(path, color=(0, 64, 0), size=(SIZE, SIZE)):
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", size, color).save(path)
    return path


def test_images_of_all_sizes_become_scenes_and_pictures(run, tmp_path, capsys):
    a = picture(tmp_path / "a.png", (0, 64, 0), (480, 320))
    folder = tmp_path / "folder"
    picture(folder / "b.JPG", (0, 128, 0))
    picture(folder / "c.png", (0, 0, 0), (20, 60))
    (folder / "notes.txt").write_text("not an image, and not meant to be one")
    assert run(a, folder) == 0
    text = capsys.readouterr()
    assert "2 images resized to 16x16, from 480x320, 20x60" in text.err
    assert "c.png: not in CLEVR's proportions" in text.err
    assert "0.75  large red metal cube at (1.00, 2.00, 0.70)" in text.out
    assert "6 objects in 3 images" in text.out

    written = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert written["info"]["threshold"] == 0.5
    assert written["info"]["model"] == "see"
    first = written["scenes"][0]
    assert first["image_filename"] == "a.png"
    assert first["source"] == str(a)
    # All above the threshold, the surest first, every one with its score: 1.0 as well.
    assert [o["score"] for o in first["objects"]] == [1.0, 0.75]
    assert first["objects"][1] == {
        "shape": "cube", "size": "large", "material": "metal", "color": "red", "score": 0.75,
        "3d_coords": pytest.approx([1.0, 2.0, 0.7]),
    }  # fmt: skip
    scenes = read_scenes(tmp_path / "out" / "predictions.json")
    assert [s.image_filename for s in scenes] == ["a.png", "b.JPG", "c.png"]
    xs = [s.objects[1].position[0] for s in scenes]
    np.testing.assert_allclose(xs, [1.0, 2.0, 0.0], atol=0.05)  # JPEG is lossy.
    names = {p.name for p in (tmp_path / "out" / "pictures").iterdir()}
    assert names == {"a.png", "b.png", "c.png"}


def test_predictions_beside_their_images_are_a_clevr_folder(run, tmp_path):
    images = tmp_path / "root" / "images" / "val"
    images.parent.parent.mkdir()
    images.parent.mkdir()
    picture(images / "x.png")
    assert run(images, out="root/scenes", **{"no-pictures": True}) == 0
    scenes = tmp_path / "root" / "scenes"
    assert not (scenes / "pictures").exists()
    (scenes / "predictions.json").rename(scenes / "CLEVR_val_scenes.json")
    record = ClevrFolder(tmp_path / "root", "val")[0]
    expected = np.asarray(see(record["image"][None]))[0]
    np.testing.assert_allclose(record["objects"][:2], expected[[2, 0]], rtol=1e-6)


def test_images_are_squashed_as_the_data_pipeline_does(run, tmp_path):
    noise = np.random.default_rng(3).integers(0, 200, (32, 48, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    assert run(tmp_path / "noise.png", **{"no-pictures": True}) == 0
    scene = read_scenes(tmp_path / "out" / "predictions.json")[0]
    green = resize_image(noise, SIZE)[0, 0, 1]
    assert scene.objects[1].position[0] == pytest.approx(green / 64)


def test_wrong_files_are_named_and_skipped(run, tmp_path, capsys):
    good = picture(tmp_path / "good.png")
    cut = picture(tmp_path / "cut.png")
    cut.write_bytes(cut.read_bytes()[:-20])
    half = tmp_path / "half.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(half)
    half.write_bytes(half.read_bytes()[:1500])
    text, empty = tmp_path / "text.png", tmp_path / "empty"
    text.write_text("hello")
    empty.mkdir()
    nan = picture(tmp_path / "nan.png", (255, 0, 0))
    wrong = (tmp_path / "missing.png", cut, half, text, empty, nan)
    assert run(*wrong[:3], good, *wrong[3:], **{"batch-size": 2}) == 1
    errors = capsys.readouterr().err
    for path in wrong:
        assert f"skipped: {path}" in errors
    assert "nan.png: the prediction is not finite" in errors
    assert "6 skipped" in errors
    scenes = read_scenes(tmp_path / "out" / "predictions.json")
    assert [s.image_filename for s in scenes] == ["good.png"]

    assert run(*wrong, out="none") == 1
    assert "nothing was written" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_images_of_the_same_name_do_not_overwrite_each_other(run, tmp_path):
    paths = [picture(tmp_path / name / "x.png", (0, 50 * i, 0)) for i, name in enumerate("abc")]
    jpeg = picture(tmp_path / "a" / "x.jpg")
    assert run(*paths, paths[0], jpeg, **{"batch-size": 2}) == 0
    written = json.loads((tmp_path / "out" / "predictions.json").read_text())["scenes"]
    assert [s["source"] for s in written] == [*map(str, paths), str(jpeg)]
    names = [s["image_filename"] for s in written]
    assert names == ["x.png", "x-2.png", "x-3.png", "x.jpg"]
    xs = [s["objects"][1]["3d_coords"][0] for s in written[:3]]
    np.testing.assert_allclose(xs, [0, 50 / 64, 100 / 64], rtol=1e-6)
    pictures = {p.name for p in (tmp_path / "out" / "pictures").iterdir()}
    assert pictures == {"x.png", "x-2.png", "x-3.png", "x-4.png"}


@given(st.lists(st.sampled_from(["a.png", "A.png", "a-2.png", "a-3.png", "b", "b-2"])))
def test_names_are_unique_and_kept_where_they_can_be(names):
    unique = unique_names(names)
    assert len({name.casefold() for name in unique}) == len(names)
    for i, (name, new) in enumerate(zip(names, unique, strict=True)):
        earlier = {n.casefold() for n in names[:i]}
        assert (new == name) == (name.casefold() not in earlier)


def test_the_truth_gives_average_precision(run, tmp_path, capsys):
    images = [picture(tmp_path / f"{i}.png", (0, 64, 0)) for i in range(3)]
    true = [o for o in OBJECTS if o.score > 0.5]
    scenes = [clevr.ClevrScene(f"{i}.png", tuple(true)) for i in range(2)]
    truth = tmp_path / "truth.json"
    truth.write_text(json.dumps({"scenes": [scene_to_json(s) for s in scenes]}))
    assert run(*images, scenes=truth) == 0
    text = capsys.readouterr().out
    assert "not scored: 1" in text
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert scores["images"] == 2
    # The third predicted object is not there, but ranked below both that are.
    assert scores["ap_0.0625"] == 1
    assert scores["dataset_ap_inf"] == 1
    picture(images[1], (0, 96, 0))  # Half a unit off, for one object of two.
    assert run(*images, scenes=truth, out="again") == 0
    scores = json.loads((tmp_path / "again" / "scores.json").read_text())
    assert scores["ap_0.25"] < scores["ap_1"] == 1
    assert run(tmp_path / "2.png", scenes=truth, out="third") == 2
    assert "has no scene of any of these images" in capsys.readouterr().err


def test_the_threshold_and_the_overwriting(run, tmp_path, capsys):
    image = picture(tmp_path / "a.png")
    quiet = {"no-pictures": True}
    assert run(image, threshold=0.1, **quiet) == 0
    assert len(read_scenes(tmp_path / "out" / "predictions.json")[0].objects) == 3
    assert run(image, threshold=1, **quiet) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert run(image, threshold=1, overwrite=True, **quiet) == 0
    assert read_scenes(tmp_path / "out" / "predictions.json")[0].objects == ()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"run": "r"}, "only one of --run, --program"),
        ({"weights": "r"}, "only one of --weights, --program"),
        ({"batch-size": 0}, "--batch-size: expected at least 1, got 0"),
        ({"inner.num-steps": 5}, "--inner.num-steps: fixed in a program"),
        ({"inner.num-starts": 5}, "--inner.num-starts: fixed in a program"),
        ({"inner.num-starts": 0}, "--inner.num-starts: expected at least 1, got 0"),
        ({"seed": 5}, "--seed: fixed in a program"),
        ({"threshold": "nan"}, "--threshold: expected a number from 0 to 1, got nan"),
        ({"threshold": 2}, "--threshold: expected a number from 0 to 1, got 2"),
        ({"threshold": -0.1}, "--threshold: expected a number from 0 to 1, got -0.1"),
        ({"time-limit": 0}, "--time-limit: expected a number > 0, got 0"),
        ({"out": "n" * 300}, "expected a place that can be written, got File name too long"),
        ({"artefact": "r"}, "--artefact is now called --program"),
        ({"scenes": "none.json"}, "none.json: cannot be read"),
    ],
)
def test_bad_flags_are_told(run, tmp_path, capsys, flags, words):
    flags = {"no-pictures": True, **flags}
    assert run(picture(tmp_path / "a.png"), **flags) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_without_a_model(tmp_path, monkeypatch, capsys):
    image = str(picture(tmp_path / "a.png"))
    out = ["--out", str(tmp_path / "out")]
    monkeypatch.setattr(weights, "_BOX_MODEL", "none.safetensors")
    assert cli.main(["predict", image, *out]) == 2
    assert "no model in the box" in capsys.readouterr().err
    assert cli.main(["predict", image, *out, "--run", str(tmp_path)]) == 2
    assert "is not a run folder" in capsys.readouterr().err
    assert cli.main(["predict", *out]) == 2
    assert "no images given" in capsys.readouterr().err
    assert cli.main(["predict", image, *out, "--program", image]) == 2
    assert "not an exported program, or damaged" in capsys.readouterr().err


# Names and scores -------------------------------------------------------------------------------

STRANGE = (
    r"back\slash.png", "$$.png", "$x^2$.png", "$\\frac{.png", "new\nline.png", "\x1b[31mred.png",
    " .png", "%s{0}.png", "-dash.png", "[/bold].png", "日本.png", "é.png",
    "long" * 62 + ".png", os.fsdecode(b"not-utf8-\xff.png"), "x" * 250 + ".bmp", ".png", "noname",
    os.fsdecode(b"also \xff\\ and more " + b"\xe9" * 200 + b".png"),
)  # fmt: skip


@pytest.mark.skipif(os.name == "nt", reason="its file systems have none of these names")
def test_no_name_ends_it_for_the_others(run, tmp_path, capsys):
    folder, good = tmp_path / "folder", []
    folder.mkdir()
    for i, name in enumerate(STRANGE):
        try:
            Image.new("RGB", (SIZE, SIZE), (0, i, 0)).save(folder / name, "png")
        except OSError:  # Some file systems keep UTF-8 alone.
            continue
        good.append(folder / name)
    assert len(good) > 10
    bad = [tmp_path / ("n" * 300), tmp_path / "nul\0.png"]
    assert run(*good, *bad) == 1
    captured = capsys.readouterr()
    assert captured.err.count("skipped: ") == len(bad)
    assert "\x1b" not in captured.out + captured.err
    written = json.loads((tmp_path / "out" / "predictions.json").read_text())["scenes"]
    # Every name can be read back, and it is known whose it is.
    scenes = read_scenes(tmp_path / "out" / "predictions.json")
    assert len(scenes) == len(written) == len(good)
    for path, entry in zip(good, written, strict=True):
        if "not-utf8" not in path.name and "also" not in path.name:
            assert entry["source"] == str(path)
        json.dumps(entry, ensure_ascii=False).encode()
    names = [entry["image_filename"] for entry in written]
    assert {"back_slash.png", "$$.png", "new_line.png", "not-utf8-_.png", "日本.png"} <= {*names}
    assert len([*(tmp_path / "out" / "pictures").iterdir()]) == len(good)


def test_names_for_terminals_and_files():
    assert printable("a\udcff\n\x1b[.png") == r"a\xff\n\x1b[.png"
    assert printable("é 日本") == "é 日本"
    assert portable_name("\\\\x\n\udcff.png") == "__x__.png"
    assert portable_name("plain name-2.png") == "plain name-2.png"
    assert len(portable_name("日" * 85 + ".png").encode()) <= 220


def test_scores_are_presences_and_not_changed(run, tmp_path, monkeypatch, capsys):
    above = (dataclasses.replace(OBJECTS[0], score=1.25),)
    monkeypatch.setattr(
        InThisProcess,
        "__init__",
        lambda self, path, *, time_limit: vars(self).update(
            settings={"size": SIZE, "threshold": 0.5}, source="p"
        ),
    )
    future = concurrent.futures.Future()
    future.set_result(clevr.encode(above)[None])
    monkeypatch.setattr(InThisProcess, "predict", lambda self, images: future)
    assert run(picture(tmp_path / "a.png"), **{"no-pictures": True}) == 0
    written = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert written["scenes"][0]["objects"][0]["score"] == 1.25
    assert "no probability" in written["info"]["score"]


def test_help_says_what_is_read_and_what_the_model_in_the_box_sees(capsys):
    with pytest.raises(SystemExit):
        cli.main(["predict", "--help"])
    words = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "it ranks objects and is no probability" in words
    for word in ("native code", "mid-grey", "EXIF", "16 bits", "CMYK", "animation"):
        assert word in words
    found = weights.box_model_sees()
    assert found is not None
    assert f"The model in the box sees {found}." in words
    for word in ("objects an image", "cylinder", "pixels"):
        assert word in found


# Ways in and out --------------------------------------------------------------------------------


def test_json_is_all_there_is_on_standard_output(program, run, tmp_path, capsys):
    a, missing = picture(tmp_path / "a.png", size=(48, 32)), tmp_path / "missing.png"
    argv = ["predict", "--program", str(program), "--json", str(a), str(missing)]
    assert cli.main(argv) == 1
    captured = capsys.readouterr()
    content = json.loads(captured.out)
    assert [s["image_filename"] for s in content["scenes"]] == ["a.png"]
    assert content["scenes"][0]["objects"][0]["score"] == 1.0
    assert "skipped: " in captured.err
    assert "2 objects in 1 images" in captured.err
    assert {p.name for p in tmp_path.iterdir()} == {"a.png"}
    # With a folder and the truth: the same, in both places.
    truth = tmp_path / "truth.json"
    scene = clevr.ClevrScene("a.png", tuple(o for o in OBJECTS if o.score > 0.5))
    truth.write_text(json.dumps({"scenes": [scene_to_json(scene)]}))
    assert run(a, json=True, scenes=truth) == 0
    content = json.loads(capsys.readouterr().out)
    out = tmp_path / "out"
    assert content["scores"] == json.loads((out / "scores.json").read_text())
    del content["scores"]
    assert content == json.loads((out / "predictions.json").read_text())
    assert cli.main([*argv[:3], str(a)]) == 2
    assert "give --out FOLDER, --json, or both" in capsys.readouterr().err


def test_patterns_that_no_shell_expanded(run, tmp_path, capsys):
    for name in ("b.png", "a.png", "c.jpg"):
        picture(tmp_path / "images" / name)
    picture(tmp_path / "images" / "[x].png")
    (tmp_path / "images" / "deep.png").mkdir()
    quiet = {"no-pictures": True}
    assert run(tmp_path / "images" / "*.png", **quiet) == 0
    names = [s.image_filename for s in read_scenes(tmp_path / "out" / "predictions.json")]
    assert names == ["[x].png", "a.png", "b.png"]
    # A file of that very name is that file.
    assert run(tmp_path / "images" / "[x].png", out="one", **quiet) == 0
    assert len(read_scenes(tmp_path / "one" / "predictions.json")) == 1
    assert run(tmp_path / "**" / "a.png", tmp_path / "*.gif", out="two", **quiet) == 1
    assert "*.gif: no file is called so" in capsys.readouterr().err
    assert len(read_scenes(tmp_path / "two" / "predictions.json")) == 1


def test_an_image_by_standard_input(run, tmp_path, monkeypatch, capsys):
    class Stdin:
        def __init__(self, data):
            self.buffer = io.BytesIO(data)

    a = picture(tmp_path / "a.png", size=(48, 32))
    monkeypatch.setattr("sys.stdin", Stdin(a.read_bytes()))
    assert run("-", a) == 0
    written = json.loads((tmp_path / "out" / "predictions.json").read_text())["scenes"]
    assert [s["source"] for s in written] == [str(a), "-"]
    assert written[0]["objects"] == written[1]["objects"]
    assert written[1]["image_filename"] == "stdin"
    assert {p.name for p in (tmp_path / "out" / "pictures").iterdir()} == {"a.png", "stdin.png"}
    for data, words in ((b"", "standard input: empty"), (b"text", "not a readable image")):
        monkeypatch.setattr("sys.stdin", Stdin(data))
        assert run("-", out="none") == 1
        assert words in capsys.readouterr().err


def test_more_objects_than_the_model_can_say(run, tmp_path, monkeypatch, capsys):
    many = np.tile(clevr.encode(OBJECTS[:1])[:1], (2, 10, 1))
    many[1, 9, 18] = 0
    future = concurrent.futures.Future()
    future.set_result(many)
    monkeypatch.setattr(InThisProcess, "predict", lambda self, images: future)
    images = [picture(tmp_path / name) for name in ("full.png", "nine.png")]
    assert run(*images, **{"no-pictures": True}) == 0
    text = capsys.readouterr()
    assert "note: full.png: 10 objects found, which is all that the model can say" in text.err
    assert "full.png: 10 objects, all that the model can say" in text.out
    assert "nine.png: 9 objects\n" in text.out
    written = json.loads((tmp_path / "out" / "predictions.json").read_text())["scenes"]
    assert [s.get("full") for s in written] == [True, None]
    assert len(read_scenes(tmp_path / "out" / "predictions.json")) == 2


def test_a_prediction_that_cannot_be_written_back_is_skipped(run, tmp_path, monkeypatch, capsys):
    huge = clevr.encode(OBJECTS)
    huge[0, 0] = 3e38
    future = concurrent.futures.Future()
    future.set_result(huge[None])
    monkeypatch.setattr(InThisProcess, "predict", lambda self, images: future)
    assert run(picture(tmp_path / "a.png")) == 1
    assert "a.png: the prediction is not finite, or beyond 1e+06" in capsys.readouterr().err


@pytest.mark.parametrize("change", [{"position": (3e38, 0.0, 0.0)}, {"score": 3e38}])
def test_a_truth_out_of_this_world_is_refused(run, tmp_path, capsys, change):
    scene = clevr.ClevrScene("a.png", (dataclasses.replace(OBJECTS[0], **change),))
    (tmp_path / "truth.json").write_text(json.dumps({"scenes": [scene_to_json(scene)]}))
    assert run(picture(tmp_path / "a.png"), scenes=tmp_path / "truth.json") == 2
    assert "a.png.objects[0]: expected coordinates and a score up to 1e+06" in (
        capsys.readouterr().err
    )
    assert not (tmp_path / "out").exists()
