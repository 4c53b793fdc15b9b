"""BudCache (arXiv 2606.13496): residuals reused on a schedule that simulated annealing finds for each budget."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from ..schedules.payloads import squared_errors_of
from .method import Bench, Built, ProgramMethod
from .residual_forecasts import reuse_program

PROMPTS = 2


def annealed_schedule(
    loss: Callable[[tuple[int, ...]], float],
    budget: int,
    num_inference_steps: int,
    *,
    iterations: int,
    rounds: int,
    seed: int,
) -> tuple[tuple[int, ...], int]:
    """The best schedule, and how many were scored: BudCache's simulated annealing over computed steps, then
    steepest descent.

    As released: a random start that computes the first budget/4 steps, one step moved at a time (at most three away,
    seven times in ten), temperatures from 0.05 to 1e-5, then the best neighbour until none is better.
    """
    random = np.random.default_rng(seed)
    prefix = max(1, budget // 4)
    known: dict[tuple[int, ...], float] = {}

    def cost(schedule: tuple[int, ...]) -> float:
        if schedule not in known:
            known[schedule] = loss(schedule)
        return known[schedule]

    free = range(prefix, num_inference_steps)
    current = tuple(range(prefix)) + tuple(sorted(random.choice(free, budget - prefix, replace=False).tolist()))
    best = current
    for iteration in range(iterations if budget > prefix else 0):
        heat = 0.05 * (1e-5 / 0.05) ** (iteration / iterations)
        moved = int(random.choice(current[prefix:]))
        near = [step for step in free if step not in current and abs(step - moved) <= 3]
        targets = near if near and random.random() < 0.7 else [step for step in free if step not in current]
        if not targets:
            break
        candidate = tuple(sorted({*current, int(random.choice(targets))} - {moved}))
        change = cost(candidate) - cost(current)
        if change < 0 or random.random() < math.exp(-change / heat):
            current = candidate
        best = min(best, current, key=cost)
    for _ in range(rounds):
        neighbours = {
            tuple(sorted({*best, step} - {moved}))
            for moved in best[prefix:]
            for step in range(max(prefix, moved - 3), min(num_inference_steps, moved + 4))
            if step not in best
        }
        better = min(neighbours, key=cost, default=best)
        if cost(better) >= cost(best):
            break
        best = better
    return best, len(known)


def _build(bench: Bench, budget: int) -> Built:
    bench.check_residuals()
    samples, total = bench.calibration.samples, bench.table.num_inference_steps

    def loss(schedule: tuple[int, ...]) -> float:
        program = reuse_program(bench.table, schedule)
        return float(samples.map(squared_errors_of(program, 0), slice(PROMPTS))["squared_error"].mean())

    def compute() -> Any:
        schedule, scored = annealed_schedule(loss, budget, total, iterations=200, rounds=4, seed=bench.seed)
        return {"schedule": schedule, "full_runs": scored * budget / total}

    found = bench.workspace.json("annealing", [bench.key, budget, PROMPTS, bench.seed], compute)
    return Built(program=reuse_program(bench.table, found["schedule"]), full_runs=found["full_runs"])


METHODS = (ProgramMethod(name="budcache", group="schedule", source="arXiv 2606.13496", build=_build),)
