"""The progress bar: on a terminal, and elsewhere."""

import io
import sys

import pytest

from msdspn_jax._progress import ProgressBar


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def terminal(monkeypatch):
    """Call it for a terminal in place of standard error."""
    for name, value in (("TERM", "xterm"), ("COLUMNS", "200")):
        monkeypatch.setenv(name, value)

    def make():
        # Within the test: pytest sets its own capture anew after the fixtures.
        monkeypatch.setattr(sys, "stderr", Terminal())
        return sys.stderr

    return make


def test_it_shows_count_note_and_label_as_they_are(terminal):
    stream = terminal()
    with ProgressBar("[/oops] [red]x") as report:
        report(2, 5, "loss [/oops] 0.1")
        report.say("set aside in runs/[/oops][bold]1")
        report(5, 5, "[bold]done")
    text = stream.getvalue()
    for words in ("[/oops] [red]x", "5/5", "[bold]done", "set aside in runs/[/oops][bold]1"):
        assert words in text


def test_it_shows_nothing_before_the_first_report(terminal):
    stream = terminal()
    with ProgressBar("reading"):
        pass
    assert stream.getvalue() == ""


def test_elsewhere_only_what_is_said_is_written(capsys, monkeypatch):
    # Not even the library that draws is needed.
    monkeypatch.setitem(sys.modules, "rich", None)
    with ProgressBar("reading") as report:
        report(1, 2, "note")
        report.say("[/oops]")
    assert capsys.readouterr().err == "[/oops]\n"
