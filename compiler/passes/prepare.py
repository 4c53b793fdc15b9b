"""The passes up to the searches: options → `Prepared`: load, probe, capture, lower and cut. What all passes share is a
`Session`.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ..calibration import metrics
from ..calibration.trials import Calibration
from ..graph.stages import Stages
from ..models.model import Model
from ..options import CompileOptions, check_evaluations
from ..pipelines.call import prepare_scheduler
from ..pipelines.denoiser import denoiser_of
from ..pipelines.trajectory import Trajectory
from ..programs.lower import lower
from ..programs.solver_table import SolverTable
from ..sizes.served import Sizes, stages_for
from ..workspace.ledger import Attempts
from ..workspace.progress import Reporter
from .capture import full_runs
from .session import EVALUATION_SEED, Session, begin


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A model with its sampler lowered, its transformer cut and its calibration set run: what searches start from."""

    session: Session
    trajectory: Trajectory
    """Of the calibration set."""
    table: SolverTable
    stages: Stages
    sizes: Sizes
    """Those of the session's that the stages take."""
    calibration: Calibration
    prompts: list[str]
    held_out: list[str]

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(self.session.options.seed + i for i in range(len(self.prompts)))

    @property
    def held_out_seeds(self) -> tuple[int, ...]:
        return tuple(self.session.options.seed + EVALUATION_SEED + i for i in range(len(self.held_out)))

    def set_timesteps(self, scheduler: Any, steps: int) -> None:
        """Prepare a scheduler as the pipeline prepares its own."""
        prepare_scheduler(self.session.model.pipeline, self.session.call, scheduler, steps)


def prepare(
    options: CompileOptions,
    reporter: Reporter,
    held: contextlib.ExitStack | None = None,
    live: Model | None = None,
    *,
    like: Prepared | None = None,
) -> Prepared:
    """The passes up to the searches: load, probe, capture, lower, cut.

    held: keeps other compiles out of the workspace until it is closed; without it they may work at the same time.
    like: the same model at the same size, prepared for other guidance or other prompts: it is not loaded and cut again.
    """
    session, prompts, held_out = begin(options, reporter, like.session.model if like else live)
    model = session.model
    lpips = metrics.lpips_metric() if options.objective == "lpips" else None
    if held:
        folder = session.workspace.folder
        held.enter_context(
            session.workspace.held(
                lambda: reporter.note(f"another compile of this model is at work in {folder}: waiting until it ends")
            )
        )
    with reporter.on("lower", type(model.pipeline.scheduler).__name__):
        prepare_scheduler(model.pipeline, session.call, model.pipeline.scheduler, options.num_inference_steps)
        table = lower(model.pipeline.scheduler, step_options=session.interface.step_options)
        check_evaluations(options, table.num_inference_steps, table.scheduler)
    trajectory = full_runs(session, "capture", prompts, options.seed, session.margin)
    stages, sizes = (like.stages, like.sizes) if like else _cut(session, trajectory)
    session = replace(session, interface=replace(session.interface, tables=sizes.own_tables))
    attempts = Attempts(session.workspace, [session.key, session.margin, options.objective])
    calibration = Calibration(
        denoiser=denoiser_of(model.transformer, session.interface, trajectory),
        trajectory=trajectory,
        table=table,
        decode=session.decode,
        references=session.decode(trajectory.latents[-1]),
        objective=options.objective,
        stages=stages,
        lpips=lpips,
        attempts=attempts,
    )
    return Prepared(
        session=session,
        trajectory=trajectory,
        table=table,
        stages=stages,
        sizes=sizes,
        calibration=calibration,
        prompts=prompts,
        held_out=held_out,
    )


def _cut(session: Session, trajectory: Trajectory) -> tuple[Stages, Sizes]:
    """The stages, with as many of the wanted sizes as they take."""
    transformer, example = session.model.transformer, example_of(session, trajectory)
    session.model.give_back()  # what the full runs have read
    with session.reporter.on("cut", type(transformer).__name__):
        stages, sizes = stages_for(transformer, session.interface, example, session.wanted, session.seen)
    for axis, reason in sizes.fixed.items():
        session.reporter.note(f"{axis} stays as compiled: {reason}")
    return stages, sizes


def example_of(session: Session, trajectory: Trajectory) -> dict[str, Tensor]:
    """Transformer inputs with a batch of 2 · branches (4 for guided models), taken from the calibration set."""
    part = trajectory.rows(slice(2))
    denoiser = denoiser_of(session.model.transformer, session.interface, part)
    middle = len(trajectory.timesteps) // 2
    return denoiser.inputs(part.latents[middle], trajectory.timesteps[middle], 1.0)
