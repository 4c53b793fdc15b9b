"""The passes up to the searches: options → `Prepared`: load, probe, lower, capture and cut. What all passes share is a
`Session`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from otcache.schemas.errors import ModelError

from ..calibration import metrics
from ..calibration.batch import Evaluator
from ..calibration.local import LocalSamples
from ..calibration.runs import Runs
from ..calibration.samples import Samples
from ..calibration.trials import Calibration
from ..graph.stages import Stages
from ..models.model import Model
from ..options import CompileOptions, check_evaluations
from ..pipelines.call import prepare_scheduler, short_call
from ..pipelines.denoiser import Denoiser, denoiser_of, place_constants
from ..pipelines.full_run import capture
from ..programs.lower import lower
from ..programs.solver_table import SolverTable
from ..sizes.requested import Wanted
from ..sizes.served import Sizes, sizes_without_stages, stages_for
from ..workspace.ledger import Ledger
from ..workspace.progress import Reporter
from .capture import full_runs, missing_runs
from .crew import AnyRuns, Crew, SampleSet
from .disk import check_disk, run_bytes
from .session import EVALUATION_SEED, Session, begin


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A model with its sampler lowered, its transformer cut and its calibration set run: what searches start from."""

    session: Session
    runs: AnyRuns
    """Of the calibration set."""
    table: SolverTable
    stages: Stages | None
    """None where nothing asks for a cut."""
    sizes: Sizes = field(default_factory=Sizes)
    """Those of the session's that the stages take."""
    calibration: Calibration
    prompts: list[str]
    held_out: list[str]

    @property
    def seeds(self) -> tuple[int, ...]:
        """Of the calibration set."""
        return tuple(self.session.options.seed + i for i in range(len(self.prompts)))

    @property
    def held_out_seeds(self) -> tuple[int, ...]:
        """Of the held-out prompts."""
        return tuple(self.session.options.seed + EVALUATION_SEED + i for i in range(len(self.held_out)))

    def set_timesteps(self, scheduler: Any, steps: int) -> None:
        """Prepare a scheduler as the pipeline prepares its own."""
        prepare_scheduler(self.session.model.pipeline, self.session.call, scheduler, steps)

    @property
    def samples(self) -> Samples:
        """Of the calibration set."""
        return self.calibration.samples

    @property
    def trunk(self) -> Stages:
        """The stages, where something asks for a cut."""
        assert self.stages is not None, "needs_stages"
        return self.stages


def prepare(
    options: CompileOptions,
    reporter: Reporter,
    held: contextlib.ExitStack | None = None,
    live: Model | None = None,
    *,
    like: Prepared | None = None,
    crew: Crew | None = None,
) -> Prepared:
    """The passes up to the searches: load, probe, lower, capture, cut.

    Args:
        options: what the user chose.
        reporter: told of every pass.
        held: keeps other compiles out of the workspace until it is closed; without it they may work at the same time.
        live: the model where it is in memory.
        like: the same model at the same size, prepared for other guidance or other prompts: it is not loaded and cut
            again.
        crew: makes full runs and holds samples in place of this process.
    """
    session, prompts, held_out = begin(options, reporter, like.session.model if like else live)
    session = replace(session, crew=crew or (like.session.crew if like else None))
    if held:
        folder = session.workspace.folder
        held.enter_context(
            session.workspace.hold(
                lambda: reporter.note(f"another compile of this model is at work in {folder}: waiting until it ends")
            )
        )
    with reporter.on("lower", type(session.model.pipeline.scheduler).__name__):
        table = lower_sampler(session)
        check_evaluations(options, table.num_inference_steps, table.scheduler)
    if session.crew is None:
        check_workspace(session, table.num_inference_steps, prompts, held_out)
    runs = full_runs(session, table, "capture", prompts, options.seed, session.margin)
    if like:
        stages, sizes = like.stages, like.sizes
    else:
        stages, sizes = stages_of(session, partial(example_of, session, runs) if needs_stages(session) else None)
    session = with_tables(session, sizes)
    samples = samples_of(session, runs, table, stages)
    if held:
        held.callback(samples.close)
    return Prepared(
        session=session,
        runs=runs,
        table=table,
        stages=stages,
        sizes=sizes,
        calibration=_calibration(session, samples, table),
        prompts=prompts,
        held_out=held_out,
    )


def check_workspace(session: Session, steps: int, prompts: Sequence[str], held_out: Sequence[str]) -> None:
    """Raises HostError where the workspace's disk has no room for the full runs that are not there yet."""
    wanted = sample_sets(session, prompts, held_out)
    check_room(session, steps, sum(each.count for each in wanted if missing_runs(session, each)))


def sample_sets(session: Session, prompts: Sequence[str], held_out: Sequence[str]) -> tuple[SampleSet, SampleSet]:
    """The calibration set and the held-out one."""
    seed = session.options.seed
    return (
        SampleSet(name="capture", prompts=tuple(prompts), seed=seed, margin=session.margin),
        SampleSet(name="evaluate", prompts=tuple(held_out), seed=seed + EVALUATION_SEED),
    )


def check_room(session: Session, steps: int, missing: int) -> None:
    """Raises HostError where the workspace's disk has no room for so many full runs."""
    check_disk(session.workspace.folder, missing * run_bytes(session, steps).kept, f"{missing} full runs")


def lower_sampler(session: Session) -> SolverTable:
    """The pipeline's own sampler as coefficients."""
    scheduler = session.model.pipeline.scheduler
    prepare_scheduler(session.model.pipeline, session.call, scheduler, session.options.num_inference_steps)
    return lower(scheduler, step_options=session.interface.step_options)


def evaluator_of(session: Session, table: SolverTable, stages: Stages | None, *, lpips: bool = False) -> Evaluator:
    """The model on its device, as sets of samples use it; LPIPS is measured with `lpips`, or where it is maximised."""
    measured = lpips or session.options.objective == "lpips"
    return Evaluator(
        transformer=session.model.transformer,
        interface=place_constants(session.interface, session.placement.device),
        device=session.placement.device,
        decode=session.decode,
        table=table,
        stages=stages,
        lpips=metrics.lpips_metric() if measured else None,
        evaluated=session.reporter.evaluated,
    )


def samples_of(
    session: Session, runs: AnyRuns, table: SolverTable, stages: Stages | None, *, lpips: bool = False, first: int = 0
) -> Samples:
    """Full runs with the model, where the runs are; `lpips` as of `evaluator_of`, `first` as of `Batch`."""
    if not isinstance(runs, Runs):
        return runs.samples(cut=stages is not None, lpips=lpips or session.options.objective == "lpips")
    evaluator = evaluator_of(session, table, stages, lpips=lpips)
    return LocalSamples(runs, evaluator, session.micro_batch, session.workspace.folder, first=first)


def calibration_of(
    session: Session, runs: AnyRuns, table: SolverTable, stages: Stages | None, *, ledger: Ledger | None = None
) -> Calibration:
    """A way to try schedules on full runs; what was tried is kept in the workspace unless a ledger says otherwise."""
    return _calibration(session, samples_of(session, runs, table, stages), table, ledger)


def _calibration(session: Session, samples: Samples, table: SolverTable, ledger: Ledger | None = None) -> Calibration:
    """Of samples that are there."""
    return Calibration(
        samples=samples,
        table=table,
        objective=session.options.objective,
        ledger=ledger or Ledger(session.workspace, [session.key, session.margin, session.objective]),
    )


def needs_stages(session: Session) -> bool:
    """Whether anything that follows runs the model in parts."""
    options = session.options
    if session.placement.offload != "none":
        return False
    if options.payload == "residual":
        return True
    exports = options.engines == "onnx"
    return exports and (
        session.placement.exportable or (options.payload == "auto" and options.limits.residual_samples > 0)
    )


def stages_of(session: Session, example: Callable[[], dict[str, Tensor]] | None) -> tuple[Stages | None, Sizes]:
    """The stages of a model that is cut, None of one that is not (`example` is None), and the sizes that are served."""
    stages, sizes = (None, Sizes()) if example is None else cut_stages(session, example())
    if stages is None or not session.placement.exportable:
        sizes = sizes_without_stages(session.wanted, session.seen)
    return stages, sizes


def with_tables(session: Session, sizes: Sizes) -> Session:
    """The session, its interface with the tables that stages take as inputs."""
    return replace(session, interface=replace(session.interface, tables=sizes.own_tables))


def cut_stages(session: Session, example: dict[str, Tensor]) -> tuple[Stages, Sizes]:
    """The stages, with as many of the wanted sizes as they take.

    example: transformer inputs with a batch of 2 · branches.
    """
    transformer = session.model.transformer
    own = session.placement.exportable
    session.model.give_back()  # what the full runs have read
    interface = place_constants(session.interface, session.placement.device)
    with session.reporter.on("cut", type(transformer).__name__):
        stages, sizes = stages_for(
            transformer, interface, example, session.wanted if own else Wanted(), session.seen if own else ()
        )
    if session.options.engines == "none" and len(stages.features) != 1:
        raise ModelError(
            f"--payload residual with --engines none: hosts cache one tensor behind the blocks, and "
            f"{type(transformer).__name__} has {len(stages.features)}: use --payload output"
        )
    for axis, reason in sizes.fixed.items():
        session.reporter.note(f"{axis} stays as compiled: {reason}")
    return stages, sizes


def example_of(session: Session, runs: AnyRuns) -> dict[str, Tensor]:
    """Transformer inputs with a batch of 2 · branches (4 for guided models), taken from the calibration set."""
    device, dtype, rows = session.placement.device, session.interface.dtype, slice(2)
    middle = runs.num_inference_steps // 2
    denoiser = Denoiser(
        transformer=session.model.transformer,
        interface=session.interface,
        conditioning={
            name: value.to(device, dtype if value.is_floating_point() else value.dtype)
            for name, value in runs.conditioning(rows).items()
        },
        guidance=torch.from_numpy(runs.guidance(rows)).to(device),
    )
    return denoiser.inputs(torch.from_numpy(runs.latents(rows, middle)).to(device), runs.timesteps[middle], 1.0)


def example_of_short_run(session: Session, prompts: Sequence[str]) -> dict[str, Tensor]:
    """As `example_of`, where there are no full runs: of two samples that are run for a few steps."""
    scale, device = session.options.nominal_scale, session.placement.device
    pipeline, interface = session.model.pipeline, session.interface
    short = short_call(pipeline, session.call)
    few = capture(pipeline, interface, short, (list(prompts) * 2)[:2], [0, 1], [scale] * 2).to(device)
    denoiser = denoiser_of(session.model.transformer, place_constants(interface, device), few)
    return denoiser.inputs(few.latents[1].to(device), few.timesteps[1], 1.0)
