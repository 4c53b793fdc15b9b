"""Pass `evaluate`: every budget's program, and its peers, on prompts and seeds that calibration has not seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from otcache.schemas import manifest as schema
from otcache.schemas.program import Program

from ..calibration.outcomes import Evaluation, eight_bits, quality_of
from ..pipelines.denoiser import denoiser_of
from ..pipelines.trajectory import Trajectory
from ..programs.baselines import baseline_programs
from ..programs.solver_table import program_from_table
from ..report.evidence import WORST
from ..schedules.search import Found
from .capture import full_runs
from .prepare import Prepared
from .session import EVALUATION_SEED, Session

SHOWN = 6
"""Held-out prompts whose pictures go into the report."""


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """Fidelity on held-out prompts."""

    full: Program
    quality: dict[str, schema.Quality]
    """Of each budget."""
    baselines: dict[str, list[schema.Baseline]]
    outcomes: dict[int, dict[str, np.ndarray]]
    """Of each budget, for the report (`evaluate.Outcome.arrays`)."""
    references: np.ndarray
    """Pictures of the full runs, uint8 (n, height, width, 3)."""
    first: Trajectory
    """The full run of the first held-out prompt."""
    golden: np.ndarray
    """Its final latents at the smallest budget, float32."""


def held_out_trajectory(prepared: Prepared) -> Trajectory:
    """Full runs of the prompts and seeds that calibration has not seen."""
    session = prepared.session
    return full_runs(session, "evaluate", prepared.held_out, session.options.seed + EVALUATION_SEED)


def evaluated(prepared: Prepared, found: Found) -> Evaluated:
    """Run every budget's program, and its peers, on prompts and seeds that calibration has not seen."""
    session, table, stages, prompts = prepared.session, prepared.table, prepared.stages, prepared.held_out
    trajectory = held_out_trajectory(prepared)
    evaluation = Evaluation(
        denoiser=denoiser_of(session.model.transformer, session.interface, trajectory),
        trajectory=trajectory,
        decode=session.decode,
        references=session.decode(trajectory.latents[-1]),
        stages=stages,
    )
    programs = {budget: trials[0].program for budget, trials in found.trials.items()}
    pipeline = session.model.pipeline

    def roll(program: Program) -> dict[str, np.ndarray]:
        return evaluation.outcome(program).arrays(SHOWN, WORST)

    def measure(budget: int, kept: dict[str, np.ndarray]) -> dict[str, Any]:
        peers = baseline_programs(pipeline.scheduler, table, budget, prepared.set_timesteps)
        return {
            "quality": quality_of(kept["psnr_db"], kept["ssim"], kept["errors"][-1]).model_dump(),
            "baselines": [
                schema.Baseline(name=name, nfe=peer.nfe, quality=evaluation.quality(peer)).model_dump()
                for name, peer in peers.items()
            ],
        }

    measured: dict[str, Any] = {}
    outcomes: dict[int, dict[str, np.ndarray]] = {}
    with session.reporter.on("evaluate", f"budgets {', '.join(map(str, programs))} and peers") as advance:
        for position, (budget, program) in enumerate(programs.items()):
            key = evaluation_key(session, prompts, budget, program)
            outcomes[budget] = session.workspace.arrays("pictures", key, partial(roll, program))
            measured[str(budget)] = session.workspace.json("measured", key, partial(measure, budget, outcomes[budget]))
            advance(position + 1, len(programs))
        advance.facts["evaluations"] = evaluation.denoiser.evaluations[0]
    return Evaluated(
        full=program_from_table(table),
        quality={budget: schema.Quality.model_validate(value["quality"]) for budget, value in measured.items()},
        baselines={b: [schema.Baseline.model_validate(peer) for peer in v["baselines"]] for b, v in measured.items()},
        outcomes=outcomes,
        references=eight_bits(evaluation.references),
        first=trajectory.rows(slice(1)),
        golden=outcomes[min(outcomes)]["latents"],
    )


def evaluation_key(session: Session, prompts: Sequence[str], budget: int, program: Program) -> Any:
    """What the evaluation of one budget depends on, for the workspace."""
    return [session.key, list(prompts), budget, program.model_dump(mode="json"), "one roll-out"]
