"""A quality that is asked for, such as `worst psnr>=30`, as a value, and held against what an artifact measured.

A compile takes it with `--target`, a request with `--quality`, which also takes a tier of `TIERS` by its name. Figures
are those of `structure.Quality`: fidelity to the full run on prompts that calibration has not seen.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from .errors import UsageError
from .messages import one_line
from .structure import FULL, BudgetProgram, Quality, Statistic

Metric = Literal["psnr", "ssim", "lpips"]
Over = Literal["mean", "worst"]
TIERS: Mapping[str, str] = {"draft": "psnr>=25", "good": "psnr>=30", "high": "psnr>=40", "best": "psnr>=50"}
"""Names for targets, the lowest first. 30 to 50 dB is what lossy codecs of 8-bit pictures come to; 58.9 dB is what
rounding a picture to 8 bits costs."""
LIMITS: Mapping[Metric, tuple[float, float]] = {"psnr": (0.0, 100.0), "ssim": (-1.0, 1.0), "lpips": (0.0, 10.0)}
"""Bounds that a target may have; decibels of identical pictures count as 100."""
UNITS: Mapping[Metric, str] = {"psnr": " dB", "ssim": "", "lpips": ""}
_CONDITION = re.compile(r"(?:(mean|worst)\s+)?(psnr|ssim|lpips)\s*(>=|<=)\s*([0-9]*\.?[0-9]+)")
Measured = Callable[[Metric, Over], float | None]
"""A figure of some program on the held-out prompts; None where it was not measured."""


@dataclass(frozen=True)
class Condition:
    """A bound on the mean over prompts of a metric, or on the worst prompt."""

    metric: Metric
    over: Over
    bound: float

    @property
    def text(self) -> str:
        """As it is written: `psnr>=35`, `worst lpips<=0.1`."""
        sign = "<=" if self.metric == "lpips" else ">="
        return f"{'worst ' if self.over == 'worst' else ''}{self.metric}{sign}{self.bound:g}"

    def holds(self, measured: Measured) -> bool:
        """Whether it was measured to hold."""
        value = measured(self.metric, self.over)
        if value is None:
            return False
        return value <= self.bound if self.metric == "lpips" else value >= self.bound

    def describe(self, measured: Measured) -> str:
        """`36.12 dB`, or with the worst prompt `worst 31.07 dB`."""
        value = measured(self.metric, self.over)
        number = "not measured" if value is None else f"{value:.{2 if self.metric == 'psnr' else 4}f}"
        return f"{'worst ' if self.over == 'worst' else ''}{number}{'' if value is None else UNITS[self.metric]}"


@dataclass(frozen=True)
class Target:
    """Conditions that all have to hold."""

    conditions: tuple[Condition, ...]

    @property
    def text(self) -> str:
        """As it is written: `psnr>=35, worst psnr>=30`."""
        return ", ".join(condition.text for condition in self.conditions)

    @property
    def metrics(self) -> frozenset[Metric]:
        """What has to be measured."""
        return frozenset(condition.metric for condition in self.conditions)

    def holds(self, measured: Measured) -> bool:
        """Whether it was measured to hold."""
        return all(condition.holds(measured) for condition in self.conditions)

    def describe(self, measured: Measured) -> str:
        """What was measured, in the order of the conditions."""
        return ", ".join(condition.describe(measured) for condition in self.conditions)


def is_target(text: str) -> bool:
    """Whether a text is meant as a target, rather than as a name."""
    return "<" in text or ">" in text or "=" in text


def parse_target(text: str, subject: str) -> Target:
    """The conditions that a text lists, separated by commas. Raises UsageError; `subject` is what gave it.

    >>> parse_target("psnr >= 35, worst ssim>=0.98", "--target").text
    'psnr>=35, worst ssim>=0.98'
    """
    return Target(tuple(_condition(part.strip(), text, subject) for part in text.split(",")))


def _condition(part: str, text: str, subject: str) -> Condition:
    found = _CONDITION.fullmatch(part)
    wanted = "expected conditions such as psnr>=35, worst ssim>=0.98 or lpips<=0.1, separated by commas"
    if found is None:
        raise UsageError(f"{subject} is {one_line(repr(text), 80)}: {wanted}")
    over, metric, sign, bound = found.groups()
    name: Metric = next(each for each in get_args(Metric) if each == metric)
    if sign != ("<=" if name == "lpips" else ">="):
        raise UsageError(f"{subject} has {part!r}: {wanted} (of psnr and ssim more is better, of lpips less)")
    low, high = LIMITS[name]
    if not low <= float(bound) <= high:
        raise UsageError(f"{subject} has {part!r}: expected a bound from {low:g} to {high:g}")
    return Condition(name, "worst" if over == "worst" else "mean", float(bound))


def target_of_quality(text: str, subject: str) -> Target:
    """The target of a tier's name, or that the text itself is. Raises UsageError."""
    if text in TIERS:
        return parse_target(TIERS[text], subject)
    if not is_target(text):
        raise UsageError(
            f"{subject} is {one_line(repr(text), 80)}: expected one of {', '.join(TIERS)}, or a target such as psnr>=35"
        )
    return parse_target(text, subject)


def measured_of(quality: Quality | None) -> Measured:
    """The figures of a manifest, which holds no LPIPS."""

    def figure(metric: Metric, over: Over) -> float | None:
        found: Mapping[str, Statistic] = {} if quality is None else {"psnr": quality.psnr_db, "ssim": quality.ssim}
        return getattr(found[metric], over) if metric in found else None

    return figure


def smallest_program(programs: Iterable[BudgetProgram], target: Target) -> BudgetProgram | None:
    """The program of the smallest budget that was measured to reach a target; None where none was."""
    measured = [entry for entry in programs if entry.budget != FULL and target.holds(measured_of(entry.quality))]
    return min(measured, key=lambda entry: int(entry.budget), default=None)


def tiers_of(programs: Iterable[BudgetProgram]) -> dict[str, BudgetProgram | None]:
    """Of every tier the program that is served, None for the full sampler, by its name."""
    listed = list(programs)
    return {name: smallest_program(listed, target_of_quality(name, "tier")) for name in TIERS}
