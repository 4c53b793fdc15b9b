"""BudCache (arXiv 2606.13496): residuals reused on a schedule that simulated annealing finds for each budget."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from ..schedules.payloads import squared_errors_of
from .method import Bench, Built, ProgramMethod
from .residual_forecasts import reuse_program

ITERATIONS = 200
ROUNDS = 20
"""Of polishing, as released."""


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
    polishing.

    As released: a random start that computes the first budget/4 steps, one step moved at a time (at most three away,
    seven times in ten), temperatures from 0.05 to 1e-5, then rounds of `polished_schedule` until none is better.
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
        better = polished_schedule(best, cost, prefix, num_inference_steps, random)
        if better == best:
            break
        best = better
    return best, len(known)


def polished_schedule(
    schedule: tuple[int, ...],
    cost: Callable[[tuple[int, ...]], float],
    prefix: int,
    num_inference_steps: int,
    random: np.random.Generator,
) -> tuple[int, ...]:
    """One round: the best schedule with one step moved by at most three; else the first one that is better with a step
    moved further, in random order; else the same.

    Args:
        schedule: to start from.
        cost: of a schedule.
        prefix: steps at the beginning that stay.
        num_inference_steps: T.
        random: of the order.
    """
    moves = [
        (abs(step - moved), tuple(sorted({*schedule, step} - {moved})))
        for moved in schedule[prefix:]
        for step in range(prefix, num_inference_steps)
        if step not in schedule
    ]
    near = [neighbour for distance, neighbour in moves if distance <= 3]
    better = min(near, key=cost, default=schedule)
    if cost(better) < cost(schedule):
        return better
    far = [neighbour for distance, neighbour in moves if distance > 3]
    order = random.permutation(len(far)).tolist()
    return next((far[index] for index in order if cost(far[index]) < cost(schedule)), schedule)


def _build(bench: Bench, budget: int) -> Built:
    bench.check_residuals()
    samples, total = bench.calibration.samples, bench.table.num_inference_steps

    def loss(schedule: tuple[int, ...]) -> float:
        program = reuse_program(bench.table, schedule)
        return float(samples.map(squared_errors_of(program, 0), bench.tuning)["squared_error"].mean())

    def compute() -> Any:
        schedule, scored = annealed_schedule(loss, budget, total, iterations=ITERATIONS, rounds=ROUNDS, seed=bench.seed)
        return {"schedule": schedule, "full_runs": scored * budget / total}

    found = bench.workspace.json("annealing", [bench.key, budget, bench.tuning.stop, bench.seed], compute)
    return Built(program=reuse_program(bench.table, found["schedule"]), full_runs=found["full_runs"])


PUBLISHED = (6, 50)
"""The least that paper and release show, by an audit of the first comparison."""

METHODS = (
    ProgramMethod(name="budcache", group="schedule", source="arXiv 2606.13496", build=_build, published=PUBLISHED),
)
