"""How far a command is, where stderr is no terminal."""

from __future__ import annotations

import json
import threading

import pytest

from otcache.runtime.cli import progress
from otcache.runtime.cli.main import main
from otcache.schemas import pulse

LONG = ("bench", "build-engines", "compare", "compile", "encode", "export", "pack", "run", "unpack", "verify")


@pytest.fixture
def said(monkeypatch):
    """Set once a line was written."""
    event, say = threading.Event(), progress._Steps.say
    monkeypatch.setattr(pulse, "INTERVAL_S", 0.01)
    monkeypatch.setattr(progress._Steps, "say", lambda steps: (say(steps), event.set()))
    return event


@pytest.mark.parametrize("as_json", [False, True])
def test_a_line_says_how_far_it_is_and_what_is_left(said, capsys, as_json):
    with progress.progress_bar("budget full", as_json=as_json) as advance:
        advance(1, 50)
        said.clear()
        assert said.wait(60)
    line = capsys.readouterr().err.splitlines()[-1]
    if as_json:
        event = json.loads(line)
        assert (event["event"], event["name"], event["done"], event["total"]) == ("progress", "budget full", 1, 50)
        assert event["seconds_left"] >= 0
    else:
        assert line == "budget full: 2 % in 0 s, about 0 s left"


def test_nothing_is_said_of_what_is_quiet(said, capsys):
    with progress.progress_bar("pack", quiet=True) as advance:
        assert advance is None and not said.wait(0.05)
    assert capsys.readouterr() == ("", "")


def test_what_counts_no_steps_says_how_long_it_has_taken(said, capsys):
    with progress.progress_bar("pack"):
        assert said.wait(60)
    assert capsys.readouterr().err.splitlines()[0] == "pack: 0 s so far, time left not known"


@pytest.mark.parametrize("name", LONG)
def test_whatever_takes_long_can_be_quiet(name):
    import click

    command = main.get_command(click.Context(main), name)
    assert {"-q", "--quiet"} <= {option for each in command.params for option in each.opts}
