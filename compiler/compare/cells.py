"""What `otc compare` measured: a value that goes to JSON and back, and the verdicts that follow from its cells."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
from pydantic import TypeAdapter

Group = Literal["solver", "cache", "schedule", "library", "otcache"]
"""Kinds of methods."""
DEFAULT = "otcache"
AHEAD_DB = 0.5
"""What the default must be ahead of every other method by."""
AIM_DB = 3.0
FURTHER = 1.5
"""Peers are also measured at this multiple of a budget: how much further otcache carries."""
SLACK = 1e-3
"""Full runs that counts of blocks may differ by: they are sums of fractions."""
WORST_DB = 1.0
"""What the default's worst prompt may be behind the best peer's worst."""


@dataclass(frozen=True, kw_only=True)
class Spread:
    """A figure over the prompts."""

    mean: float
    std: float
    worst: float

    @classmethod
    def of(cls, values: np.ndarray) -> Spread:
        return cls(mean=float(values.mean()), std=float(values.std()), worst=float(values.min()))


Range = tuple[int, int | None]
"""The fewest evaluations that a paper shows a method at, and of how many steps; None where it is of any number."""


@dataclass(frozen=True, kw_only=True)
class Spent:
    """What a measurement took where it was made."""

    seconds: float
    """Wall time."""
    evaluations: float
    """Of one sample, all branches of guidance together; one whose gradient was taken as well counts once."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One method at one budget."""

    method: str
    group: Group
    budget: int
    nfe_mean: float
    nfe_worst: float
    psnr_db: Spread
    ssim: Spread
    lpips: float | None
    seconds: float
    setting: str
    full_runs: float
    """What a search for this method took, in full runs per prompt it used; 0 where there is none."""
    blocks_mean: float | None = None
    """Blocks that were run, in full runs of all of them: more than the evaluations where some run at every step. None
    in results that were kept before they were counted.
    """
    spent: Spent | None = None
    """What measuring this cell took, settings that were tried among it; None where it was kept before that was."""

    def within_blocks(self, budget: int) -> bool:
        """Whether it runs no more blocks than so many full runs do."""
        return self.blocks_mean is not None and self.blocks_mean <= budget + SLACK


@dataclass(frozen=True, kw_only=True)
class Skipped:
    method: str
    budget: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether the default is ahead at a budget, against the best other method by PSNR."""

    budget: int
    psnr_db: float
    best_peer: str
    best_peer_psnr_db: float
    ahead_db: float
    ssim_ahead: float
    """SSIM less the highest of any other method."""
    worst_prompt_db: float
    """The worst prompt's PSNR less the best peer's worst prompt's."""
    worst_within: bool
    """Whether that is at most `WORST_DB` behind."""
    further_peer: str | None
    further_ahead_db: float | None
    """PSNR less that of the best peer at `FURTHER` times the budget."""
    must: bool
    aim: bool
    blocks_peer: str | None = None
    """The best other method, at whatever budget, that runs no more blocks; None where blocks were not counted."""
    blocks_ahead_db: float | None = None


@dataclass(frozen=True, kw_only=True)
class Claim:
    """The paper's claim at one budget: ways to a schedule under the same closed-loop fit, on held-out prompts."""

    budget: int
    way: str
    schedule: tuple[int, ...]
    psnr_db: float
    ssim: float
    rollouts: int
    """Roll-outs of the budget on the calibration set that finding it took."""
    w2_to_interpolated: float
    """W_2 on the timeline [0, 1] from the interpolated schedule's policy."""


@dataclass(frozen=True, kw_only=True)
class AtScale:
    """One program, calibrated across a range of guidance scales, at one scale of it, against peers calibrated for that
    scale.
    """

    guidance_scale: float
    psnr_db: Spread
    ssim: Spread
    best_peer: str
    best_peer_psnr_db: Spread
    best_peer_ssim: Spread

    @property
    def ahead_db(self) -> float:
        return self.psnr_db.mean - self.best_peer_psnr_db.mean

    @property
    def ahead(self) -> bool:
        """By as much as the default must be, with an SSIM that is not lower."""
        return self.ahead_db >= AHEAD_DB and self.ssim.mean >= self.best_peer_ssim.mean


@dataclass(frozen=True, kw_only=True)
class Calibrated:
    """A whole compile with so many calibration prompts, on the same held-out prompts."""

    calibration_prompts: int
    psnr_db: Spread
    ssim: Spread
    full_runs: float
    """Per calibration prompt, without their own."""


@dataclass(frozen=True, kw_only=True)
class Robustness:
    """How far the advantage depends on guidance and on the number of calibration prompts, at one budget."""

    budget: int
    guidance_range: tuple[float, float]
    at_scales: tuple[AtScale, ...]
    """Empty for models without guidance."""
    calibrated: tuple[Calibrated, ...]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Everything that was measured."""

    model: str
    pipeline: str
    scheduler: str
    num_inference_steps: int
    guidance_scale: float
    prompts: int
    calibration_prompts: int
    size: tuple[int, int]
    budgets: tuple[int, ...]
    cells: tuple[Cell, ...]
    skipped: tuple[Skipped, ...]
    verdicts: tuple[Verdict, ...]
    claims: tuple[Claim, ...]
    costs: dict[str, float]
    """Of otcache's own compile, in full runs per calibration prompt."""
    lemica_full_runs: float | None
    """Of LeMiCa's graph on the same T, counted by the same code."""
    versions: dict[str, str]
    robustness: Robustness | None = None
    published: dict[str, Range] = field(default_factory=dict)
    """By method, where a range was published."""
    sections: dict[str, Spent] = field(default_factory=dict)
    """What tests beside the cells took."""
    threads: int | None = None
    """Of torch, on the host where all this was measured."""

    def outside_published(self, method: str, budget: int) -> bool:
        """Whether a method's paper shows it at no so few evaluations, of as many steps as these."""
        if method not in self.published:
            return False
        evaluations, steps = self.published[method]
        return budget * (steps or 1) < evaluations * (self.num_inference_steps if steps else 1)

    def cell(self, method: str, budget: int) -> Cell | None:
        return next((c for c in self.cells if (c.method, c.budget) == (method, budget)), None)

    def best_psnr_db(self, budget: int) -> float:
        """Of all methods at a budget."""
        return max(cell.psnr_db.mean for cell in self.cells if cell.budget == budget)

    def json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Comparison:
        """The inverse of `json`. Raises pydantic.ValidationError."""
        return TypeAdapter(cls).validate_python(value)


def peers_at(cells: Sequence[Cell], budget: int) -> list[Cell]:
    """What was measured of the other methods at a budget."""
    return [cell for cell in cells if cell.budget == budget and cell.method != DEFAULT]


def budget_within_blocks(cell: Cell, num_inference_steps: int) -> int | None:
    """Evaluations with which a method would run no more blocks than its budget has, by what a step that is not computed
    cost it; None where it kept to them already, or cannot.
    """
    if cell.blocks_mean is None or cell.within_blocks(cell.budget) or cell.nfe_mean >= num_inference_steps:
        return None
    skipped = (cell.blocks_mean - cell.nfe_mean) / (num_inference_steps - cell.nfe_mean)
    found = math.floor((cell.budget - skipped * num_inference_steps) / (1.0 - skipped) + SLACK)
    return found if found >= 1 else None


def verdict_at(cells: Sequence[Cell], budget: int) -> Verdict:
    """The default against the best other method at a budget, which has one."""
    own = next(cell for cell in cells if (cell.method, cell.budget) == (DEFAULT, budget))
    peers = peers_at(cells, budget)
    best = max(peers, key=lambda cell: cell.psnr_db.mean)
    further = max(peers_at(cells, round(FURTHER * budget)), key=lambda cell: cell.psnr_db.mean, default=None)
    ahead = own.psnr_db.mean - best.psnr_db.mean
    ssim_ahead = own.ssim.mean - max(cell.ssim.mean for cell in peers)
    further_ahead = own.psnr_db.mean - further.psnr_db.mean if further else None
    worst = own.psnr_db.worst - best.psnr_db.worst
    within = [cell for cell in cells if cell.method != DEFAULT and cell.within_blocks(budget)]
    within_best = max(within, key=lambda cell: cell.psnr_db.mean, default=None)
    return Verdict(
        budget=budget,
        psnr_db=own.psnr_db.mean,
        best_peer=best.method,
        best_peer_psnr_db=best.psnr_db.mean,
        ahead_db=ahead,
        ssim_ahead=ssim_ahead,
        worst_prompt_db=worst,
        worst_within=worst >= -WORST_DB,
        further_peer=further.method if further else None,
        further_ahead_db=further_ahead,
        must=ahead >= AHEAD_DB and ssim_ahead >= 0,
        aim=ahead >= AIM_DB and further_ahead is not None and further_ahead >= 0,
        blocks_peer=within_best.method if within_best else None,
        blocks_ahead_db=own.psnr_db.mean - within_best.psnr_db.mean if within_best else None,
    )
