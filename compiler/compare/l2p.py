"""L2P (arXiv 2604.26365): outputs forecast by weights for each step, learned along full runs.

As published (its released `predictor/train.py` and `src/flux`, and the abstract and notes of the paper, whose text was
not at hand): the guided output of the model is forecast; step t weighs everything before it, forecasts among them, with
row t of a triangular matrix; the matrix starts as reuse of the newest output and is trained with Adam (rate 0.01, 201
rounds) on the squared error along full runs; computed steps are a list for each speed, of 50 steps.

Chosen here, by calibration: what the training tends to, the least squares themselves, with a ridge that pulls to reuse;
forecasts from computed outputs alone, as the paper's text may be read; and computed steps where no list is released:
the lists follow a rule (the first of 0 1 2 4, then even steps) that is taken with fewer first steps too, and the
shortest paths of outputs are tried. Trained on all calibration samples, whose inner products are all that is needed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ..programs.solver_table import MAX_MEMORY
from ..schedules.gram import statistics_from_grams
from ..schedules.reference import graph_schedules
from .method import Bench, Built, NotApplicable, ProgramMethod, choose_program, schedule_text
from .output_forecasts import program_from_rows

RELEASED_STEPS = 50
RELEASED: tuple[tuple[int, ...], ...] = (
    (0, 1, 2, 4, 6, 9, 14, 23, 30, 37, 44),
    (0, 1, 2, 4, 7, 14, 23, 31, 38, 45),
    (0, 1, 2, 4, 9, 17, 26, 35, 43),
    (0, 1, 2, 4, 10, 20, 31, 41),
    (0, 1, 2, 4, 12, 24, 38),
    (0, 1, 2, 4, 16, 32),
)
"""Lists of computed steps of the release, for 50 steps."""
FIRST = (0, 1, 2, 4)
"""What all of them begin with."""
RATE, ROUNDS = 0.01, 201
"""Of Adam, as released."""
RIDGES = (1e-8, 1e-4)
"""Of the least squares, times the outputs' own size."""


def output_gram(bench: Bench) -> np.ndarray:
    """Mean inner products float64 (T, T) of the guided outputs along the full runs of all calibration samples."""
    samples, total = bench.calibration.samples, bench.table.num_inference_steps
    gram: np.ndarray = samples.trajectory_gram()[:, total + 1 :, total + 1 :].mean(axis=0) / samples.elements
    return gram


def trained_weights(gram: np.ndarray) -> np.ndarray:
    """Weights float64 (T, T) after the released training: row t forecasts output t + 1 from outputs 0 … t.

    Minimises the mean of ‖Σ_j W_tj V_j − V_{t+1}‖², of which inner products are all that a round needs.
    """
    total = len(gram)
    inner = torch.from_numpy(gram)
    mask = torch.ones(total, total, dtype=torch.float64).tril()
    weights = torch.eye(total, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([weights], lr=RATE)
    for _ in range(ROUNDS):
        rows = (weights * mask)[:-1]
        loss = ((rows @ inner * rows).sum() - 2 * (rows * inner[1:]).sum()) / (total - 1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return (weights * mask).detach().numpy()


def fitted_row(gram: np.ndarray, known: Sequence[int], step_index: int, ridge: float) -> np.ndarray:
    """Weights float64 (len(known),) of the outputs at `known` in that at a step, by least squares along full runs.

    The ridge pulls to reuse of the newest of them.
    """
    indices = list(known)
    block = gram[np.ix_(indices, indices)]
    newest = np.eye(len(indices))[-1]
    missed = gram[indices, step_index] - block @ newest
    penalty = ridge * float(np.diag(gram).mean()) * np.eye(len(indices))
    row: np.ndarray = newest + np.linalg.lstsq(block + penalty, missed, rcond=None)[0]
    return row


def fitted_weights(gram: np.ndarray, ridge: float) -> np.ndarray:
    """What `trained_weights` tends to, float64 (T, T)."""
    weights = np.eye(len(gram))
    for step in range(1, len(gram)):
        weights[step - 1, :step] = fitted_row(gram, range(step), step, ridge)
    return weights


def rows_from_weights(weights: np.ndarray, schedule: Sequence[int]) -> np.ndarray:
    """Rows (T, B) of forecasts that build on forecasts, as released."""
    total, positions = len(weights), {step: position for position, step in enumerate(schedule)}
    rows = np.zeros((total, len(schedule)))
    for step in range(total):
        if step in positions:
            rows[step, positions[step]] = 1.0
        else:
            rows[step] = weights[step - 1, :step] @ rows[:step]
    return rows


def rows_from_computed(gram: np.ndarray, schedule: Sequence[int], ridge: float) -> np.ndarray:
    """Rows (T, B) of forecasts from computed outputs alone."""
    rows = np.zeros((len(gram), len(schedule)))
    for step in range(len(gram)):
        known = [each for each in schedule if each <= step]
        rows[step, : len(known)] = fitted_row(gram, known, step, ridge) if known[-1] < step else np.eye(len(known))[-1]
    return rows


def l2p_schedules(budget: int, num_inference_steps: int) -> list[tuple[int, ...]]:
    """The released list of a budget, and those of its rule: some of the first steps, then even ones.

    >>> l2p_schedules(6, 50)[:2]
    [(0, 1, 2, 4, 16, 32), (0, 1, 2, 4, 17, 33)]
    """
    total = num_inference_steps
    found = [each for each in RELEASED if len(each) == budget] if total == RELEASED_STEPS else []
    for count in range(min(len(FIRST), budget), 0, -1):
        others = budget - count
        even = [round(k * total / (others + 1)) for k in range(1, others + 1)]
        schedule = tuple(sorted({*FIRST[:count], *even}))
        if len(schedule) == budget and schedule[-1] < total and schedule not in found:
            found.append(schedule)
    return found


def _build(bench: Bench, budget: int) -> Built:
    if budget > MAX_MEMORY:
        raise NotApplicable(f"a program weighs at most {MAX_MEMORY} outputs, and L2P all {budget}")
    table, samples, gram = bench.table, bench.calibration.samples, output_gram(bench)
    statistics = statistics_from_grams(samples.trajectory_gram(), samples.elements)
    schedules = {each: "" for each in l2p_schedules(budget, table.num_inference_steps)}
    for name, path in graph_schedules(statistics, budget).items():
        schedules.setdefault(tuple(path), f"{name}, ")
    matrices = {"trained as released": trained_weights(gram)}
    matrices |= {f"least squares, ridge {ridge:g}": fitted_weights(gram, ridge) for ridge in RIDGES}
    candidates = []
    for schedule, name in schedules.items():
        fits = {fit: rows_from_weights(weights, schedule) for fit, weights in matrices.items()}
        for ridge in RIDGES:
            fits[f"from computed outputs, ridge {ridge:g}"] = rows_from_computed(gram, schedule, ridge)
        for fit, rows in fits.items():
            try:
                program = program_from_rows(table, schedule, rows)
            except ValueError:  # coefficients beyond what a program may hold: the forecasts explode
                continue
            candidates.append(Built(program=program, setting=f"{fit}, {name}{schedule_text(schedule)}"))
    if not candidates:
        raise NotApplicable(f"no list of computed steps of L2P's has {budget}, and every path's forecasts explode")
    return choose_program(bench, candidates)


PUBLISHED = (7, 50)
"""The paper's longest interval with figures, 10, on FLUX.1: the released list has 7 steps."""

METHODS = (ProgramMethod(name="l2p", group="schedule", source="arXiv 2604.26365", build=_build, published=PUBLISHED),)
