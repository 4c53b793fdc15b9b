"""Pass `evaluate`: every budget's program, and its peers, on prompts and seeds that calibration has not seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from otcache.schemas import manifest as schema
from otcache.schemas.program import Program

from ..calibration.local import LocalSamples
from ..calibration.lpips import weights_digest
from ..calibration.outcomes import outcome_arrays, quality_from_scores, quality_of
from ..calibration.runs import Runs
from ..calibration.scoring import reference_pictures
from ..programs.baselines import baseline_programs
from ..programs.solver_table import program_from_table
from ..report.evidence import WORST
from ..schedules.search import Found
from .capture import full_runs
from .prepare import Prepared, samples_of
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
    references: dict[int, np.ndarray]
    """Pictures of full runs, uint8 (height, width, 3), by sample: of those that are shown, and of each budget's worst.
    """
    runs: Runs
    """The full runs."""
    golden: np.ndarray
    """Final latents of the first sample at the smallest budget, float32."""


def held_out_runs(prepared: Prepared) -> Runs:
    """Full runs of the prompts and seeds that calibration has not seen."""
    session = prepared.session
    return full_runs(session, prepared.table, "evaluate", prepared.held_out, session.options.seed + EVALUATION_SEED)


def held_out_samples(prepared: Prepared) -> LocalSamples:
    """Those runs as samples; LPIPS is measured on them where anything asks for it."""
    session = prepared.session
    return samples_of(session, held_out_runs(prepared), prepared.table, prepared.stages, lpips=session.measures_lpips)


def outcome_of(
    prepared: Prepared, samples: LocalSamples, budget: int, program: Program
) -> tuple[dict[str, np.ndarray], int]:
    """What a budget's program comes to on held-out samples (`outcomes.outcome_arrays`), from the workspace where it is
    known, and the model evaluations that were made for it.
    """
    made = [0]

    def roll() -> dict[str, np.ndarray]:
        made[0] = program.nfe * samples.count
        return outcome_arrays(samples, program, prepared.table.num_inference_steps, shown=SHOWN, worst=WORST)

    session = prepared.session
    key = evaluation_key(session, prepared.held_out, budget, program)
    return session.workspace.arrays("pictures", key, roll), made[0]


def evaluate(prepared: Prepared, found: Found) -> Evaluated:
    """Run every budget's program, and its peers, on prompts and seeds that calibration has not seen."""
    session, table, prompts = prepared.session, prepared.table, prepared.held_out
    samples = held_out_samples(prepared)
    programs = {budget: trials[0].program for budget, trials in found.trials.items()}
    pipeline, made = session.model.pipeline, [0]

    def measure(budget: int, kept: dict[str, np.ndarray]) -> dict[str, Any]:
        peers = baseline_programs(pipeline.scheduler, table, budget, prepared.set_timesteps)
        made[0] += sum(peer.nfe for peer in peers.values()) * samples.count
        scores = {"psnr_db": kept["psnr_db"], "ssim": kept["ssim"], "latent_error": kept["errors"][-1]}
        return {
            "quality": quality_from_scores(scores).model_dump(),
            "baselines": [
                schema.Baseline(name=name, nfe=peer.nfe, quality=quality_of(samples, peer)).model_dump()
                for name, peer in peers.items()
            ],
        }

    measured: dict[str, Any] = {}
    outcomes: dict[int, dict[str, np.ndarray]] = {}
    peers = len(baseline_programs(pipeline.scheduler, table, min(programs), prepared.set_timesteps))
    with session.reporter.on("evaluate", f"budgets {', '.join(map(str, programs))} and peers") as advance:
        advance.expect(*(program.nfe * (1 + peers) * samples.count for program in programs.values()))
        for position, (budget, program) in enumerate(programs.items()):
            key = evaluation_key(session, prompts, budget, program)
            outcomes[budget], evaluations = outcome_of(prepared, samples, budget, program)
            made[0] += evaluations
            measured[str(budget)] = session.workspace.json("measured", key, partial(measure, budget, outcomes[budget]))
            advance(position + 1, len(programs))
        advance.facts["evaluations"] = made[0]
    named = {*range(min(SHOWN, samples.count)), *(row for each in outcomes.values() for row in each["worst"].tolist())}
    return Evaluated(
        full=program_from_table(table),
        quality={budget: schema.Quality.model_validate(value["quality"]) for budget, value in measured.items()},
        baselines={b: [schema.Baseline.model_validate(peer) for peer in v["baselines"]] for b, v in measured.items()},
        outcomes=outcomes,
        references={row: samples.map(reference_pictures, slice(row, row + 1))["pictures"][0] for row in sorted(named)},
        runs=samples.runs,
        golden=outcomes[min(outcomes)]["latents"],
    )


def evaluation_key(session: Session, prompts: Sequence[str], budget: int, program: Program) -> Any:
    """What the evaluation of one budget depends on, for the workspace."""
    how = f"one roll-out, lpips, {weights_digest()}" if session.measures_lpips else "one roll-out"
    return [session.key, list(prompts), budget, program.model_dump(mode="json"), how]
