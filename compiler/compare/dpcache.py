"""DPCache (arXiv 2602.22654): the blocks' output forecast by a Taylor polynomial, at steps that are planned.

As published (its released `dpcache/cali_utils.py` and `schedule_utils.py`, read in a copy of the repository, and the
abstract and notes of the paper, whose text was not at hand): an edge from step i to j, with the step a computed before
i, costs the sum of the mean absolute errors of TaylorSeer's forecast at every step up to j, made of the full run's
features at i, a and the steps right before a; beyond the last step stands a forecast of the features, smoothed with
their mean; the features are the last block's output; a path of exactly B steps is planned that begins with the first
three; no edge spans more than 0.3 of the steps; the forecast is of the second order.

Chosen here: the path is the best one over pairs of steps, where the release remembers one way to each step and may miss
it; fewer first steps, edges of any length and the first order are tried too, on calibration samples, of which the
published settings are a part (few evaluations leave no path under them). Of a sample's features a fixed choice is
weighed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ..calibration.batch import Batch
from ..calibration.rollout import take_positions
from ..calibration.samples import Rows
from ..programs.solver_table import SolverTable, program_from_table
from ..programs.update import apply_step
from ..schedules.reference import LONGEST_PAIR_TIMELINE, Power, shortest_schedule
from .method import Bench, Built, NotApplicable, ProgramMethod, choose_program, schedule_text
from .residual_forecasts import forecast_program, taylorseer_coefs
from .spectrum import FeatureModel

ORDERS = (2, 1)
"""Of the forecast; 2 as published."""
FIRST_STEPS = (3, 2, 1)
"""Computed in any case; 3 as published."""
LONGEST = 0.3
"""Part of all steps that an edge spans at most, as released."""
SMOOTHING = 0.8
"""Weight of the forecast beyond the last step against the mean of the last features, as released."""
ELEMENTS = 1 << 13
"""Of a sample's features that are weighed at most."""


def edge_errors(features: np.ndarray, order: int) -> np.ndarray:
    """Costs float64 (T, T, T+1) of edges i → j after a step a, from one sample's features (T, d); inf where there are
    none. Entry (0, 0, j) is the first edge's.
    """
    total = len(features)
    beyond = features[-(order + 1) :]
    forecast = np.asarray(taylorseer_coefs(range(len(beyond)), len(beyond), order)) @ beyond
    targets = np.concatenate([features, SMOOTHING * forecast[None] + (1 - SMOOTHING) * beyond.mean(axis=0)[None]])
    errors = np.full((total, total, total + 1), np.inf)
    for start in range(total):
        for before in range(start) if start else (0,):
            nodes = [*range(max(0, before - order + 1), before + 1), start] if start else [0]
            ends = range(start + 1, total + 1)
            weights = np.array([taylorseer_coefs(nodes, end, order) for end in ends], dtype=features.dtype)
            missed = weights @ features[nodes[-weights.shape[1] :]] - targets[start + 1 :]
            errors[before, start, start + 1 :] = np.cumsum(np.abs(missed).mean(axis=1, dtype=np.float64))
    return errors


def feature_costs(table: SolverTable) -> Callable[[Batch], Rows]:
    """For a batch: `edge_errors` (m, T, T, T+1) of each sample's full run, which is made once more, by the order."""
    program = program_from_table(table, payload="residual")

    @torch.no_grad()
    def answer(batch: Batch) -> Rows:
        assert batch.evaluator.stages is not None
        model = FeatureModel(batch.evaluator.stages, batch.denoiser)
        model.keep = 1
        latents, outputs, kept = batch.latents(0), list[Tensor](), list[np.ndarray]()
        branches = batch.denoiser.interface.branches
        for step in program.steps:
            outputs = [*outputs, model(latents, step)][-program.output_memory :]
            latents = apply_step(step, latents, outputs)
            rows = [
                take_positions(value).unflatten(0, (branches, batch.count)).transpose(0, 1).flatten(1).float().cpu()
                for value in model.residuals[-1].values()
            ]
            features = torch.cat(rows, dim=1).numpy()
            size = features.shape[1]
            chosen = np.sort(np.random.default_rng(0).choice(size, min(size, ELEMENTS), replace=False))
            kept.append(features[:, chosen])
        trajectories = np.stack(kept, axis=1)
        return {str(order): np.stack([edge_errors(each, order) for each in trajectories]) for order in ORDERS}

    return answer


def planned_schedule(costs: np.ndarray, budget: int, first_steps: int, longest: float) -> tuple[int, ...]:
    """The `budget` steps whose edges cost least in all. Raises ValueError where no path is left.

    Args:
        costs: (T, T, T+1), as `edge_errors`.
        budget: steps.
        first_steps: so many are computed in any case.
        longest: part of T that an edge spans at most.
    """
    total = costs.shape[0]
    steps = np.arange(total)
    ends = np.arange(total + 1)
    closed = (ends[None, :] - steps[:, None] > max(1, int(longest * total))) | (
        (steps[:, None] < first_steps - 1) & (ends[None, :] != steps[:, None] + 1)
    )
    pairs = np.where(closed[None], np.inf, costs)
    first = np.full((total, total + 1), np.inf)
    first[0] = pairs[0, 0]
    pairs[:, 0] = np.inf
    return shortest_schedule(first, budget, Power(2.0), pairs)  # squares of roots: the costs' own sum


def dpcache_schedules(costs: np.ndarray, budget: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Distinct plans of `budget` steps with what was set for them, the published settings first."""
    found = set()
    for longest in (LONGEST, 1.0):
        for first_steps in FIRST_STEPS:
            if first_steps > budget:
                continue
            try:
                schedule = planned_schedule(costs, budget, first_steps, longest)
            except ValueError:
                continue
            if schedule not in found:
                found.add(schedule)
                yield f"first {first_steps}{'' if longest < 1 else ', any edge'}", schedule


def _build(bench: Bench, budget: int) -> Built:
    bench.check_residuals()
    table, total = bench.table, bench.table.num_inference_steps
    if not 3 <= total <= LONGEST_PAIR_TIMELINE:
        raise NotApplicable(f"DPCache's costs are of triples of steps: expected 3 to {LONGEST_PAIR_TIMELINE} steps")

    def compute() -> dict[str, np.ndarray]:
        found = bench.calibration.samples.map(feature_costs(table), bench.tuning)
        return {order: each.mean(axis=0) for order, each in found.items()}

    costs = bench.workspace.arrays("dpcache", [bench.key, bench.tuning.stop], compute)
    candidates = []
    for order in ORDERS:
        for name, schedule in dpcache_schedules(costs[str(order)], budget):
            program = forecast_program(table, schedule, partial(taylorseer_coefs, order=order))
            setting = f"order {order}, {name}, {schedule_text(schedule)}"
            candidates.append(Built(program=program, setting=setting))
    return replace(choose_program(bench, candidates, FeatureModel), full_runs=1.0)


PUBLISHED = (9, 50)
"""The paper's least, on FLUX.1 and HunyuanVideo."""

METHODS = (
    ProgramMethod(
        name="dpcache",
        group="schedule",
        source="arXiv 2602.22654",
        build=_build,
        model=FeatureModel,
        published=PUBLISHED,
    ),
)
