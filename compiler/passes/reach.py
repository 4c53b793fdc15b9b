"""Pass `target`: a quality that is asked for → the smallest budget whose program reaches it on held-out prompts.

Budgets double from the anchor's until one reaches the target, and are halved between the last that missed and the first
that reached: the budget that is taken reaches it, and one evaluation less was measured as well and misses. Every budget
that is tried is searched like one that was asked for, and what the tries have in common is computed once.

The target is read off the prompts that the artifact's quality is measured on. Where several budgets come close to it,
the one that is taken is so by these prompts' luck as well: other prompts may fall short of it by a little.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from otcache.schemas.errors import ModelError
from otcache.schemas.targets import Condition, Measured, Metric, Over, Target

from ..calibration import metrics
from ..calibration.samples import Samples
from ..schedules.search import FIT, Found
from ..workspace.progress import Pass, Reporter
from .evaluate import held_out_samples, outcome_of
from .prepare import Prepared

Find = Callable[[Sequence[int], Reporter], Found]
"""The searches' result for some budgets alone."""
ARRAYS: dict[Metric, str] = {"psnr": "psnr_db", "ssim": "ssim", "lpips": "lpips"}
"""Of `outcomes.outcome_arrays`."""
HELD_OUT = "target"
"""Of `Found.costs`: what tries take on held-out prompts."""


@dataclass(kw_only=True)
class Tries:
    """Budgets that were searched and measured."""

    prepared: Prepared
    find: Find
    samples: Samples
    """The held-out ones."""
    known: dict[int, Found] = field(default_factory=dict)
    """What the searches came to, by budget, in the order of the tries."""
    measured: dict[int, dict[str, np.ndarray]] = field(default_factory=dict)
    evaluations: int = 0
    """On held-out prompts, that were made now."""

    def measure(self, budget: int, reporter: Reporter) -> Measured:
        """Figures of a budget's program on the held-out prompts."""
        if budget not in self.measured:
            if budget not in self.known:
                self.known[budget] = self.find([budget], reporter)
            program = self.known[budget].trials[budget][0].program
            self.measured[budget], made = outcome_of(self.prepared, self.samples, budget, program)
            self.evaluations += made
        return figures(self.measured[budget])


def reach(prepared: Prepared, targets: Sequence[Target], find: Find, given: Found | None) -> Found:
    """What the searches came to at the budgets that reach the targets, and at those that were given.

    Args:
        prepared: the model with its calibration set.
        targets: one budget is found for each; several may have the same.
        find: searches some budgets alone.
        given: what the searches came to at budgets that were asked for by number; None where there are none.

    Raises ModelError where no budget below the full number of evaluations reaches a target.
    """
    session = prepared.session
    tries = Tries(prepared=prepared, find=find, samples=held_out_samples(prepared))
    if given is not None:
        tries.known = dict.fromkeys(given.trials, given)
    else:
        start = _first(prepared)
        tries.known[start] = find([start], session.reporter)
    reached = [_reach_one(target, tries) for target in targets]
    return _joined(tries, given, sorted({*reached, *(given.trials if given else ())}))


def _reach_one(target: Target, tries: Tries) -> int:
    """The smallest budget that reaches a target."""
    session, most = tries.prepared.session, tries.prepared.table.num_inference_steps - 1
    ledger = tries.prepared.calibration.ledger
    before, asked = ledger.computed + tries.evaluations, dict[int, Measured]()
    with session.reporter.on("target", target.text) as current:

        def reaches(budget: int) -> bool:
            asked[budget] = tries.measure(budget, Reporter())
            current(len(asked), len(asked) + 1)
            return target.holds(asked[budget])

        found = smallest(reaches, _first(tries.prepared), most)
        made = ledger.computed + tries.evaluations - before
        _tell(current, found, asked, made)
    listed = "; ".join(f"{budget}: {target.describe(asked[budget])}" for budget in sorted(asked))
    if found is None:
        raise ModelError(
            f"target {target.text} is not reached within {most} evaluations, of {most + 1} that the full run makes: "
            f"the best was {'; '.join(_best(condition, asked) for condition in target.conditions)}: ask for less, or "
            "serve budget full"
        )
    session.reporter.note(
        f"target {target.text}: budget {found} ({target.describe(asked[found])}); tried {listed}; {made:,} model "
        "evaluations, beside what the workspace knew"
    )
    return found


def _tell(current: Pass, found: int | None, asked: dict[int, Measured], made: int) -> None:
    """What the pass came to, as numbers."""
    current.facts["evaluations"] = made
    current.facts["budgets_tried"] = len(asked)
    if found is not None:
        current.facts["budget"] = found


def smallest(reaches: Callable[[int], bool], start: int, most: int) -> int | None:
    """The smallest of 1 … `most` that reaches something, where all above it do; None where `most` does not.

    It doubles from `start` on, and halves what is left between.

    >>> tried = []
    >>> smallest(lambda budget: tried.append(budget) or budget >= 11, 4, 49), tried
    (11, [4, 8, 16, 12, 10, 11])
    """
    missed, tried = 0, min(start, most)
    while not reaches(tried):
        if tried == most:
            return None
        missed, tried = tried, min(2 * tried, most)
    while tried - missed > 1:
        middle = (missed + tried) // 2
        if reaches(middle):
            tried = middle
        else:
            missed = middle
    return tried


def figures(outcome: dict[str, np.ndarray]) -> Measured:
    """Means and worst prompts of what a program came to."""

    def figure(metric: Metric, over: Over) -> float | None:
        if ARRAYS[metric] not in outcome:
            return None
        values = metrics.Quality.from_values(outcome[ARRAYS[metric]], higher_is_better=metric != "lpips")
        return values.worst if over == "worst" else values.mean

    return figure


def _best(condition: Condition, asked: dict[int, Measured]) -> str:
    """`57.61 dB at 49 evaluations`, or of a worst prompt."""
    values = {budget: measured(condition.metric, condition.over) for budget, measured in asked.items()}
    known = {budget: value for budget, value in values.items() if value is not None}
    best = (min if condition.metric == "lpips" else max)(known, key=lambda budget: known[budget])
    return f"{condition.metric} {condition.describe(asked[best])} at {best} evaluations"


def _first(prepared: Prepared) -> int:
    """The budget that is tried first."""
    return min(prepared.session.options.anchor, prepared.table.num_inference_steps - 1)


def _joined(tries: Tries, given: Found | None, budgets: Sequence[int]) -> Found:
    """One result of all tries, with the trials of `budgets` alone and what everything has cost.

    Residuals, reference and anchor are the same in every try, and are charged once.
    """
    first = given or next(iter(tries.known.values()))
    extra = [found for found in tries.known.values() if found is not first]
    per_run = tries.prepared.table.num_inference_steps * tries.prepared.calibration.count
    programs = [found.trials[budget][0].program for budget, found in tries.known.items() if budget not in budgets]
    costs = dict(first.costs)
    costs[FIT] += sum(found.costs[FIT] for found in extra)
    costs[HELD_OUT] = sum(program.nfe for program in programs) * tries.samples.count / per_run
    trials = {budget: tries.known[budget].trials[budget] for budget in budgets}
    return replace(first, trials=trials, costs=costs)
