"""What a compile says of itself while it runs: where, how often, and nothing where nobody looks."""

from __future__ import annotations

import io
import json
import os
import pty
import signal
import subprocess
import sys
import threading
import time

import pytest

from otcache.compiler.workspace import progress
from otcache.compiler.workspace.interrupts import Interrupted, check, interruptible
from otcache.compiler.workspace.progress import (
    BarReporter,
    JsonReporter,
    LineReporter,
    Pass,
    PulseReporter,
    QuietReporter,
    Reporter,
    reporter_for,
)
from otcache.schemas import pulse


def work(reporter, total=5):
    with reporter.on("anchor", f"{total} trials") as current:
        for done in range(1, total + 1):
            current(done, total)
        current.facts["evaluations"] = 12
    reporter.report_reuse("export")
    reporter.note("waiting")
    reporter.close()


def test_quiet_says_notes_alone(capsys):
    work(QuietReporter())
    assert capsys.readouterr() == ("", "waiting\n")
    work(Reporter())
    work(JsonReporter(quiet=True))
    assert capsys.readouterr() == ("", '{"event": "note", "text": "waiting"}\n')


@pytest.fixture
def clock(monkeypatch):
    """A time of day that tests move."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_time_left_is_known_within_the_first_part(clock):
    """20 trials of 128 evaluations, a second each: after ten seconds nothing is done, and the time left is known."""
    current = Pass("anchor", "20 trials")
    assert current.seconds_left is None
    current.expect(2560)
    current(0, 20)
    for _ in range(10):
        clock[0] += 1
        current.evaluated(1)
    assert current.done == 0 and current.share == pytest.approx(10 / 2560)
    assert current.seconds_left == pytest.approx(2550)
    clock[0] += 50
    assert current.seconds_left == pytest.approx(2500), "it counts down while one evaluation takes long"
    current(1, 20)
    assert current.share == pytest.approx(0.05), "a part that took less than was expected is done nevertheless"


def test_parts_count_by_what_they_take(clock):
    """Budgets of 4 and 12: when the first is done, three quarters are to come."""
    current = Pass("fit", "budgets 4, 12")
    current.expect(4, 12)
    clock[0] += 10
    current(1, 2)
    assert current.share == 0.25 and current.seconds_left == pytest.approx(30)
    current.evaluated(100)
    assert current.share < 1.0 and (current(2, 2), current.share, current.seconds_left)[1:] == (1.0, 0.0)


def test_what_was_found_says_nothing_of_how_fast_the_rest_is(clock):
    current = Pass("capture", "4 full runs")
    current.expect(200)
    current.found(150, 200)
    clock[0] += 10
    current(160, 200)
    assert current.share == 0.8 and current.seconds_left == pytest.approx(40)


def test_a_pass_begins_with_the_time_that_evaluations_took_before(clock):
    reporter = Reporter()
    with reporter.on("reference", "graph") as current:
        clock[0] += 8
        reporter.evaluated(16)
    with reporter.on("anchor", "20 trials") as current:
        current.expect(100)
        assert current.seconds_left == pytest.approx(50)


@pytest.mark.parametrize("kind", [PulseReporter, LineReporter, JsonReporter])
def test_without_a_terminal_a_line_comes_while_a_pass_is_under_way(kind, capsys, monkeypatch):
    """Also of a pass that counts nothing, and whose thread is busy."""
    assert pulse.INTERVAL_S < 30
    monkeypatch.setattr(pulse, "INTERVAL_S", 0.01)
    reporter, seen = kind(), threading.Event()
    said = reporter._tell
    monkeypatch.setattr(reporter, "_tell", lambda current: (said(current), seen.set()))
    with reporter.on("cut", "Transformer"):
        assert seen.wait(60)
    reporter.close()
    line = next(line for line in capsys.readouterr().err.splitlines() if "start" not in line)
    if kind is JsonReporter:
        event = json.loads(line)
        assert (event["event"], event["name"], event["total"], event["seconds_left"]) == ("progress", "cut", None, None)
    else:
        assert line == "cut: Transformer: 0 s so far, time left not known"


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


def test_events_are_json_lines_with_done_total_and_time_left(capsys, clock):
    reporter = JsonReporter()
    with reporter.on("anchor", "40 trials") as current:
        for done in range(1, 41):
            clock[0] += 0.25
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
    assert type(reporter_for(as_json=False, verbose=False)) is PulseReporter
    assert type(reporter_for(as_json=False, verbose=True, quiet=True)) is QuietReporter


def test_on_a_terminal_bars_are_drawn():
    script = (
        "import time\nfrom otcache.compiler.workspace.progress import reporter_for\nr = "
        "reporter_for(as_json=False, verbose=False)\n"
        "with r.on('anchor', '[4] trials') as p:\n    p.expect(4e3)\n    p(0, 4)\n"
        "    for i in range(1, 5):\n        r.evaluated(500); time.sleep(0.6); p(i, 4)\n"
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
    assert text.count("0:00:0") >= 1 and " s left" in text, "elapsed and left"


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
