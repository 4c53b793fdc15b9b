"""How much a compile may cost: `--effort`, as numbers of prompts, trials and candidates.

Costs are counted in full runs of the sampler for each calibration prompt; `schedules.search.highest_costs` bounds them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

EffortName = Literal["quick", "standard", "thorough"]


@dataclass(frozen=True, kw_only=True)
class Effort:
    """What the searches may try."""

    full_runs: float
    """For each calibration prompt, its own full run among them: positions on the path keep to it."""
    calibration_prompts: int
    trials: int
    """Of the anchor search; 0 takes the graph's schedule as the anchor, without a roll-out."""
    reference_graphs: int
    """Graph schedules that are rolled out at the reference budget; 0 takes the first without a roll-out."""
    weights: int
    """Positions on the path between the two policies that are tried for each budget, at most."""
    graphs: int
    """Schedules of the graphs that are tried for each budget, at most."""
    uniform: bool
    """Whether uniform steps are tried for each budget, as few-step solvers and forecasts take them."""
    variants: int
    """Of each budget's best schedules, that are fitted with fewer and more outputs in each step as well."""
    residual_samples: int
    """Calibration samples along whose full runs the blocks' residuals are weighed; 0 leaves residuals out, but for
    `--payload residual`."""


EFFORTS: dict[EffortName, Effort] = {
    "quick": Effort(
        full_runs=2.5,
        calibration_prompts=8,
        trials=0,
        reference_graphs=0,
        weights=1,
        graphs=1,
        uniform=False,
        variants=0,
        residual_samples=0,
    ),
    "standard": Effort(
        full_runs=10.0,
        calibration_prompts=32,
        trials=20,
        reference_graphs=2,
        weights=5,
        graphs=4,
        uniform=True,
        variants=1,
        residual_samples=8,
    ),
    "thorough": Effort(
        full_runs=25.0,
        calibration_prompts=64,
        trials=240,
        reference_graphs=3,
        weights=9,
        graphs=4,
        uniform=True,
        variants=2,
        residual_samples=16,
    ),
}
