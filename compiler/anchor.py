"""Pass `anchor`: an end-to-end objective → Schedule at an extreme low budget, where sums of edge errors mislead.

Optuna's TPE over the gaps between computed steps, seeded, with the graph's and the uniform schedule tried first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import optuna

Schedule = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class AnchorResult:
    """The best schedule of a search, its score, and how many trials and distinct schedules it took."""

    schedule: Schedule
    score: float
    trials: int
    evaluated: int


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
        score: higher is better; called once per distinct schedule.
        starts: schedules that are tried first.
        trials: number of trials, the starts included; a schedule that comes up again counts but is not scored again.
        seed: of the sampler. Each trial draws from its own stream, so a resumed search continues as an undisturbed one.
        storage: an Optuna storage URL; trials that are finished there are kept.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        direction="maximize", storage=storage, study_name="anchor", load_if_exists=True, sampler=_sampler(seed, 0)
    )
    known: dict[Schedule, float] = {}
    for trial in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,)):
        known[tuple(trial.user_attrs["schedule"])] = float(trial.value or 0.0)
    finished = len(study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,)))
    space = {f"gap_{k}": optuna.distributions.FloatDistribution(0.0, 1.0) for k in range(budget)}
    for number in range(finished, trials):
        study.sampler = _sampler(seed, number)
        if number < len(starts):
            gaps = gaps_from_schedule(starts[number], num_inference_steps)
            study.enqueue_trial({f"gap_{k}": float(gap) for k, gap in enumerate(gaps)})
        trial = study.ask(space)
        gaps = tuple(max(trial.params[f"gap_{k}"], 1e-9) for k in range(budget))
        schedule = schedule_from_gaps(gaps, num_inference_steps)
        if schedule not in known:
            known[schedule] = float(score(schedule))
        trial.set_user_attr("schedule", list(schedule))
        study.tell(trial, known[schedule])
        if progress:
            progress(number + 1, trials)
    best = max(known, key=lambda schedule: (known[schedule], [-step for step in schedule]))
    return AnchorResult(schedule=best, score=known[best], trials=max(trials, finished), evaluated=len(known))


def _sampler(seed: int, number: int) -> optuna.samplers.TPESampler:
    return optuna.samplers.TPESampler(seed=seed * 100_003 + number, multivariate=True, n_startup_trials=8)
