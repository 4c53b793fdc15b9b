"""Pass `anchor`: an end-to-end objective → Schedule at an extreme low budget, where sums of edge errors mislead.

Optuna's TPE over the gaps between computed steps, seeded, with the graph's and the uniform schedule tried first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import optuna

Schedule = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class AnchorResult:
    """The best schedule of a search and its score, and how many trials and distinct schedules it took."""

    schedule: Schedule
    score: float
    trials: int
    evaluated: int
    schedules: tuple[Schedule, ...] = ()
    """The distinct schedules, in the order in which they came up."""


def schedule_from_gaps(gaps: Sequence[float], num_inference_steps: int) -> Schedule:
    """Steps whose distances are in proportion to `gaps` (B positive numbers, the last one up to T), as far as they can."""
    budget = len(gaps)
    shares = np.cumsum(gaps) / np.sum(gaps)
    spare = num_inference_steps - budget
    steps = np.arange(budget) + np.floor(np.concatenate([[0.0], shares[:-1]]) * spare + 0.5).astype(int)
    return tuple(int(step) for step in steps)


def gaps_from_schedule(schedule: Sequence[int], num_inference_steps: int) -> tuple[float, ...]:
    """Gaps in [0, 1] from which `schedule_from_gaps` gives the schedule again."""
    spare = np.diff([*schedule, num_inference_steps]) - 1.0
    return tuple((spare / max(1.0, spare.max())).tolist()) if spare.any() else (1.0,) * len(schedule)


def search_anchor(
    score: Callable[[Schedule], float],
    *,
    budget: int,
    num_inference_steps: int,
    starts: Sequence[Schedule],
    trials: int,
    seed: int,
    storage: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> AnchorResult:
    """Maximise `score(schedule)` over schedules of exactly `budget` steps, the first 0.

    Args:
        score: higher is better; called once per distinct schedule. NaN, of a schedule that diverged, counts as −inf.
        starts: schedules that are tried first.
        trials: number of trials, the starts included; a schedule that comes up again counts but is not scored again.
        seed: of the sampler.
        storage: an Optuna storage URL, where scored schedules are recorded. A resumed search replays them without
            scoring them again, so it ends as an undisturbed one does.

    Raises ValueError unless trials ≥ 1, and where no schedule has a score above −inf.
    """
    if trials < 1:
        raise ValueError(f"trials is {trials}: expected 1 or more")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    record = optuna.create_study(direction="maximize", storage=storage, study_name="anchor", load_if_exists=True)
    known = {
        tuple(trial.user_attrs["schedule"]): float(trial.value or 0.0)
        for trial in record.get_trials(deepcopy=False, states=[optuna.trial.TrialState.COMPLETE])
    }
    study = optuna.create_study(direction="maximize")
    space: dict[str, optuna.distributions.BaseDistribution] = {
        f"gap_{k}": optuna.distributions.FloatDistribution(0.0, 1.0) for k in range(budget)
    }
    tried: dict[Schedule, float] = {}
    for number in range(trials):
        study.sampler = _sampler(seed, number)
        if number < len(starts):
            gaps = gaps_from_schedule(starts[number], num_inference_steps)
            study.enqueue_trial({f"gap_{k}": float(gap) for k, gap in enumerate(gaps)})
        trial = study.ask(space)
        schedule = schedule_from_gaps([max(trial.params[name], 1e-9) for name in space], num_inference_steps)
        if schedule not in known:
            found = float(score(schedule))
            known[schedule] = -math.inf if math.isnan(found) else found
            record.add_trial(
                optuna.trial.create_trial(
                    params=trial.params,
                    distributions=space,
                    value=known[schedule],
                    user_attrs={"schedule": list(schedule)},
                )
            )
        tried[schedule] = known[schedule]
        study.tell(trial, known[schedule])
        if progress:
            progress(number + 1, trials)
    best = max(tried, key=lambda schedule: (tried[schedule], [-step for step in schedule]))
    if tried[best] == -math.inf:
        raise ValueError(
            f"anchor search: none of {len(tried)} schedules of {budget} steps has a finite score; expected at least one: "
            "raise the anchor budget"
        )
    return AnchorResult(schedule=best, score=tried[best], trials=trials, evaluated=len(tried), schedules=tuple(tried))


def _sampler(seed: int, number: int) -> optuna.samplers.TPESampler:
    return optuna.samplers.TPESampler(seed=seed * 100_003 + number, multivariate=True, n_startup_trials=8)
