"""How a compile reports what it is doing: one callback per pass, a bar on stderr, or events as JSON lines."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

Advance = Callable[[int, int], None]
"""Called with (done, total)."""


class Reporter:
    """Silent; the base of the others."""

    @contextlib.contextmanager
    def on(self, name: str, description: str) -> Iterator[Advance]:
        """Report a pass while the context lasts; the value is called with (done, total)."""
        yield lambda done, total: None

    def close(self) -> None:
        """Take down what is shown."""


class JsonReporter(Reporter):
    """One JSON object a line on stderr: `{"event": "pass", "name": …, "seconds": …}`."""

    @contextlib.contextmanager
    def on(self, name: str, description: str) -> Iterator[Advance]:
        start = time.monotonic()
        self._write(event="start", name=name)
        yield lambda done, total: None
        self._write(event="pass", name=name, seconds=round(time.monotonic() - start, 3))

    @staticmethod
    def _write(**event: Any) -> None:
        print(json.dumps(event), file=sys.stderr, flush=True)


class BarReporter(Reporter):
    """Bars with times left on a terminal; one line per finished pass elsewhere."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        self.console = Console(stderr=True)
        self.bars = Progress(
            TextColumn("{task.description:<34}"), BarColumn(), TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TimeElapsedColumn(), TimeRemainingColumn(), console=self.console, disable=not self.console.is_terminal,
        )  # fmt: skip
        self.bars.start()

    @contextlib.contextmanager
    def on(self, name: str, description: str) -> Iterator[Advance]:
        task = self.bars.add_task(f"{name}: {description}", total=1)
        start = time.monotonic()
        yield lambda done, total: self.bars.update(task, completed=done, total=total)
        total = self.bars.tasks[task].total
        self.bars.update(task, completed=total)
        if not self.console.is_terminal:
            print(f"{name}: {description} ({time.monotonic() - start:.1f} s)", file=sys.stderr, flush=True)

    def close(self) -> None:
        self.bars.stop()
