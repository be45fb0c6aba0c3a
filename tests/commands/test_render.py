import json
import pathlib

import numpy as np
import pytest
from PIL import Image

from msdspn_jax import cli, tasks
from msdspn_jax.clevr.files import ClevrFolder
from msdspn_jax.errors import UserError

BLENDER = pathlib.Path(__file__).parents[1] / "data" / "clevr_blender" / "CLEVR_calib_scenes.json"


def run(*argv):
    return cli.main(["render", *map(str, argv)])


def test_fresh_scenes_are_a_clevr_folder_and_render_again(tmp_path, capsys):
    small = ("--size", 16, "--quality", "fast")
    few = ("--min-objects", 1, "--max-objects", 2)
    assert (
        run("--seed", 1, "--num", 2, *few, *small, "--split", "val", "--out", tmp_path / "a") == 0
    )
    folder = ClevrFolder(tmp_path / "a", "val")
    assert len(folder) == 2
    assert {int((folder[i]["objects"][:, -1] > 0.5).sum()) for i in range(2)} <= {1, 2}
    record = folder[1]
    assert record["image"].shape == (16, 16, 3)
    assert record["file_name"] == "CLEVR_val_000001.png"
    scenes = tmp_path / "a" / "scenes" / "CLEVR_val_scenes.json"
    assert run("--scenes", scenes, *small, "--split", "val", "--out", tmp_path / "b") == 0
    again = ClevrFolder(tmp_path / "b", "val")
    for i in range(2):
        np.testing.assert_array_equal(again[i]["image"], folder[i]["image"])
        np.testing.assert_array_equal(again[i]["objects"], folder[i]["objects"])
    # It does not write over what is there, unless told to.
    assert run("--scenes", scenes, *small, "--split", "val", "--out", tmp_path / "b") == 2
    assert "--overwrite" in capsys.readouterr().err
    assert "camera" in json.loads(scenes.read_text())["scenes"][0]


def test_stopped_while_it_writes_over_others_there_is_no_data(tmp_path, monkeypatch):
    small = ("--size", 16, "--quality", "fast", "--num", 2, "--out", tmp_path)
    assert run("--seed", 0, *small) == 0
    monkeypatch.setattr("PIL.Image.Image.save", interrupt)
    assert run("--seed", 1, *small, "--overwrite") == 130
    with pytest.raises(UserError):
        ClevrFolder(tmp_path, "train")


def interrupt(*arguments, **options):
    raise KeyboardInterrupt


@pytest.mark.slow
def test_plain_scenes_files_keep_names_and_get_the_mean_camera(tmp_path):
    content = json.loads(BLENDER.read_text())
    for entry in content["scenes"]:
        del entry["camera"], entry["lights"]
    plain = tmp_path / "plain.json"
    plain.write_text(json.dumps(content))
    out = tmp_path / "out"
    assert run("--scenes", plain, "--num", 2, "--size", 16, "--quality", "fast", "--out", out) == 0
    image = Image.open(out / "images" / "train" / "CLEVR_calib_000000.png")
    assert image.size == (16, 16)
    written = json.loads((out / "scenes" / "CLEVR_train_scenes.json").read_text())["scenes"]
    assert len(written) == 2
    assert written[0]["camera"]["location"] == pytest.approx([7.48113, -6.50764, 5.34367], abs=1e-4)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ((), "either --scenes FILE or --seed S"),
        (("--seed", 1, "--scenes", "x.json"), "either --scenes FILE or --seed S"),
        (("--seed", 1), "--num"),
        (("--seed", 1, "--num", 0), "--num: expected at least 1"),
        (("--seed", 1, "--num", 1, "--size", 0), "--size: expected 1 to 4096"),
        (("--seed", 1, "--num", 1, "--quality", "best"), "--quality: expected one of fast"),
        (("--seed", 1, "--num", 1, "--split", "a/b"), "--split: expected a plain word"),
        (("--scenes", "missing.json"), "missing.json"),
        (
            ("--seed", 1, "--num", 1, "--max-objects", 2),
            "min <= max <= 10, got 3 and 2",
        ),
        (("--seed", 1, "--num", 1, "--full", "--size", 128), "--size: expected none with --full"),
    ],
)
def test_errors_are_plain(argv, words, tmp_path, capsys):
    assert run(*argv, "--out", tmp_path / "out") == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_scene_that_cannot_be_rendered_is_named(tmp_path, capsys):
    content = json.loads(BLENDER.read_text())
    content["scenes"][2]["objects"][1]["3d_coords"][2] = 3.0
    broken = tmp_path / "broken.json"
    broken.write_text(json.dumps(content))
    assert run("--scenes", broken, "--out", tmp_path / "out") == 2
    assert "broken.json: scenes[2].objects[1].3d_coords" in capsys.readouterr().err


@pytest.mark.parametrize(
    "location",
    [[10**400] * 3, [1e300, 0, 1], ["a", 0, 1], [[[1]]], [0, 0], None, {}, [float("nan"), 0, 1]],
)
@pytest.mark.parametrize("what", ["camera", "lights"])
def test_a_camera_from_nowhere_is_refused_in_words(location, what, tmp_path, capsys):
    content = json.loads(BLENDER.read_text())
    entry = content["scenes"][0][what]
    (entry if what == "camera" else entry["Lamp_Key"])["location"] = location
    broken = tmp_path / "broken.json"
    broken.write_text(json.dumps(content))
    assert run("--scenes", broken, "--out", tmp_path / "out") == 2
    message = capsys.readouterr().err
    assert f"broken.json: scenes[0].{what}" in message
    assert len(message) < 400


def test_a_file_that_is_not_text_is_refused_in_words(tmp_path, capsys):
    broken = tmp_path / "broken.json"
    broken.write_bytes(
        BLENDER.read_bytes().replace(b"train", b"tr\xffin").replace(b"calib", b"c\xfflib")
    )
    assert run("--scenes", broken, "--out", tmp_path / "out") == 2
    assert "broken.json: not a readable JSON file" in capsys.readouterr().err


def test_reports_are_listed_for_the_tasks_that_have_one(capsys):
    for argv in (["report", "--help"], ["report"]):
        cli.main(argv)
        listed = capsys.readouterr().out.split("Tasks: ")[1].strip().split(", ")
        assert listed == [name for name in tasks.TASKS if hasattr(tasks.load(name), "report")]
        assert "digits" not in listed
    for word in ("digits", "foo"):
        assert cli.main(["report", word]) == 2
        error = capsys.readouterr().err
        assert f"expected one with a report, {', '.join(listed)}, got '{word}'" in error
