"""SIGINT, SIGTERM and SIGHUP end a compile in one place, so that it cleans up and says how to go on.

The first signal raises `Interrupted` wherever the compile is; the second one ends the process at once. What a process
that is killed leaves behind is cleaned up by the next one (`whole_files.remove_leftovers`).
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

NAMES = ("SIGINT", "SIGTERM", "SIGHUP")


class Interrupted(KeyboardInterrupt):
    """A signal asked the process to end. No Exception, so that no library takes it for a failure of its own."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number

    @property
    def exit_code(self) -> int:
        """As shells report it: 130 for SIGINT, 143 for SIGTERM, 129 for SIGHUP."""
        return 128 + self.number


_received: list[int] = []


def check() -> None:
    """Raise what a signal has asked for, in case the first exception was lost in a callback of a library."""
    if _received:
        raise Interrupted(_received[0])


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """While the context lasts, signals raise `Interrupted`. Signals that are ignored (nohup) stay so.

    Python hands signals to the main thread only; elsewhere the context changes nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: Any) -> None:
        if _received:
            os._exit(128 + number)
        _received.append(number)
        raise Interrupted(number)

    numbers = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}
    unraisable = sys.unraisablehook

    def silent(event: Any) -> None:
        if not isinstance(event.exc_value, Interrupted):
            unraisable(event)

    _received.clear()
    sys.unraisablehook = silent
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, handle)
    try:
        yield
        check()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        sys.unraisablehook = unraisable
        _received.clear()
