"""What a compile says of itself while it runs: where, how often, and nothing where nobody looks."""

from __future__ import annotations

import io
import json
import os
import pty
import signal
import subprocess
import sys
import time

import pytest

from otcache.compiler.workspace import progress
from otcache.compiler.workspace.interrupts import Interrupted, check, interruptible
from otcache.compiler.workspace.progress import (
    BarReporter,
    JsonReporter,
    LineReporter,
    QuietReporter,
    Reporter,
    reporter_for,
)


def work(reporter, total=5):
    with reporter.on("anchor", f"{total} trials") as current:
        for done in range(1, total + 1):
            current(done, total)
        current.facts["evaluations"] = 12
    reporter.report_reuse("export")
    reporter.note("waiting")
    reporter.close()


def test_without_a_terminal_only_notes_are_said(capsys):
    work(QuietReporter())
    assert capsys.readouterr() == ("", "waiting\n")
    work(Reporter())
    assert capsys.readouterr() == ("", "")


def test_verbose_is_a_line_per_pass(capsys):
    work(LineReporter())
    out, err = capsys.readouterr()
    assert out == ""
    assert [line.split(" (")[0] for line in err.splitlines()] == [
        "anchor: 5 trials",
        "export: from the workspace",
        "waiting",
    ]
    assert "12 evaluations" in err


def test_events_are_json_lines_with_done_total_and_time_left(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    reporter = JsonReporter()
    with reporter.on("anchor", "40 trials") as current:
        for done in range(1, 41):
            now[0] += 0.25
            current(done, 40)
        current.facts["evaluations"] = 7
    out, err = capsys.readouterr()
    events = [json.loads(line) for line in err.splitlines()]
    assert out == "" and events[0] == {"event": "start", "name": "anchor", "description": "40 trials"}
    steps = [event for event in events if event["event"] == "progress"]
    assert len(steps) == 11, "ten seconds: one event a second, and the last"
    assert all(event["seconds_left"] == pytest.approx(0.25 * (40 - event["done"]), abs=0.1) for event in steps)
    assert (steps[-1]["done"], steps[-1]["total"]) == (40, 40)
    assert events[-1] == {"event": "pass", "name": "anchor", "seconds": 10.0, "evaluations": 7}


def test_a_reporter_is_chosen_by_the_options_and_the_terminal(monkeypatch):
    assert type(reporter_for(as_json=True, verbose=True)) is JsonReporter
    assert type(reporter_for(as_json=False, verbose=True)) is LineReporter
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert type(reporter_for(as_json=False, verbose=False)) is QuietReporter


def test_on_a_terminal_bars_are_drawn():
    script = (
        "import time\nfrom otcache.compiler.workspace.progress import reporter_for\nr = "
        "reporter_for(as_json=False, verbose=False)\n"
        "with r.on('anchor', '[4] trials') as p:\n    for i in range(1, 5):\n        time.sleep(0.1); p(i, 4)\n"
        "r.report_reuse('export')\nr.close()\nprint('result')"
    )
    ours, theirs = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", script], stderr=theirs, stdout=subprocess.PIPE, text=True)
    os.close(theirs)
    shown = b""
    while True:
        try:
            piece = os.read(ours, 65536)
        except OSError:
            break
        if not piece:
            break
        shown += piece
    out, _ = process.communicate()
    assert out == "result\n", "stdout holds the result only"
    text = shown.decode()
    assert "anchor: [4] trials" in text and "4/4" in text and "export: from the workspace" in text
    assert text.count("0:00:0") >= 2, "elapsed and left"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_raise_where_the_compile_is(number):
    before = signal.signal(number, signal.default_int_handler)  # under nohup it would be ignored
    try:
        with pytest.raises(Interrupted, match=signal.Signals(number).name) as caught, interruptible():
            os.kill(os.getpid(), number)
            time.sleep(5)
        assert caught.value.exit_code == 128 + number
        assert signal.getsignal(number) is signal.default_int_handler
        check()
    finally:
        signal.signal(number, before)


def test_an_interrupt_that_a_library_swallows_comes_back_at_the_next_step():
    reporter = Reporter()
    with pytest.raises(Interrupted), interruptible():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        except BaseException:
            pass
        with reporter.on("pass", "") as current:
            current(1, 2)
        raise AssertionError("went on")


def test_ignored_signals_stay_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interruptible():
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.05)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_bars_are_rich_markup_safe():
    reporter = BarReporter()
    work(reporter)
