"""Pass `anchor`: an end-to-end objective → Schedule at an extreme low budget, where sums of edge errors mislead.

Optuna's TPE over the gaps between computed steps, seeded, with the graph's and the uniform schedule tried first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import optuna

from ..calibration.fit import Stop, Stopped

Schedule = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class AnchorResult:
    """The best schedule of a search and its score, and how many trials and distinct schedules it took."""

    schedule: Schedule
    score: float
    trials: int
    evaluated: int
    schedules: tuple[Schedule, ...] = ()
    """The distinct schedules that were scored, in the order in which they came up."""
    pruned: tuple[tuple[Schedule, int], ...] = ()
    """Those that were given up, each with the number of its steps that were computed."""


def schedule_from_gaps(gaps: Sequence[float], num_inference_steps: int) -> Schedule:
    """Steps whose distances are in proportion to `gaps` (B positive numbers, the last one up to T), as far as
    they can.
    """
    budget = len(gaps)
    shares = np.cumsum(gaps) / np.sum(gaps)
    spare = num_inference_steps - budget
    steps = np.arange(budget) + np.floor(np.concatenate([[0.0], shares[:-1]]) * spare + 0.5).astype(int)
    return tuple(int(step) for step in steps)


def gaps_from_schedule(schedule: Sequence[int], num_inference_steps: int) -> tuple[float, ...]:
    """Gaps in [0, 1] from which `schedule_from_gaps` gives the schedule again."""
    spare = np.diff([*schedule, num_inference_steps]) - 1.0
    return tuple((spare / max(1.0, spare.max())).tolist()) if spare.any() else (1.0,) * len(schedule)


@dataclass(frozen=True)
class _Outcome:
    """What a schedule came to: its score, None where it was given up; and how far it had drifted at each step."""

    score: float | None
    drifts: tuple[float, ...]


class DriftPruner(optuna.pruners.BasePruner):
    """Gives a trial up once it has drifted further than the best one ever did. Intermediate values are −drift."""

    def prune(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> bool:
        """See Optuna's."""
        complete = study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.COMPLETE])
        if not complete or not trial.intermediate_values:
            return False
        best = max(complete, key=lambda each: each.value if each.value is not None else -math.inf)
        floor = min(best.intermediate_values.values(), default=-math.inf)
        return trial.intermediate_values[max(trial.intermediate_values)] < floor


Score = Callable[[Schedule, Stop], tuple[float, Sequence[float]]]
"""(schedule, whether to give it up) → its score, higher is better, and how far it drifted at each step, if that is
known. May raise Stopped.
"""


def search_anchor(
    score: Score,
    *,
    budget: int,
    num_inference_steps: int,
    starts: Sequence[Schedule],
    trials: int,
    seed: int,
    storage: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> AnchorResult:
    """Maximise a score over schedules of exactly `budget` steps, the first 0.

    Args:
        score: called once per distinct schedule. NaN, of a schedule that diverged, counts as −inf.
        budget: steps of a schedule.
        num_inference_steps: T.
        starts: schedules that are tried first.
        trials: number of trials, the starts included; a schedule that comes up again counts but is not scored again.
        seed: of the sampler.
        storage: an Optuna storage URL, where scored schedules are recorded. A resumed search replays them without
            scoring them again, so it ends as an undisturbed one does.
        progress: told (trials that are done, trials).

    Raises ValueError unless trials ≥ 1, and where no schedule has a score above −inf.
    """
    if trials < 1:
        raise ValueError(f"trials is {trials}: expected 1 or more")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    record = optuna.create_study(direction="maximize", storage=storage, study_name="anchor", load_if_exists=True)
    known = _read_record(record)
    study = optuna.create_study(direction="maximize", pruner=DriftPruner())
    space: dict[str, optuna.distributions.BaseDistribution] = {
        f"gap_{k}": optuna.distributions.FloatDistribution(0.0, 1.0) for k in range(budget)
    }
    tried: dict[Schedule, _Outcome] = {}
    for number in range(trials):
        study.sampler = _sampler(seed, number)
        if number < len(starts):
            gaps = gaps_from_schedule(starts[number], num_inference_steps)
            study.enqueue_trial({f"gap_{k}": float(gap) for k, gap in enumerate(gaps)})
        trial = study.ask(space)
        schedule = schedule_from_gaps([max(trial.params[name], 1e-9) for name in space], num_inference_steps)
        reported = 0
        if schedule not in known:
            known[schedule], reported = _try(score, schedule, trial)
            _record(record, trial, space, schedule, known[schedule])
        tried[schedule] = known[schedule]
        _tell(study, trial, known[schedule], reported)
        if progress:
            progress(number + 1, trials)
    return _result(tried, budget, trials)


def _result(tried: dict[Schedule, _Outcome], budget: int, trials: int) -> AnchorResult:
    """The best of what was tried; ValueError where nothing has a score above −inf."""
    scored = {schedule: outcome.score for schedule, outcome in tried.items() if outcome.score is not None}
    best = max(scored, key=lambda schedule: (scored[schedule], [-step for step in schedule]))
    if scored[best] == -math.inf:
        raise ValueError(
            f"anchor search: none of {len(scored)} schedules of {budget} steps has a finite score; expected at least "
            "one: raise the anchor budget"
        )
    pruned = tuple((each, len(outcome.drifts)) for each, outcome in tried.items() if outcome.score is None)
    return AnchorResult(
        schedule=best,
        score=scored[best],
        trials=trials,
        evaluated=len(tried),
        schedules=tuple(scored),
        pruned=pruned,
    )


def _try(score: Score, schedule: Schedule, trial: optuna.Trial) -> tuple[_Outcome, int]:
    """Score a schedule, unless it drifts too far; and how many drifts the trial was told of meanwhile."""
    drifts: list[float] = []

    def stop(position: int, drift: float) -> bool:
        drifts.append(drift)
        trial.report(-drift, position)
        return trial.should_prune()

    try:
        found, seen = score(schedule, stop)
    except Stopped:
        return _Outcome(None, tuple(drifts)), len(drifts)
    return _Outcome(-math.inf if math.isnan(found) else float(found), tuple(seen)), len(drifts)


def _tell(study: optuna.Study, trial: optuna.Trial, outcome: _Outcome, reported: int) -> None:
    """Tell the study of an outcome, and of the drifts after the first `reported`, which the trial has heard of."""
    for position, drift in list(enumerate(outcome.drifts))[reported:]:
        trial.report(-drift, position)
    if outcome.score is None:
        study.tell(trial, state=optuna.trial.TrialState.PRUNED)
    else:
        study.tell(trial, outcome.score)


def _record(
    record: optuna.Study,
    trial: optuna.Trial,
    space: dict[str, optuna.distributions.BaseDistribution],
    schedule: Schedule,
    outcome: _Outcome,
) -> None:
    """Keep what a schedule came to where a resumed search finds it."""
    states = optuna.trial.TrialState
    record.add_trial(
        optuna.trial.create_trial(
            state=states.PRUNED if outcome.score is None else states.COMPLETE,
            params=trial.params,
            distributions=space,
            value=outcome.score,
            user_attrs={"schedule": list(schedule), "drifts": list(outcome.drifts)},
        )
    )


def _read_record(record: optuna.Study) -> dict[Schedule, _Outcome]:
    """What `_record` has kept."""
    states = optuna.trial.TrialState
    return {
        tuple(trial.user_attrs["schedule"]): _Outcome(
            None if trial.state is states.PRUNED else float(trial.value or 0.0), tuple(trial.user_attrs["drifts"])
        )
        for trial in record.get_trials(deepcopy=False, states=[states.COMPLETE, states.PRUNED])
    }


def _sampler(seed: int, number: int) -> optuna.samplers.TPESampler:
    return optuna.samplers.TPESampler(seed=seed * 100_003 + number, multivariate=True, n_startup_trials=8)
