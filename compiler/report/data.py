"""What the report says, as plain values: manifest fields + evidence → `Report`. Neither figures nor HTML."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from otcache.schemas import manifest as schema
from otcache.schemas.manifest import FULL
from otcache.schemas.program import Program

from ..schedules.policy import Policy, displacement_interpolation, policy_from_schedule, wasserstein_distance
from .evidence import Bench, Evidence, PeerEvidence
from .recommend import recommended

LATENCY = "latency_s/"
"""Start of the names of measured latencies (`schemas/README.md`)."""
NAMED_PEERS = 5
"""Peers with a colour and a marker of their own in figures; the others are grey, and all are in the tables."""
CANDIDATES = 5
"""Of each budget, how many candidates are listed."""
FLOW_SIGMA = 2.0
"""Noise levels up to here are drawn on a linear axis: those of flow matching end at 1, variance exploding ones at 14 or
80.
"""


@dataclass(frozen=True, kw_only=True, eq=False)
class Timeline:
    """The axis on which schedules are drawn: noise levels, or timesteps where the scheduler has none."""

    name: str
    values: NDArray[np.float64]
    """(T+1,), from the first step to the end."""

    @property
    def is_log(self) -> bool:
        return bool(self.name == "sigma" and self.values.max() > FLOW_SIGMA and self.values[:-1].min() > 0)

    @property
    def limits(self) -> tuple[float, float]:
        """From the start to the end; on a logarithmic axis, which has no zero, to the last step."""
        return float(self.values[0]), float(self.values[-2] if self.is_log else self.values[-1])

    def at(self, positions: ArrayLike) -> NDArray[np.float64]:
        """Values at positions in [0, T], linear between steps.

        >>> timeline = Timeline(name="sigma", values=np.array([1.0, 0.5, 0.0]))
        >>> timeline.at([0, 0.5, 2]).tolist()
        [1.0, 0.75, 0.0]
        """
        found = np.interp(np.asarray(positions, dtype=np.float64), np.arange(len(self.values)), self.values)
        return np.maximum(found, self.limits[1]) if self.is_log else found


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A peer at one budget."""

    name: str
    nfe: int
    quality: schema.Quality


@dataclass(frozen=True, kw_only=True)
class WorstPrompt:
    """A held-out prompt that a budget serves badly, with what it came to."""

    index: int
    prompt: str
    seed: int
    psnr_db: float
    ssim: float


@dataclass(frozen=True, kw_only=True, eq=False)
class BudgetReport:
    """What the report says of one budget."""

    budget: int
    program: Program
    quality: schema.Quality
    psnr_db: NDArray[np.float64]
    """Of each held-out prompt."""
    ssim: NDArray[np.float64]
    peers: tuple[Peer, ...]
    worst: tuple[WorstPrompt, ...]
    positions: tuple[int, ...]
    errors: NDArray[np.float64]
    """Relative errors of the latents, (positions, prompts)."""
    policy: Policy
    distance: float
    """W₂ from the reference policy, as a share of the timeline."""
    candidates: tuple[schema.Candidate, ...]
    further_candidates: int
    latency_s: float | None
    shown_peer: PeerEvidence | None
    """Whose pictures stand beside ours."""

    @property
    def schedule(self) -> tuple[int, ...]:
        return self.program.schedule

    @property
    def best_peer(self) -> Peer | None:
        return max(self.peers, key=lambda peer: peer.quality.psnr_db.mean, default=None)

    @property
    def chosen(self) -> schema.Candidate | None:
        return next((candidate for candidate in self.candidates if candidate.chosen), None)


@dataclass(frozen=True, kw_only=True)
class PassCost:
    """A pass of calibration."""

    name: str
    full_runs: float
    """Per calibration prompt."""
    evaluations: int
    seconds: float | None
    """None where an earlier compile had its result."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Report:
    """Everything that the report says."""

    model: schema.Model
    sampler: schema.Sampler
    conditions: schema.Conditions
    guidance: schema.Guidance
    evidence: Evidence
    timeline: Timeline
    reference: schema.Policy
    anchor: schema.Policy
    budgets: tuple[BudgetReport, ...]
    """In increasing order."""
    recommended: int
    """A budget."""
    why: str
    """It is recommended."""
    full_latency_s: float | None
    bench: Bench | None
    """Where latencies come from, if not from the manifest."""
    costs: tuple[PassCost, ...]
    other_seconds: tuple[tuple[str, float], ...]
    """Passes of the compile that are no calibration, with the seconds that each took."""
    producer: dict[str, str]
    max_relative_error: float

    @property
    def total(self) -> int:
        """T."""
        return self.sampler.num_inference_steps

    @property
    def peers(self) -> tuple[str, ...]:
        """Names of all peers, those first that come closest to the best at their budgets."""
        behind: dict[str, list[float]] = {}
        for entry in self.budgets:
            for peer in entry.peers:
                behind.setdefault(peer.name, []).append(entry.quality.psnr_db.mean - peer.quality.psnr_db.mean)
        return tuple(sorted(behind, key=lambda name: (float(np.mean(behind[name])), name)))

    @property
    def choice(self) -> BudgetReport:
        """The budget that is recommended."""
        return next(entry for entry in self.budgets if entry.budget == self.recommended)

    @property
    def has_latency(self) -> bool:
        return self.full_latency_s is not None or any(entry.latency_s is not None for entry in self.budgets)

    @property
    def anchor_distance(self) -> float:
        """W₂ of the two policies, as a share of the timeline."""
        return wasserstein_distance(self.path(0.0), self.path(1.0))

    def path(self, weight: float) -> Policy:
        """The policy at a position on the path from the reference (0) to the anchor (1)."""
        ends = [policy_from_schedule(each.schedule, self.total) for each in (self.reference, self.anchor)]
        return displacement_interpolation(ends[0], ends[1], weight)


def report_from_manifest(fields: dict[str, Any], evidence: Evidence) -> Report:
    """Make the report of a manifest.

    Args:
        fields: the manifest's JSON value, which may lack files, attachments and digest.
        evidence: what is kept beside it, of the same budgets.

    Raises:
        ValueError: a budget that the evidence names has no quality in the manifest.
    """
    sampler = schema.Sampler.model_validate(fields["sampler"])
    reference, anchor = (schema.Policy.model_validate(fields[name]) for name in ("reference", "anchor"))
    conditions = schema.Conditions.model_validate(fields["conditions"])
    latencies = {
        each["name"].removeprefix(LATENCY): float(each["value"])
        for each in fields.get("measurements", [])
        if each["name"].startswith(LATENCY) and each["unit"] == "s"
    }
    bench = None if latencies else evidence.bench  # the manifest's are of the host that serves
    latencies = latencies or (dict(bench.latency_s) if bench else {})
    programs = {p.budget: p for p in map(schema.BudgetProgram.model_validate, fields["programs"])}
    start = policy_from_schedule(reference.schedule, sampler.num_inference_steps)
    budgets = [
        _budget(programs[str(entry.budget)], evidence, position, start, sampler.num_inference_steps, latencies)
        for position, entry in enumerate(evidence.budgets)
    ]
    qualities = {entry.budget: entry.quality for entry in budgets}
    choice, why = recommended(qualities, sampler.num_inference_steps, evidence.targets)
    axis = evidence.sigmas or (*evidence.timesteps, 0.0)
    costs, others = _costs(fields, evidence, sampler.num_inference_steps * conditions.calibration_prompts)
    return Report(
        model=schema.Model.model_validate(fields["model"]),
        sampler=sampler,
        conditions=conditions,
        guidance=schema.Guidance.model_validate(fields["guidance"]),
        evidence=evidence,
        timeline=Timeline(name="sigma" if evidence.sigmas else "timestep", values=np.asarray(axis, dtype=np.float64)),
        reference=reference,
        anchor=anchor,
        budgets=tuple(sorted(budgets, key=lambda entry: entry.budget)),
        recommended=choice,
        why=why,
        full_latency_s=latencies.get(FULL),
        bench=bench,
        costs=costs,
        other_seconds=others,
        producer=dict(fields["producer"]),
        max_relative_error=float(fields["max_relative_error"]),
    )


def _budget(
    found: schema.BudgetProgram,
    evidence: Evidence,
    position: int,
    reference: Policy,
    total: int,
    latencies: dict[str, float],
) -> BudgetReport:
    """What the report says of one budget.

    Args:
        found: the manifest's program of it.
        evidence: what is kept beside the manifest.
        position: of the budget in the evidence.
        reference: the policy that distances are measured from.
        total: steps of the full sampler, T.
        latencies: seconds by budget, of those that were measured.
    """
    if found.quality is None:
        raise ValueError(f"budget {found.budget} has no quality")
    own = evidence.budgets[position]
    policy = policy_from_schedule(found.program.schedule, total)
    return BudgetReport(
        budget=own.budget,
        program=found.program,
        quality=found.quality,
        psnr_db=np.array(own.psnr_db),
        ssim=np.array(own.ssim),
        peers=tuple(Peer(name=peer.name, nfe=peer.nfe, quality=peer.quality) for peer in found.baselines),
        worst=tuple(
            WorstPrompt(
                index=i, prompt=evidence.prompts[i], seed=evidence.seeds[i], psnr_db=own.psnr_db[i], ssim=own.ssim[i]
            )
            for i in own.worst
        ),
        positions=own.positions,
        errors=np.array(own.errors),
        policy=policy,
        distance=wasserstein_distance(reference, policy),
        candidates=found.candidates[:CANDIDATES],
        further_candidates=len(found.candidates[CANDIDATES:]),
        latency_s=latencies.get(found.budget),
        shown_peer=evidence.peers[position] if evidence.peers else None,
    )


def _costs(
    fields: dict[str, Any], evidence: Evidence, per_run: int
) -> tuple[tuple[PassCost, ...], tuple[tuple[str, float], ...]]:
    """Passes that the manifest charges, and the seconds of the others.

    Args:
        fields: the manifest's JSON value.
        evidence: with the passes that were measured.
        per_run: evaluations of one full run of all calibration prompts.
    """
    seconds = {name.replace(", ", " and "): each for name, each in evidence.seconds.items()}
    costs = []
    for cost in map(schema.Cost.model_validate, fields["costs"]):
        measured = seconds.pop(cost.name, None)
        seconds_taken = measured.seconds if measured is not None and not measured.reused else None
        evaluations = round(cost.full_runs * per_run)
        costs.append(PassCost(name=cost.name, full_runs=cost.full_runs, evaluations=evaluations, seconds=seconds_taken))
    return tuple(costs), tuple((name, each.seconds) for name, each in seconds.items())
