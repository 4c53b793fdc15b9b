"""`--json`: whatever a process writes to stderr becomes JSON lines, libraries in C++ and child processes included.

The file descriptor itself is led through a pipe, whose other end a thread reads: a line that is a JSON object passes as
it stands, any other one becomes `{"event": "log", "level": "warning", "logger": "stderr", "message": …}`. So stderr is
no terminal any more, and nobody draws bars on it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import threading
from collections.abc import Iterator

from otcache.schemas.messages import one_line

PIPE_BYTES = 1 << 20
"""Room for what a library writes while it keeps Python from running; 64 KiB where the system gives no more."""
DRAIN_S = 5.0
"""How long to wait for the end of the pipe, which a child that goes on holds open."""
_LINE_ENDS = re.compile(rb"[\r\n]+")
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@contextlib.contextmanager
def json_lines_only() -> Iterator[None]:
    """While the context lasts, stderr holds JSON lines and nothing else.

    Does nothing where `sys.stderr` is not the process's own, as in a test that captures it in memory.
    """
    if not _is_own(sys.stderr):
        yield
        return
    sys.stderr.flush()
    real = os.dup(2)
    source, sink = os.pipe()
    _widen(sink)
    os.dup2(sink, 2)
    os.close(sink)
    reader = threading.Thread(target=_pass_on, args=(source, real), name="otc-json-lines", daemon=True)
    reader.start()
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(real, 2)
        reader.join(DRAIN_S)


def json_line(line: str) -> str | None:
    """A line of stderr as JSON; None for one that holds nothing.

    >>> json_line('{"event": "note", "text": "a"}')
    '{"event": "note", "text": "a"}'
    >>> json_line("\\x1b[0;93mW: slow\\x1b[m")
    '{"event": "log", "level": "warning", "logger": "stderr", "message": "W: slow"}'
    """
    with contextlib.suppress(ValueError):
        if line.startswith("{") and isinstance(json.loads(line), dict):
            return line
    message = one_line(_ESCAPES.sub("", line), 2000)
    event = {"event": "log", "level": "warning", "logger": "stderr", "message": message}
    return json.dumps(event, ensure_ascii=False) if message else None


def _is_own(stream: object) -> bool:
    try:
        return bool(stream.fileno() == 2)  # type: ignore[attr-defined]
    except (AttributeError, OSError, ValueError):
        return False


def _widen(pipe: int) -> None:
    with contextlib.suppress(ImportError, AttributeError, OSError):
        import fcntl

        fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, PIPE_BYTES)


def _pass_on(source: int, real: int) -> None:
    """Read lines until nobody writes any more."""
    rest = b""
    while piece := os.read(source, 1 << 16):
        *lines, rest = _LINE_ENDS.split(rest + piece)
        _write(real, lines)
    _write(real, [rest])


def _write(real: int, lines: list[bytes]) -> None:
    made = [json_line(line.decode("utf-8", "replace").strip()) for line in lines]
    data = "".join(f"{line}\n" for line in made if line).encode("utf-8", "replace")
    with contextlib.suppress(OSError):  # nobody reads stderr any more
        while data:
            data = data[os.write(real, data) :]
