"""Files are written whole or not at all, whatever lies in the way."""

import json
import os
import stat
import tempfile

import pytest

from msdspn_jax import _files, plots
from msdspn_jax.errors import UserError


def test_a_file_is_written_and_replaced_with_ordinary_permissions(tmp_path):
    path = tmp_path / "new" / "folder" / "a.txt"
    _files.write_text(path, "größer\n")
    assert path.read_bytes() == "größer\n".encode()
    other = tmp_path / "other"
    other.write_text("")
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(other.stat().st_mode)
    before = os.umask(0o077)
    try:
        _files.write_bytes(path, b"again")
    finally:
        os.umask(before)
    assert path.read_bytes() == b"again"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [p.name for p in path.parent.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(
    tmp_path, monkeypatch, call, error
):
    path = tmp_path / "a"
    _files.write_bytes(path, b"old")

    def fail(*args, **kwargs):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(type(error)):
            _files.write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_data_is_on_the_disk_before_the_file_has_its_name(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)

        def spy(*args, name=name, real=real, **kwargs):
            calls.append(name)
            return real(*args, **kwargs)

        monkeypatch.setattr(os, name, spy)
    _files.write_bytes(tmp_path / "a", b"new")
    assert calls == ["fsync", "replace", "fsync"]  # The last is the folder's.


def test_planted_links_are_not_followed(tmp_path, monkeypatch):
    victim, folder = tmp_path / "victim", tmp_path / "folder"
    victim.write_text("precious")
    folder.mkdir()
    # Names that version 0.1.0 would have taken, one that this version draws first, and the file.
    for name in (".a", f".a.{os.getpid()}", "a.tmp", "a.partial", ".writing-first", "a"):
        (folder / name).symlink_to(victim)
    names = iter(["first", "second"])
    monkeypatch.setattr(tempfile, "_get_candidate_names", lambda: names)
    _files.write_bytes(folder / "a", b"new")
    assert next(names, None) is None
    assert victim.read_text() == "precious"
    assert not (folder / "a").is_symlink()
    assert (folder / "a").read_bytes() == b"new"


def test_what_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "x"
    with (
        pytest.raises(UserError, match=r"file/x: expected a place that can be written, got "),
        _files.as_user_error(path),
    ):
        _files.write_bytes(path, b"")


def test_figures_are_written_whole(tmp_path):
    figure = plots.lines({"a": [1.0, 2.0]}, xlabel="x", ylabel="y")
    plots.save(figure, tmp_path / "new" / "a.png", tight=True)
    assert (tmp_path / "new" / "a.png").read_bytes().startswith(b"\x89PNG")
    assert len(list((tmp_path / "new").iterdir())) == 1


def test_json_has_no_nan():
    record = {"a": [1.5, float("nan")], "b": (float("inf"), {"c": -float("inf")}), "d": "NaN"}
    found = json.loads(_files.as_json(record))
    assert found == {"a": [1.5, None], "b": [None, {"c": None}], "d": "NaN"}
