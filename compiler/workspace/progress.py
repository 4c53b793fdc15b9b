"""How a compile reports what it is doing: one context per pass.

It is shown as bars on a terminal, as lines or JSON events elsewhere, or not at all. How far a pass is follows from the
parts of it that are done, and within a part from the model evaluations that it was expected to take.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from otcache.schemas.pulse import Pulse, progress_line, time_text

from . import interrupts

EVENT_INTERVAL_S = 1.0
"""Least time between two progress events of a pass; the last one always comes."""
MOST_OF_A_PART = 0.99
"""Of a part that is not done, whatever was evaluated for it."""


class Pass:
    """One pass at work. Called with (done, total) of its parts; `facts` are numbers about it, such as model
    evaluations.
    """

    def __init__(
        self,
        name: str = "",
        description: str = "",
        show: Callable[[Pass], None] = lambda current: None,
        evaluation_s: float | None = None,
    ) -> None:
        """`show` is told of every change; `evaluation_s` is what an evaluation of one sample took so far, if known."""
        self.name, self.description = name, description
        self.facts: dict[str, float] = {}
        self.started = time.monotonic()
        self.done, self.total = 0, 0
        self.evaluations = 0
        """Of one sample, that were counted (`evaluated`)."""
        self._show, self._evaluation_s = show, evaluation_s
        self._parts: tuple[float, ...] = ()
        self._at_part = 0
        self._given = 0.0
        self._seen = self.started

    def __call__(self, done: int, total: int) -> None:
        interrupts.check()
        self.done, self.total, self._at_part = done, total, self.evaluations
        self._changed()

    def expect(self, *parts: float) -> None:
        """Say how many evaluations each part takes, or with one number all of them together; at most."""
        self._parts = parts

    def found(self, done: int, total: int) -> None:
        """So many parts were there already: they say nothing of how long the others take."""
        before = self.share
        self.done, self.total = done, total
        self._given += max(0.0, self.share - before)

    def evaluated(self, count: int) -> None:
        """Count evaluations of one sample that were made for the part that is under way."""
        interrupts.check()
        self.evaluations += count
        self._changed()

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.monotonic() - self.started

    @property
    def at_work(self) -> dict[str, float]:
        """`workers` and `samples`, of a pass that has workers."""
        return {name: self.facts[name] for name in ("workers", "samples") if name in self.facts}

    @property
    def share(self) -> float:
        """Of the pass that is done, in [0, 1]."""
        total = self.total or len(self._parts)
        if not total:
            return 0.0
        weights = self._parts if len(self._parts) == total else (1.0,) * total
        if not sum(weights) or self.done >= total:
            return float(self.done >= total)
        expected = weights[self.done] if weights is self._parts else sum(self._parts) / total
        if not expected and self.done:
            expected = self._at_part / self.done
        inside = min((self.evaluations - self._at_part) / expected, MOST_OF_A_PART) if expected else 0.0
        return (sum(weights[: self.done]) + inside * weights[self.done]) / sum(weights)

    @property
    def seconds_left(self) -> float | None:
        """Extrapolated from what is done; before anything is, from what evaluations took so far. None if neither is
        known.
        """
        share, now = self.share, time.monotonic()
        if share > self._given:
            at_change = (self._seen - self.started) * (1.0 - share) / (share - self._given)
            return max(0.0, at_change - (now - self._seen))
        if self._evaluation_s is None or not self._parts:
            return None
        return max(0.0, sum(self._parts) * self._evaluation_s * (1.0 - share) - (now - self.started))

    def text(self) -> str:
        """One line of how far it is."""
        return progress_line(f"{self.name}: {self.description}", self.share, self.seconds, self.seconds_left)

    def _changed(self) -> None:
        self._seen = time.monotonic()
        self._show(self)


class Reporter:
    """Silent; the base of the others."""

    open: tuple[Pass, ...] = ()
    """Passes at work, the innermost last."""
    evaluation_s: float | None = None
    """What an evaluation of one sample took, as far as it is known."""

    @contextlib.contextmanager
    def on(self, name: str, description: str) -> Iterator[Pass]:
        """Report a pass while the context lasts; the value is called with (done, total)."""
        interrupts.check()
        current = Pass(name, description, self._show, self.evaluation_s)
        self.open = (*self.open, current)
        try:
            yield current
        finally:
            self.open = tuple(each for each in self.open if each is not current)
        if current.evaluations:
            self.evaluation_s = current.seconds / current.evaluations

    def evaluated(self, count: int) -> None:
        """Count evaluations of one sample that the pass at work has made."""
        if self.open:
            self.open[-1].evaluated(count)

    def timed(self, evaluation_s: float) -> None:
        """Know what an evaluation of one sample has taken: passes that begin then tell their time left at once."""
        self.evaluation_s = evaluation_s

    def report_reuse(self, name: str) -> None:
        """Report a result that was found in the workspace."""

    def note(self, text: str) -> None:
        """Say something that the user has to know while it goes on."""

    def close(self) -> None:
        """Take down what is shown."""

    def _show(self, current: Pass) -> None:
        """A pass has come further."""


class PassingReporter(Reporter):
    """Passes everything on to another reporter; the base of those that add something."""

    def __init__(self, inner: Reporter) -> None:
        self.inner = inner

    @contextlib.contextmanager
    def on(self, name: str, description: str) -> Iterator[Pass]:
        with self.inner.on(name, description) as current:
            yield current

    @property
    def evaluation_s(self) -> float | None:  # type: ignore[override]  # the other one's
        return self.inner.evaluation_s

    def evaluated(self, count: int) -> None:
        self.inner.evaluated(count)

    def timed(self, evaluation_s: float) -> None:
        self.inner.timed(evaluation_s)

    def report_reuse(self, name: str) -> None:
        self.inner.report_reuse(name)

    def note(self, text: str) -> None:
        self.inner.note(text)

    def close(self) -> None:
        self.inner.close()


class QuietReporter(Reporter):
    """Notes on stderr, and nothing else: what `--quiet` leaves."""

    def note(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


class PulseReporter(QuietReporter):
    """Notes, and every half minute a line of how far the pass at work is: where stderr is no terminal."""

    _pulse: Pulse | None = None

    @contextlib.contextmanager
    def on(self, name: str, description: str) -> Iterator[Pass]:
        if self._pulse is None:
            self._pulse = Pulse(self._beat).__enter__()
        with super().on(name, description) as current:
            yield current

    def close(self) -> None:
        pulse, self._pulse = self._pulse, None
        if pulse is not None:
            pulse.__exit__(None, None, None)

    def _beat(self) -> None:
        if opened := self.open[-1:]:
            self._tell(opened[0])

    def _tell(self, current: Pass) -> None:
        self.note(current.text())


class LineReporter(PulseReporter):
    """A line per finished pass as well."""

    @contextlib.contextmanager
    def on(self, name: str, description: str) -> Iterator[Pass]:
        with super().on(name, description) as current:
            yield current
            facts = "".join(f", {value:g} {key.replace('_', ' ')}" for key, value in current.facts.items())
            self.note(f"{name}: {description} ({current.seconds:.1f} s{facts})")

    def report_reuse(self, name: str) -> None:
        self.note(f"{name}: from the workspace")


class JsonReporter(PulseReporter):
    """One JSON object a line on stderr.

    `{"event": "start", "name": …, "description": …}`; `{"event": "progress", "name": …, "done": 3, "total": 24,
    "seconds": …, "seconds_left": …}`, of parts of the pass, every half minute at least, with a total of null where
    nothing counts them, and with `workers` and `samples` where there are workers; `{"event": "pass", "name": …,
    "seconds": …}` with the pass's facts; `{"event": "reused", "name": …}`; `{"event": "note", "text": …}`.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        """quiet: notes alone."""
        self._quiet = quiet
        self._written = 0.0

    @contextlib.contextmanager
    def on(self, name: str, description: str) -> Iterator[Pass]:
        with super().on(name, description) as current:
            self._written = 0.0
            self._event(event="start", name=name, description=description)
            yield current
            self._event(event="pass", name=name, seconds=round(current.seconds, 3), **current.facts)

    def report_reuse(self, name: str) -> None:
        self._event(event="reused", name=name)

    def note(self, text: str) -> None:
        self._write(event="note", text=text)

    def _show(self, current: Pass) -> None:
        now, last = time.monotonic(), bool(current.total) and current.done >= current.total
        if last or now - self._written >= EVENT_INTERVAL_S:
            self._written = now
            self._tell(current)

    def _tell(self, current: Pass) -> None:
        left = current.seconds_left
        self._event(
            event="progress",
            name=current.name,
            done=current.done,
            total=current.total or None,
            seconds=round(current.seconds, 1),
            seconds_left=None if left is None else round(left, 1),
            **current.at_work,
        )

    def _event(self, **event: Any) -> None:
        if not self._quiet:
            self._write(**event)

    @staticmethod
    def _write(**event: Any) -> None:
        print(json.dumps(event), file=sys.stderr, flush=True)


class BarReporter(Reporter):
    """Bars with times left, on a terminal."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

        self._tasks: dict[Pass, TaskID] = {}
        self.console = Console(stderr=True)
        self.bars = Progress(
            TextColumn("{task.description:<34}", markup=False),
            BarColumn(),
            TextColumn("{task.fields[parts]}"),
            TimeElapsedColumn(),
            _left_column(),
            console=self.console,
        )
        self.bars.start()

    @contextlib.contextmanager
    def on(self, name: str, description: str) -> Iterator[Pass]:
        with super().on(name, description) as current:
            task = self.bars.add_task(f"{name}: {description}", total=1.0, parts="", current=current)
            self._tasks[current] = task
            yield current
        self.bars.update(self._tasks.pop(current), completed=1.0)

    def report_reuse(self, name: str) -> None:
        self.note(f"{name}: from the workspace")

    def note(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        self.bars.stop()

    def _show(self, current: Pass) -> None:
        parts = [f"{current.done}/{current.total}"] if current.total else []
        parts += [f"{value:g} {unit}" for unit, value in current.at_work.items()]
        self.bars.update(self._tasks[current], completed=current.share, parts=", ".join(parts))


def _left_column() -> Any:
    """A column with the time that a task's pass has left: rich's own knows of parts that are done only."""
    from rich.progress import ProgressColumn
    from rich.text import Text

    class Left(ProgressColumn):
        max_refresh = 0.5

        def render(self, task: Any) -> Text:
            left = None if task.finished else task.fields["current"].seconds_left
            return Text("" if task.finished else "–" if left is None else f"{time_text(left)} left")

    return Left()


def reporter_for(*, as_json: bool, verbose: bool, quiet: bool = False) -> Reporter:
    """The reporter of events with `as_json`, of a line per pass with `verbose`, of bars on a terminal, or of a line
    every half minute elsewhere; with `quiet` of notes alone.
    """
    if as_json:
        return JsonReporter(quiet=quiet)
    if quiet:
        return QuietReporter()
    if verbose:
        return LineReporter()
    return BarReporter() if sys.stderr.isatty() else PulseReporter()
