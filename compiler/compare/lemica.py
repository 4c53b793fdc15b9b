"""LeMiCa (arXiv 2511.00090): residuals reused on the path whose largest end-to-end error is least."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from ..calibration.batch import Batch
from ..calibration.rollout import StagedModel
from ..calibration.samples import Rows
from ..programs.solver_table import SolverTable, program_from_table
from ..programs.update import apply_step
from ..schedules.reference import Minimax, end_to_end_edge_errors, shortest_schedule
from .method import Bench, Built, NotApplicable, ProgramMethod
from .residual_forecasts import reuse_program

PROMPTS = 2
SPAN = 25
"""Longest jump whose end-to-end error is replayed."""


def jump_evaluations(start: int, num_inference_steps: int) -> int:
    """Evaluations of one sample that `jump_errors` makes: one of the jump, and every step from each of its ends on.

    >>> jump_evaluations(0, 4)  # ends 2, 3 and 4
    4
    """
    ends = range(start + 2, min(num_inference_steps, start + SPAN) + 1)
    return 1 + sum(num_inference_steps - end for end in ends) if ends else 0


def jump_errors(table: SolverTable, start: int) -> Callable[[Batch], Rows]:
    """For a batch: `errors` (m, T − start − 1), mean squared errors of the final latents after jumps from `start` to
    start+2 … T.

    One run reuses the residual of `start` as far as jumps go. What it has come to at each end is carried on with every
    step computed. Infinite beyond `SPAN`.
    """
    total = table.num_inference_steps
    last = min(total, start + SPAN)
    reused = reuse_program(table, [index for index in range(total) if not start < index < last])

    @torch.no_grad()
    def answer(batch: Batch) -> Rows:
        assert batch.evaluator.stages is not None
        errors = np.full((batch.count, max(0, total - start - 1)), math.inf)
        if start + 2 > last:
            return {"errors": errors}
        model = StagedModel(batch.evaluator.stages, batch.denoiser)
        jumping, landed = batch.latents(start), list[torch.Tensor]()
        for index in range(start, total):
            step = reused.steps[index]
            landed = [
                apply_step(step, each, [batch.denoiser(each, step.timestep, step.input_scale)]) for each in landed
            ]
            if index < last:
                jumping = apply_step(step, jumping, [model(jumping, step)])
                landed += [jumping] if index > start else []
        final = batch.latents(-1)
        for position, each in enumerate(landed):
            errors[:, position] = (each - final).double().square().flatten(1).mean(1).cpu().numpy()
        return {"errors": errors}

    return answer


def lemica_edges(bench: Bench) -> tuple[np.ndarray, float]:
    """End-to-end errors (T, T+1) of reusing the residual along each edge, and what they cost in full runs per prompt.

    The sampler is replayed with one jump, everything else computed.
    """
    table, samples = bench.table, bench.calibration.samples
    bench.check_residuals()
    if any(len(step.output_coefs) != 1 for step in program_from_table(table).steps):
        raise NotApplicable(f"{table.scheduler} weighs earlier outputs: a replay cannot start in the middle")
    total = table.num_inference_steps

    def row(start: int) -> dict[str, np.ndarray]:
        return {"errors": samples.map(jump_errors(table, start), slice(PROMPTS))["errors"].mean(axis=0)}

    rows = [
        bench.workspace.arrays("lemica", [bench.key, PROMPTS, SPAN, start], partial(row, start))["errors"]
        for start in range(total)
    ]  # one by one: replays take long, and an interrupted comparison goes on with the next row
    spent = sum(jump_evaluations(start, total) for start in range(total))
    return end_to_end_edge_errors(lambda start, end: float(rows[start][end - start - 2]), total), spent / total


def _build(bench: Bench, budget: int) -> Built:
    errors, full_runs = lemica_edges(bench)
    try:
        schedule = shortest_schedule(errors, budget, Minimax())
    except ValueError:
        raise NotApplicable(f"no path of {budget} edges of at most {SPAN} steps") from None
    return Built(program=reuse_program(bench.table, schedule), full_runs=full_runs)


METHODS = (ProgramMethod(name="lemica", group="schedule", source="arXiv 2511.00090", build=_build),)
