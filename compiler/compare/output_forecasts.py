"""Programs whose steps between evaluations take forecast outputs: rows of weights, folded into the sampler's updates.

Shapes: T steps of the full sampler, B computed ones. `rows` (T, B) weigh the computed outputs in that of every step.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from otcache.schemas.program import Program

from ..programs.solver_table import SolverTable, jump, step_from_table


def program_from_rows(table: SolverTable, schedule: Sequence[int], rows: np.ndarray) -> Program:
    """The full sampler with every output as its row says, one update for each computed step.

    Args:
        table: the full sampler.
        schedule: B computed steps, the first 0.
        rows: float64 (T, B); a step weighs outputs computed up to it, and a computed step its own alone.
    """
    ends = [*schedule[1:], table.num_inference_steps]
    steps = []
    for position, (start, end) in enumerate(zip(schedule, ends, strict=True)):
        latent_coef, output_coefs = jump(table, start, end)
        steps.append(step_from_table(table, start, latent_coef, output_coefs[:end] @ rows[:end, : position + 1]))
    return Program(payload="output", steps=tuple(steps))


def full_run_jumps(table: SolverTable) -> np.ndarray:
    """Weights float64 (T, T) of all outputs in the latents X_1 … X_T of the full sampler."""
    total = table.num_inference_steps
    return np.stack([jump(table, 0, end)[1] for end in range(1, total + 1)])


def open_loop_error(jumps: np.ndarray, gram: np.ndarray, schedule: Sequence[int], rows: np.ndarray) -> float:
    """Sum over all steps of the squared distance from the full run, if every computed output were the full run's.

    Args:
        jumps: `full_run_jumps`.
        gram: inner products (T, T) of the full run's outputs.
        schedule: B computed steps.
        rows: (T, B).
    """
    missed = -np.eye(len(gram))
    missed[:, list(schedule)] += rows
    gaps = jumps @ missed
    return float(np.einsum("sm,mn,sn->", gaps, gram, gaps))
