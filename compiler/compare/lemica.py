"""LeMiCa (arXiv 2511.00090): residuals reused on the path whose largest end-to-end error is least."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from ..calibration.batch import Batch
from ..calibration.rollout import StagedModel
from ..calibration.samples import Rows
from ..programs.solver_table import SolverTable, program_from_table
from ..programs.update import apply_step
from ..schedules.reference import Minimax, end_to_end_edge_errors, shortest_schedule
from .method import Bench, Built, NotApplicable, ProgramMethod, choose_program, schedule_text
from .residual_forecasts import reuse_program

NORMS = ("l2", "l1")
"""Of the final latents' errors: mean squares, and mean absolute values, as the release weighs its graph."""


def jump_evaluations(start: int, num_inference_steps: int) -> int:
    """Evaluations of one sample that `jump_errors` makes: one of the jump, and every step from each of its ends on.

    >>> jump_evaluations(0, 4)  # ends 2, 3 and 4
    4
    """
    ends = range(start + 2, num_inference_steps + 1)
    return 1 + sum(num_inference_steps - end for end in ends) if ends else 0


def jump_errors(table: SolverTable, start: int) -> Callable[[Batch], Rows]:
    """For a batch: `l2` and `l1` (m, T − start − 1), errors of the final latents after jumps from `start` to start+2 …
    T.

    One run reuses the residual of `start` to the end. What it has come to at each end of a jump is carried on with
    every step computed.
    """
    total = table.num_inference_steps
    reused = reuse_program(table, range(start + 1))

    @torch.no_grad()
    def answer(batch: Batch) -> Rows:
        assert batch.evaluator.stages is not None
        errors = {norm: np.zeros((batch.count, max(0, total - start - 1))) for norm in NORMS}
        if start + 2 > total:
            return errors
        model = StagedModel(batch.evaluator.stages, batch.denoiser)
        jumping, landed = batch.latents(start), list[torch.Tensor]()
        for index in range(start, total):
            step = reused.steps[index]
            landed = [
                apply_step(step, each, [batch.denoiser(each, step.timestep, step.input_scale)]) for each in landed
            ]
            jumping = apply_step(step, jumping, [model(jumping, step)])
            landed += [jumping] if index > start else []
        final = batch.latents(-1)
        for position, each in enumerate(landed):
            difference = (each - final).double().flatten(1)
            errors["l2"][:, position] = difference.square().mean(1).cpu().numpy()
            errors["l1"][:, position] = difference.abs().mean(1).cpu().numpy()
        return errors

    return answer


def lemica_edges(bench: Bench) -> tuple[dict[str, np.ndarray], float]:
    """By norm, end-to-end errors (T, T+1) of reusing the residual along each edge; and what they cost in full runs per
    prompt.

    The sampler is replayed with one jump, everything else computed.
    """
    table, samples = bench.table, bench.calibration.samples
    bench.check_residuals()
    if any(len(step.output_coefs) != 1 for step in program_from_table(table).steps):
        raise NotApplicable(f"{table.scheduler} weighs earlier outputs: a replay cannot start in the middle")
    total = table.num_inference_steps

    def row(start: int) -> dict[str, np.ndarray]:
        found = samples.map(jump_errors(table, start), bench.tuning)
        return {norm: found[norm].mean(axis=0) for norm in NORMS}

    rows = [
        bench.workspace.arrays("lemica", [bench.key, bench.tuning.stop, start], partial(row, start))
        for start in range(total)
    ]  # one by one: replays take long, and an interrupted comparison goes on with the next row

    def edges(norm: str) -> np.ndarray:
        return end_to_end_edge_errors(lambda start, end: float(rows[start][norm][end - start - 2]), total)

    spent = sum(jump_evaluations(start, total) for start in range(total))
    return {norm: edges(norm) for norm in NORMS}, spent / total


def lemica_schedules(bench: Bench, budget: int) -> dict[str, tuple[int, ...]]:
    """The path of each norm whose largest error is least. Raises NotApplicable."""
    edges, _ = lemica_edges(bench)
    return {f"lemica, {norm}": shortest_schedule(errors, budget, Minimax()) for norm, errors in edges.items()}


def _build(bench: Bench, budget: int) -> Built:
    candidates = [
        Built(program=reuse_program(bench.table, schedule), setting=f"{name}, {schedule_text(schedule)}")
        for name, schedule in lemica_schedules(bench, budget).items()
    ]
    return replace(choose_program(bench, candidates), full_runs=lemica_edges(bench)[1])


PUBLISHED = (10, 50)
"""About the least that paper and release show, by an audit of the first comparison."""

METHODS = (
    ProgramMethod(name="lemica", group="schedule", source="arXiv 2511.00090", build=_build, published=PUBLISHED),
)
