"""ZEUS (arXiv 2604.01552): skipped outputs extrapolated by one backward difference, or held, in turns.

As published (its released `zeus/solver.py`, the part for flows, and the paper's abstract, whose text was not at hand):
the outputs of a run of skipped steps are, in turns, 2 v − u and v, of the newest computed output v and the one computed
before it, u, however far apart they are; a run ends after `longest` steps; every step is computed before `start` and
from `end` on; between them one of `period` is, and from `tail` on one of `tail_period`. The settings of its
demonstrations are candidates at their budgets.

Chosen here: settings for every other budget, all that give it being ranked by their error along the recorded full runs
and the best rolled out on calibration samples; `start` below the release's least, 3, where few evaluations are asked
for. The U-Net solvers' Lagrange interpolation of x_0 is not part of the release for flows and is left out.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .l2p import output_gram
from .method import Bench, Built, NotApplicable, ProgramMethod, choose_program, schedule_text
from .output_forecasts import full_run_jumps, open_loop_error, program_from_rows

RELEASED_STEPS = 50
ROLLED_OUT = 24
"""Of the settings at most."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a user of the release sets; steps are indices."""

    start: int
    """The first step after which one may be skipped (`acc_range`)."""
    end: int
    """The step from which on none is."""
    period: int
    """One step in so many is computed (`denominator`, with all other remainders but the last in `modular`)."""
    tail: int | None = None
    """The step from which on another period holds (`lagrange_step`)."""
    tail_period: int | None = None
    """`lagrange_int`."""
    longest: int = 4
    """Steps that are skipped in a run at most (`max_interval`)."""


DEMONSTRATIONS = (
    Setting(start=10, end=45, period=3, tail=24, tail_period=6),
    Setting(start=8, end=47, period=3, tail=24, tail_period=4, longest=6),
    Setting(start=10, end=45, period=3, tail=24, tail_period=4, longest=6),
    Setting(start=10, end=45, period=3, tail=24, tail_period=4),
    Setting(start=8, end=47, period=3, tail=24, tail_period=6, longest=6),
)
"""Of the release, for FLUX, Wan, Stable Diffusion, its XL form and CogVideoX, 50 steps."""


def zeus_schedule(setting: Setting, num_inference_steps: int) -> tuple[int, ...]:
    """The computed steps of a setting: the released loop, which decides after each step whether to skip the next.

    >>> zeus_schedule(Setting(start=3, end=9, period=3), 12)
    (0, 1, 2, 3, 6, 9, 10, 11)
    """
    computed, run, skip = [], 0, False
    tail = setting.end if setting.tail is None else setting.tail
    for step in range(num_inference_steps):
        if not skip:
            computed.append(step)
        if run >= setting.longest:
            skip = False
        elif setting.start <= step < min(tail, setting.end):
            skip = step % setting.period != setting.period - 1
        elif setting.tail_period is not None and tail <= step < setting.end:
            skip = step % setting.tail_period != 0
        else:
            skip = False
        run = run + 1 if skip else 0
    return tuple(computed)


def zeus_rows(schedule: Sequence[int], num_inference_steps: int) -> np.ndarray:
    """Rows (T, B): 2 v − u and v in turns between computed steps; v alone where there is no u yet."""
    rows = np.zeros((num_inference_steps, len(schedule)))
    ends = [*schedule[1:], num_inference_steps]
    for position, (start, end) in enumerate(zip(schedule, ends, strict=True)):
        rows[start:end, position] = 1.0
        if position:
            rows[start + 1 : end : 2, position] = 2.0
            rows[start + 1 : end : 2, position - 1] = -1.0
    return rows


def zeus_settings(budget: int, num_inference_steps: int) -> dict[tuple[int, ...], Setting]:
    """One setting for every schedule of `budget` steps, those of the demonstrations first."""
    total = num_inference_steps
    released = DEMONSTRATIONS if total == RELEASED_STEPS else ()
    starts = sorted({*range(11), budget - 1})
    grid = (
        Setting(start=start, end=end, period=period, tail=tail, tail_period=tail_period, longest=longest)
        for start, end, period, longest in itertools.product(
            starts,
            sorted({round(0.9 * total), round(0.94 * total), total}),
            range(2, total),
            (4, 6, total),
        )
        if start < end and start < budget
        for tail, tail_period in [(None, None), *((round(0.48 * total), p) for p in (4, 6, 8, 12) if period < p)]
    )
    found: dict[tuple[int, ...], Setting] = {}
    for setting in itertools.chain(released, grid):
        schedule = zeus_schedule(setting, total)
        if len(schedule) == budget:
            found.setdefault(schedule, setting)
    return found


def _text(setting: Setting) -> str:
    tail = "" if setting.tail is None else f", from {setting.tail} {setting.tail_period}"
    return f"steps {setting.start}–{setting.end}, period {setting.period}{tail}, at most {setting.longest} in a run"


def _build(bench: Bench, budget: int) -> Built:
    table, total = bench.table, bench.table.num_inference_steps
    found = zeus_settings(budget, total)
    if not found:
        raise NotApplicable(f"no setting of ZEUS's gives {budget} evaluations of {total}")
    gram, jumps = output_gram(bench), full_run_jumps(table)
    rows = {schedule: zeus_rows(schedule, total) for schedule in found}
    errors = {schedule: open_loop_error(jumps, gram, schedule, rows[schedule]) for schedule in found}
    demonstrated = [schedule for schedule, setting in found.items() if setting in DEMONSTRATIONS]
    ranked = [*demonstrated, *(each for each in sorted(found, key=errors.__getitem__) if each not in demonstrated)]
    candidates = [
        Built(
            program=program_from_rows(table, schedule, rows[schedule]),
            setting=f"{_text(found[schedule])}: {schedule_text(schedule)}",
        )
        for schedule in ranked[:ROLLED_OUT]
    ]
    return choose_program(bench, candidates)


PUBLISHED = (16, 50)
"""The paper's highest speed-up, 3.2; the release's demonstrations compute 21 steps and more."""

METHODS = (ProgramMethod(name="zeus", group="cache", source="arXiv 2604.01552", build=_build, published=PUBLISHED),)
