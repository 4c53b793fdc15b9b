"""With --json, stderr holds JSON lines alone, whoever writes to it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

NOISE = r"""
import ctypes, json, os, subprocess, sys, warnings
from otcache.runtime.cli.json_lines import json_lines_only
with json_lines_only():
    os.write(2, b"\x1b[0;93m2026-01-01 [W:onnxruntime] slow\x1b[m\n")
    warnings.warn("findfont: no font")
    print(json.dumps({"event": "pass"}), file=sys.stderr)
    subprocess.run([sys.executable, "-c", "import sys; sys.stderr.write('child\\n{broken\\rbar\\r\\n')"])
    ctypes.CDLL(None).perror(b"of C")
    sys.stderr.write("\n\nwithout an end")
    print(sys.stderr.isatty())
print("after", file=sys.stderr)
"""


@pytest.mark.skipif(os.name == "nt", reason="calls the C library")
def test_whatever_is_written_becomes_json_lines():
    result = subprocess.run([sys.executable, "-c", NOISE], capture_output=True, text=True, check=True)
    *lines, last = result.stderr.splitlines()
    assert result.stdout == "False\n" and last == "after"
    events = [json.loads(line) for line in lines]
    assert events.pop(next(i for i, event in enumerate(events) if event["event"] == "pass")) == {"event": "pass"}
    assert {(event["event"], event["level"], event["logger"]) for event in events} == {("log", "warning", "stderr")}
    messages = [event["message"] for event in events]
    assert messages[0] == "2026-01-01 [W:onnxruntime] slow" and "findfont: no font" in messages[1]
    assert messages[-5:-2] == ["child", "{broken", "bar"]
    assert messages[-2].startswith("of C") and messages[-1] == "without an end"


@pytest.mark.skipif(os.name == "nt", reason="sends signals")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_in_a_json_line(tmp_path, number, code):
    """While `unpack` waits for an archive."""
    line = [sys.executable, "-m", "otcache.runtime.cli.main", "unpack", "-", "-o", str(tmp_path / "a"), "--json"]
    process = subprocess.Popen(
        line,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # as where nobody ignores it
    )
    end = time.monotonic() + 60
    while not list(tmp_path.iterdir()):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.02)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code and not out and not list(tmp_path.iterdir()), err
    (event,) = map(json.loads, err.splitlines())
    assert (event["event"], event["exit_code"], event["kind"]) == ("error", code, "interrupted")
