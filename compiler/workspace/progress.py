"""How a compile reports what it is doing: one context per pass.

It is shown as bars, as lines, as JSON events, or not at all.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from . import interrupts

EVENT_INTERVAL_S = 1.0
"""Least time between two progress events of a pass; the last one always comes."""


class Pass:
    """One pass at work. Called with (done, total); `facts` are numbers about it, such as model evaluations."""

    def __init__(self, on_advance: Callable[[int, int], None] = lambda done, total: None) -> None:
        self._on_advance = on_advance
        self.facts: dict[str, float] = {}
        self.started = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        interrupts.check()
        self._on_advance(done, total)

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.monotonic() - self.started

    @property
    def at_work(self) -> dict[str, float]:
        """`workers` and `samples`, of a pass that has workers."""
        return {name: self.facts[name] for name in ("workers", "samples") if name in self.facts}

    def seconds_left(self, done: int, total: int) -> float | None:
        """Extrapolated from what is done."""
        return self.seconds / done * (total - done) if done else None


class Reporter:
    """Silent; the base of the others."""

    @contextlib.contextmanager
    def on(self, name: str, description: str) -> Iterator[Pass]:
        """Report a pass while the context lasts; the value is called with (done, total)."""
        interrupts.check()
        yield Pass()

    def report_reuse(self, name: str) -> None:
        """Report a result that was found in the workspace."""

    def note(self, text: str) -> None:
        """Say something that the user has to know while it goes on."""

    def close(self) -> None:
        """Take down what is shown."""


class QuietReporter(Reporter):
    """Notes on stderr, and nothing else: for logs and scripts."""

    def note(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


class LineReporter(QuietReporter):
    """One line on stderr per finished pass."""

    @contextlib.contextmanager
    def on(self, name: str, description: str) -> Iterator[Pass]:
        with super().on(name, description) as current:
            yield current
            facts = "".join(f", {value:g} {key.replace('_', ' ')}" for key, value in current.facts.items())
            self.note(f"{name}: {description} ({current.seconds:.1f} s{facts})")

    def report_reuse(self, name: str) -> None:
        self.note(f"{name}: from the workspace")


class JsonReporter(Reporter):
    """One JSON object a line on stderr.

    `{"event": "start", "name": …, "description": …}`; `{"event": "progress", "name": …, "done": 3, "total": 24,
    "seconds_left": …}`, with `workers` and `samples` where there are workers; `{"event": "pass", "name": …,
    "seconds": …}` with the pass's facts; `{"event": "reused", "name": …}`; `{"event": "note", "text": …}`.
    """

    @contextlib.contextmanager
    def on(self, name: str, description: str) -> Iterator[Pass]:
        written = [0.0]

        def advance(done: int, total: int) -> None:
            now = time.monotonic()
            if done < total and now - written[0] < EVENT_INTERVAL_S:
                return
            written[0] = now
            left = current.seconds_left(done, total)
            self._write(
                event="progress",
                name=name,
                done=done,
                total=total,
                seconds_left=None if left is None else round(left, 1),
                **current.at_work,
            )

        interrupts.check()
        current = Pass(advance)
        self._write(event="start", name=name, description=description)
        yield current
        self._write(event="pass", name=name, seconds=round(current.seconds, 3), **current.facts)

    def report_reuse(self, name: str) -> None:
        self._write(event="reused", name=name)

    def note(self, text: str) -> None:
        self._write(event="note", text=text)

    @staticmethod
    def _write(**event: Any) -> None:
        print(json.dumps(event), file=sys.stderr, flush=True)


class BarReporter(Reporter):
    """Bars with times left, on a terminal."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        self.console = Console(stderr=True)
        self.bars = Progress(
            TextColumn("{task.description:<34}", markup=False),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
        )
        self.bars.start()

    @contextlib.contextmanager
    def on(self, name: str, description: str) -> Iterator[Pass]:
        interrupts.check()
        task = self.bars.add_task(f"{name}: {description}", total=1)

        def advance(done: int, total: int) -> None:
            at_work = "".join(f", {value:g} {unit}" for unit, value in current.at_work.items())
            self.bars.update(task, completed=done, total=total, description=f"{name}: {description}{at_work}")

        current = Pass(advance)
        yield current
        self.bars.update(task, completed=self.bars.tasks[task].total)

    def report_reuse(self, name: str) -> None:
        self.note(f"{name}: from the workspace")

    def note(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        self.bars.stop()


def reporter_for(*, as_json: bool, verbose: bool) -> Reporter:
    """The reporter of events with `as_json`, of a line per pass with `verbose`, of bars on a terminal, or of notes."""
    if as_json:
        return JsonReporter()
    if verbose:
        return LineReporter()
    return BarReporter() if sys.stderr.isatty() else QuietReporter()
