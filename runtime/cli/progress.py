"""How far a command is: a bar on a terminal, a line every half minute elsewhere, or nothing."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from otcache.schemas.pulse import Pulse, progress_line

Advance = Callable[[int, int], None]


@contextmanager
def progress_bar(title: str, *, quiet: bool = False, as_json: bool = False) -> Iterator[Advance | None]:
    """What to call with the finished steps and all of them; None where nothing is shown.

    Args:
        title: what is under way.
        quiet: show nothing.
        as_json: `{"event": "progress", "name": …, "done": …, "total": …, "seconds": …, "seconds_left": …}` in place of
            lines and bars.
    """
    if quiet:
        yield None
    elif sys.stderr.isatty() and not as_json:
        with _bar(title) as advance:
            yield advance
    else:
        steps = _Steps(title, as_json=as_json)
        with Pulse(steps.say):
            yield steps


@contextmanager
def _bar(title: str) -> Iterator[Advance]:
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(escape(title), total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


class _Steps:
    """Counts steps, and says on stderr how far they are."""

    def __init__(self, title: str, *, as_json: bool) -> None:
        self.title, self.as_json = title, as_json
        self.done, self.total = 0, 0
        self.started = self.seen = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        self.done, self.total, self.seen = done, total, time.monotonic()

    def say(self) -> None:
        """Write one line."""
        now = time.monotonic()
        left = None
        if self.done:
            left = max(0.0, (self.seen - self.started) / self.done * (self.total - self.done) - (now - self.seen))
        if self.as_json:
            known = {"done": self.done, "total": self.total or None, "seconds": round(now - self.started, 1)}
            seconds_left = None if left is None else round(left, 1)
            line = json.dumps({"event": "progress", "name": self.title, **known, "seconds_left": seconds_left})
        else:
            line = progress_line(self.title, self.done / max(1, self.total), now - self.started, left)
        print(line, file=sys.stderr, flush=True)
