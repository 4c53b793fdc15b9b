"""Pass `evaluate`: every budget's program, and its peers, on prompts and seeds that calibration has not seen."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np

from otcache.schemas import manifest as schema
from otcache.schemas.program import Program

from ..calibration.lpips import weights_digest
from ..calibration.outcomes import outcome_arrays, quality_from_scores
from ..calibration.samples import Samples
from ..calibration.scoring import KeptScores, kept_pictures, reference_pictures
from ..programs.baselines import baseline_programs
from ..programs.solver_table import program_from_table
from ..report.evidence import WORST, PeerPictures
from ..schedules.search import Found
from .capture import full_runs
from .crew import AnyRuns
from .prepare import Prepared, samples_of
from .session import EVALUATION_SEED, Session

SHOWN = 6
"""Held-out prompts whose pictures go into the report."""
MOST_PEERS = 6
"""Of `baseline_programs`."""
PEER_PICTURES = "peer-pictures"
"""In the workspace: those of the best peer of a budget."""


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
    runs: AnyRuns
    """The full runs."""
    peers: dict[int, PeerPictures]
    """Of each budget the peer with the highest mean PSNR."""
    golden: np.ndarray
    """Final latents of the first sample at the smallest budget, float32."""


def held_out_runs(prepared: Prepared) -> AnyRuns:
    """Full runs of the prompts and seeds that calibration has not seen."""
    session = prepared.session
    return full_runs(session, prepared.table, "evaluate", prepared.held_out, session.options.seed + EVALUATION_SEED)


def held_out_samples(prepared: Prepared, runs: AnyRuns | None = None) -> Samples:
    """Those runs as samples; LPIPS is measured on them where anything asks for it."""
    session, runs = prepared.session, runs or held_out_runs(prepared)
    return samples_of(session, runs, prepared.table, prepared.stages, lpips=session.measures_lpips)


def outcome_of(
    prepared: Prepared, samples: Samples, budget: int, program: Program
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
    runs = held_out_runs(prepared)
    with contextlib.closing(held_out_samples(prepared, runs)) as samples:
        return _evaluate_on(samples, runs, prepared, found)


def _evaluate_on(samples: Samples, runs: AnyRuns, prepared: Prepared, found: Found) -> Evaluated:
    session, prompts = prepared.session, prepared.held_out
    programs = {budget: trials[0].program for budget, trials in found.trials.items()}
    made = 0
    measured: dict[str, Any] = {}
    outcomes: dict[int, dict[str, np.ndarray]] = {}
    peers: dict[int, PeerPictures] = {}
    with session.reporter.on("evaluate", f"budgets {', '.join(map(str, programs))} and peers") as advance:
        advance.expect(*(program.nfe * (1 + MOST_PEERS) * samples.count for program in programs.values()))
        for position, (budget, program) in enumerate(programs.items()):
            key = evaluation_key(session, prompts, budget, program)
            outcomes[budget], evaluations = outcome_of(prepared, samples, budget, program)
            against = Peers(prepared=prepared, samples=samples, budget=budget, key=key)
            measured[str(budget)] = session.workspace.json("measured", key, partial(against.measure, outcomes[budget]))
            peers[budget] = against.best(measured[str(budget)])
            made += evaluations + against.evaluations
            advance(position + 1, len(programs))
        advance.facts["evaluations"] = made
    named = {*range(min(SHOWN, samples.count)), *(row for each in outcomes.values() for row in each["worst"].tolist())}
    return Evaluated(
        full=program_from_table(prepared.table),
        quality={budget: schema.Quality.model_validate(value["quality"]) for budget, value in measured.items()},
        baselines={b: [schema.Baseline.model_validate(peer) for peer in v["baselines"]] for b, v in measured.items()},
        outcomes=outcomes,
        peers=peers,
        references={row: samples.map(reference_pictures, slice(row, row + 1))["pictures"][0] for row in sorted(named)},
        runs=runs,
        golden=outcomes[min(outcomes)]["latents"],
    )


@dataclass(kw_only=True)
class Peers:
    """A budget's peers on the held-out samples, and the pictures of the one that comes closest to the full runs."""

    prepared: Prepared
    samples: Samples
    budget: int
    key: Any
    """Of the budget's evaluation."""
    evaluations: int = 0
    """That were made now."""

    @cached_property
    def programs(self) -> dict[str, Program]:
        """By name."""
        scheduler, prepared = self.prepared.session.model.pipeline.scheduler, self.prepared
        return baseline_programs(scheduler, prepared.table, self.budget, prepared.set_timesteps)

    def measure(self, own: dict[str, np.ndarray]) -> dict[str, Any]:
        """Figures of the budget's program, whose outcome is `own`, and of its peers, as JSON values."""
        scores = {"psnr_db": own["psnr_db"], "ssim": own["ssim"], "latent_error": own["errors"][-1]}
        found = {name: self.samples.map(KeptScores(peer)) for name, peer in self.programs.items()}
        self.evaluations += sum(peer.nfe for peer in self.programs.values()) * self.samples.count
        best = max(found, key=lambda name: float(found[name]["psnr_db"].mean()))
        self._pictures(best)  # of the latents that were kept just now
        return {
            "quality": quality_from_scores(scores).model_dump(),
            "baselines": [
                schema.Baseline(name=name, nfe=self.programs[name].nfe, quality=quality_from_scores(each)).model_dump()
                for name, each in found.items()
            ],
            "best": {"name": best, "psnr_db": found[best]["psnr_db"][:SHOWN].tolist()},
        }

    def best(self, measured: dict[str, Any]) -> PeerPictures:
        """The peer with the highest mean PSNR, on the prompts that are shown, of what `measure` gave."""
        name, values = measured["best"]["name"], measured["best"]["psnr_db"]
        return PeerPictures(name=name, psnr_db=np.array(values), pictures=self._pictures(name))

    def _pictures(self, name: str) -> np.ndarray:
        """From the workspace, or of kept latents; where neither is there any more, the peer is rolled out again."""
        rows = slice(0, min(SHOWN, self.samples.count))

        def draw() -> dict[str, np.ndarray]:
            program = self.programs[name]
            try:
                return self.samples.map(kept_pictures(program), rows)
            except FileNotFoundError:
                self.evaluations += program.nfe * (rows.stop - rows.start)
                self.samples.map(KeptScores(program), rows)
                return self.samples.map(kept_pictures(program), rows)

        return self.prepared.session.workspace.arrays(PEER_PICTURES, self.key, draw)["pictures"]


def evaluation_key(session: Session, prompts: Sequence[str], budget: int, program: Program) -> Any:
    """What the evaluation of one budget depends on, for the workspace."""
    how = f"one roll-out, lpips, {weights_digest()}" if session.measures_lpips else "one roll-out"
    return [session.key, list(prompts), budget, program.model_dump(mode="json"), how]
