"""Few-step solvers and caches with uniform steps: what a user would do without a caching library."""

from __future__ import annotations

from ..programs.baselines import baseline_programs
from .method import Bench, Built, NotApplicable, ProgramMethod


def few_steps(name: str, source: str) -> ProgramMethod:
    """One of `baseline_programs`: a solver with `budget` steps instead of T."""

    def build(bench: Bench, budget: int) -> Built:
        found = baseline_programs(bench.pipeline.scheduler, bench.table, budget, bench.set_timesteps)
        if name not in found:
            raise NotApplicable(f"{name} cannot be built for {bench.table.scheduler} at {budget} steps")
        return Built(program=found[name])

    return ProgramMethod(name=name, group="solver", source=source, build=build)


METHODS = (
    few_steps("euler", "fewer steps of Euler"),
    few_steps("dpm++2m", "DPM-Solver++ 2M, arXiv 2211.01095"),
    few_steps("unipc", "UniPC, arXiv 2302.04867"),
    few_steps("uniform reuse", "output reused at uniform steps"),
    few_steps("uniform taylor-1", "output extrapolated at uniform steps"),
)
