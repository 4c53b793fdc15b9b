"""A method at a budget → a `Cell`: what `otc compare` writes down, kept in the workspace so that nothing is measured
twice.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, replace
from typing import Any

from pydantic import TypeAdapter

from otcache.schemas.program import Program

from ..calibration import metrics
from ..calibration.outcomes import Evaluation
from ..calibration.trials import Calibration
from ..passes.capture import full_runs
from ..passes.evaluate import held_out_trajectory
from ..passes.prepare import Prepared
from ..pipelines.denoiser import denoiser_of
from ..schedules.search import Found
from ..workspace.ledger import Attempts
from .cells import DEFAULT, Cell, Skipped, Spread
from .method import Bench, Method, NotApplicable, Outcome, ProgramMethod

_LOG = logging.getLogger(__name__)


def bench_of(prepared: Prepared) -> Bench:
    """What every method is given."""
    session, options = prepared.session, prepared.session.options
    trajectory = held_out_trajectory(prepared)
    evaluation = Evaluation(
        denoiser=denoiser_of(session.model.transformer, session.interface, trajectory),
        trajectory=trajectory,
        decode=session.decode,
        references=session.decode(trajectory.latents[-1]),
        stages=prepared.stages,
    )
    calibration = nominal_calibration(prepared)
    return Bench(
        pipeline=session.model.pipeline,
        call=session.call,
        table=prepared.table,
        calibration=calibration,
        evaluation=evaluation,
        prompts=tuple(prepared.held_out),
        seeds=prepared.held_out_seeds,
        calibration_prompts=tuple(prepared.prompts),
        calibration_seeds=prepared.seeds,
        guidance_scale=options.nominal_scale,
        workspace=session.workspace,
        key=[session.key, list(prepared.held_out)],
        set_timesteps=prepared.set_timesteps,
        seed=options.seed,
    )


def default_method(found: Found) -> ProgramMethod:
    """What a compile came to, as a method beside its peers."""
    programs = {budget: trials[0].program for budget, trials in found.trials.items()}

    def build(bench: Bench, budget: int) -> Program:
        if budget not in programs:
            raise NotApplicable(f"not compiled for {budget}")
        return programs[budget]

    return ProgramMethod(name=DEFAULT, group="otcache", source="this compiler's choice", build=build, made_of=programs)


def measured(bench: Bench, method: Method, budget: int) -> Cell | Skipped:
    """The method on the held-out prompts, or what that came to before."""

    def compute() -> dict[str, Any]:
        try:
            return asdict(_scored(bench, method, budget, method.run(bench, budget)))
        except NotApplicable as error:
            return {"reason": str(error)}

    made_of = method.made_of.get(budget) if isinstance(method, ProgramMethod) else None
    name = "compare-" + "".join(c if c.isalnum() else "-" for c in method.name)
    key = [bench.key, method.name, budget, made_of and made_of.model_dump(mode="json")]
    value = bench.workspace.json(name, key, compute)
    if "reason" in value:
        _LOG.info("%s at %d: %s", method.name, budget, value["reason"])
        return Skipped(method=method.name, budget=budget, reason=value["reason"])
    return TypeAdapter(Cell).validate_python(value)


def _scored(bench: Bench, method: Method, budget: int, outcome: Outcome) -> Cell:
    pictures, references = bench.evaluation.decode(outcome.latents), bench.evaluation.references
    lpips = bench.calibration.lpips
    return Cell(
        method=method.name,
        group=method.group,
        budget=budget,
        nfe_mean=float(outcome.nfe.mean()),
        nfe_worst=float(outcome.nfe.max()),
        psnr_db=Spread.of(metrics.psnr(pictures, references)),
        ssim=Spread.of(metrics.ssim(pictures, references)),
        lpips=float(lpips(pictures, references).mean()) if lpips else None,
        seconds=outcome.seconds,
        setting=outcome.setting,
        full_runs=outcome.full_runs,
    )


def nominal_calibration(prepared: Prepared) -> Calibration:
    """The calibration set without the margin, for methods that are compared with ours: each is fitted to what is
    served.
    """
    session, attempts = prepared.session, Attempts()
    trajectory = full_runs(session, "capture", prepared.prompts, session.options.seed)
    return replace(
        prepared.calibration,
        denoiser=denoiser_of(session.model.transformer, session.interface, trajectory),
        trajectory=trajectory,
        references=session.decode(trajectory.latents[-1]),
        fitted={},
        attempts=attempts,
    )
