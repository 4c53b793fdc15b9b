"""Timings as tables for people: one row for each part, one column for each request."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from rich.table import Table

from ..loop.timing import PARTS, StepTiming, Timing


def parts_table(timings: Mapping[str, Timing], load_s: float) -> Table:
    """Milliseconds of every part that takes any, by budget."""
    table = Table(title="Time by part, ms", title_justify="left", box=None)
    table.add_column("part")
    for name in timings:
        table.add_column(f"budget {name}", justify="right")
    table.add_row("load", *(_ms(load_s) if index == 0 else "" for index in range(len(timings))))
    for part in PARTS:
        if any(timing.parts[part] > 0 for timing in timings.values()):
            table.add_row(part, *(_ms(timing.parts[part]) for timing in timings.values()))
    table.add_row("total", *(_ms(timing.total_s) for timing in timings.values()))
    return table


def steps_table(timings: Mapping[str, Timing]) -> Table:
    """Median milliseconds of a step, by budget and by whether its blocks were computed."""
    table = Table(title="Median step, ms", title_justify="left", box=None)
    names = ("embed", "blocks", "forecast", "head", "overhead")
    for heading in ("budget", "steps", "count", *names, "total"):
        table.add_column(heading, justify="left" if heading == "steps" else "right")
    for budget, timing in timings.items():
        for compute, kind in ((True, "computed"), (False, "cached")):
            if steps := [step for step in timing.steps if step.compute == compute]:
                total = _ms(statistics.median(step.total_s for step in steps))
                table.add_row(budget, kind, str(len(steps)), *(_ms(_median(steps, name)) for name in names), total)
    return table


def _median(steps: Sequence[StepTiming], part: str) -> float:
    return statistics.median(step.parts.get(part, 0.0) for step in steps)


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.2f}"
