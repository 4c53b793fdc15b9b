"""`otc compile --dry-run`: what a compile would take, from its options, a loaded model and a short measurement.

Consumes what `prepare.begin` gives; writes nothing. Evaluations follow the formulas by which the manifest's costs are
charged. Those of the searches are upper bounds: schedules that come up twice are evaluated once, and how many do is
known only when they are there. Seconds are extrapolated from evaluations and pictures at the size that is served, with
as many samples at once as a compile takes (`measure`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch

from otcache.schemas.errors import UsageError
from otcache.schemas.shapes import describe_size

from ..effort import EffortName
from ..options import FROM_EFFORT, CompileOptions, check_evaluations
from ..pipelines.call import prepare_scheduler
from ..pipelines.placement import LARGEST_MICRO_BATCH, SHARE
from ..programs.baselines import baseline_programs
from ..programs.lower import lower
from ..programs.solver_table import SolverTable
from ..schedules.search import FOUND, highest_costs, highest_walks
from ..sizes.served import own_point
from ..workspace.progress import Reporter
from .capture import missing_runs
from .compile import search_key, target_of
from .disk import RunBytes, conditioning_bytes, free_disk, run_bytes, scratch_bytes
from .emit import check_target
from .evaluate import evaluation_key
from .export import EXPORTS, export_key
from .measure import Measured, measure
from .prepare import needs_stages, sample_sets
from .session import Session, begin, split_of

CUT_S_PER_STAGE, EXPORT_S_PER_STAGE = 0.8, 5.7
"""Seconds to cut and to export one stage: a FLUX of 5 + 2 stages on one slow core took 5.6 s and 40 s."""
REPORT_S = 3.0
"""Seconds to draw the report and to write the artifact, apart from copying."""
REPORT_BYTES = 1_200_000
"""Report and manifest of a small artifact."""
GRAPH_BYTES = 30_000
"""An ONNX file without its weights."""
COPY_BYTES_PER_S = 2e8
"""Writing, reading back and hashing what was exported."""


@dataclass(frozen=True, kw_only=True)
class PlannedPass:
    """One pass of a compile that has not happened."""

    name: str
    evaluations: int
    """Model evaluations of one sample, all branches of guidance together; at most, where `exact` is false."""
    exact: bool
    seconds: float
    disk_bytes: int
    """What it leaves in the workspace or the target."""
    kept: bool
    """Its result is in the workspace, so that it takes no time."""
    peak_bytes: int | None = None
    """Of the device's memory, the model's weights among them, where that was measured."""


@dataclass(frozen=True, kw_only=True)
class PlannedEffort:
    """A whole compile at one effort, with nothing of it in the workspace."""

    name: str
    prompts: int
    """Of calibration."""
    full_runs: float
    """For each of them, in all; at most."""
    evaluations: int
    seconds: float
    workspace_bytes: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a compile would take."""

    model: str
    target: Path
    workspace: Path
    passes: tuple[PlannedPass, ...]
    evaluation_s: float
    """Measured: one evaluation of one sample."""
    measured: int
    """How many evaluations that was measured on."""
    free_bytes: int
    """On the target's disk."""
    run: RunBytes
    """Of one full run in the workspace."""
    scratch_bytes: int
    """Beside the full runs, while it works."""
    workspace_free_bytes: int
    """On the workspace's disk."""
    size: str
    """That was measured at."""
    picture_s: float
    """Measured: to decode a picture and to compare it with another."""
    at_once: int
    """Samples that were evaluated together."""
    at_size: Measured | None = None
    efforts: tuple[PlannedEffort, ...] = ()

    @property
    def remaining(self) -> tuple[PlannedPass, ...]:
        return tuple(each for each in self.passes if not each.kept)

    @property
    def evaluations(self) -> int:
        return sum(each.evaluations for each in self.remaining)

    @property
    def seconds(self) -> float:
        return sum(each.seconds for each in self.remaining)

    @property
    def disk_bytes(self) -> int:
        return sum(each.disk_bytes for each in self.remaining)

    @property
    def workspace_bytes(self) -> int:
        """That the workspace takes more than it has now, at most at once."""
        return self.scratch_bytes + sum(each.disk_bytes for each in self.remaining if each.name != "emit")

    @property
    def samples_that_fit(self) -> int | None:
        """Samples that the device evaluates at once; None where that was not measured or its memory is not known."""
        if self.at_size is None or self.at_size.free_bytes is None:
            return None
        one = max(1, self.at_size.evaluation_bytes // self.at_size.micro_batch)
        return min(LARGEST_MICRO_BATCH, int(SHARE * self.at_size.free_bytes) // one)

    def to_json(self) -> dict[str, Any]:
        """What `--dry-run --json` prints."""
        found: dict[str, Any] = {
            "model": self.model,
            "target": str(self.target),
            "workspace": str(self.workspace),
            "passes": [asdict(each) for each in self.passes],
            "evaluations": self.evaluations,
            "seconds": round(self.seconds, 1),
            "disk_bytes": self.disk_bytes,
            "free_bytes": self.free_bytes,
            "evaluation_s": self.evaluation_s,
            "picture_s": self.picture_s,
            "measured_evaluations": self.measured,
            "measured_at": self.size,
            "samples_at_once": self.at_once,
            "full_run_bytes": asdict(self.run),
            "scratch_bytes": self.scratch_bytes,
            "workspace_bytes": self.workspace_bytes,
            "workspace_free_bytes": self.workspace_free_bytes,
        }
        if self.at_size is not None:
            found["at_size"] = {**asdict(self.at_size), "peak_bytes": self.at_size.peak_bytes}
            found["samples_that_fit"] = self.samples_that_fit
            found["efforts"] = [asdict(each) for each in self.efforts]
        return found

    def text(self) -> str:
        """For people."""
        memory = "" if self.at_size is None else f"{'memory':>11}"
        lines = [f"{'pass':<22}{'evaluations':>14}{'time':>10}{'disk':>11}{memory}"]
        for each in self.passes:
            bound = "" if each.exact or not each.evaluations else "≤ "
            kept = "  in the workspace" if each.kept else ""
            peak = "" if self.at_size is None else f"{_size(each.peak_bytes) if each.peak_bytes else '–':>11}"
            lines.append(
                f"{each.name:<22}{bound + format(each.evaluations, ','):>14}{_time(each.seconds):>10}"
                f"{_size(each.disk_bytes):>11}{peak}{kept}"
            )
        lines += [
            f"{'to do':<22}{'≤ ' + format(self.evaluations, ','):>14}"
            f"{_time(self.seconds):>10}{_size(self.disk_bytes):>11}",
            f"An evaluation is one sample through the model. Measured at {self.size}, {self.at_once} samples at once: "
            f"{self.evaluation_s:.3g} s an evaluation ({self.measured} were timed), {self.picture_s:.3g} s a picture. "
            "Times are extrapolated from these; those of searches are upper bounds.",
            *self._size_lines(),
            self._workspace_line(),
            f"artifact: {self.target} ({_size(self.free_bytes)} free); workspace: {self.workspace}; nothing was "
            "written",
        ]
        return "\n".join(lines)

    def _workspace_line(self) -> str:
        run = self.run
        short = ", which is too little" if self.workspace_bytes > self.workspace_free_bytes else ""
        return (
            f"workspace: {_size(self.workspace_bytes)} to come, of which {_size(self.scratch_bytes)} scratch that goes "
            f"again; {_size(self.workspace_free_bytes)} free{short}. A full run keeps {_size(run.kept)}: latents "
            f"{_size(run.latents)}, inner products {_size(run.gram)}, conditioning {_size(run.conditioning)}, pictures "
            f"{_size(run.pictures)}."
        )

    def _size_lines(self) -> list[str]:
        if self.at_size is None:
            return []
        found, fit = self.at_size, self.samples_that_fit
        lines = [
            f"{'effort':<10}{'prompts':>9}{'full runs a prompt':>20}{'evaluations':>14}{'time':>10}{'workspace':>11}"
        ]
        lines += [
            f"{each.name:<10}{each.prompts:>9}{'≤ ' + format(each.full_runs, '.1f'):>20}"
            f"{'≤ ' + format(each.evaluations, ','):>14}{_time(each.seconds):>10}{_size(each.workspace_bytes):>11}"
            for each in self.efforts
        ]
        known = "" if found.free_bytes is None else f" of {_size(found.free_bytes)} free: {fit} samples at once fit"
        return [
            *lines,
            f"{found.micro_batch} samples at once take {_size(found.evaluation_bytes)} beside "
            f"{_size(found.model_bytes)} of weights{known}; a picture takes {_size(found.picture_bytes)}.",
        ]


@dataclass(frozen=True)
class Rates:
    """What passes are extrapolated from."""

    evaluation_s: float
    picture_s: float = 0.0
    peak_bytes: int | None = None


def plan_compile(options: CompileOptions, reporter: Reporter | None = None, *, at_size: bool = False) -> Plan:
    """What `compile_model` would take with these options. Raises what it would raise before its first pass.

    at_size: say also what each effort would take, and the memory.
    """
    if options.wanted:
        raise UsageError("--dry-run with --target: its budgets are found on the way: give --budgets that may reach it")
    reporter = reporter or Reporter()
    if options.search_size is not None:
        reporter.note("--search-size: searches are planned at the compiled size, on all prompts, as an upper bound")
    target = target_of(options)
    check_target(target, force=options.force)
    session, prompts, held_out = begin(options, reporter)
    table = _full_table(session)
    with reporter.on("measure", "a few model evaluations"):
        found = measure(session, prompts)
        rates = Rates(found.evaluation_s, found.picture_s, found.peak_bytes if at_size else None)
        run = run_bytes(session, table.num_inference_steps, conditioning_bytes(session, prompts))
    passes = _passes(session, table, prompts, held_out, rates, run)
    return Plan(
        model=session.model.name,
        target=target,
        workspace=session.workspace.folder,
        passes=tuple(passes),
        evaluation_s=rates.evaluation_s,
        measured=found.evaluations,
        size=describe_size(own_point(session.call)),
        picture_s=found.picture_s,
        at_once=found.micro_batch,
        free_bytes=free_disk(target),
        run=run,
        scratch_bytes=scratch_bytes(session, len(prompts), len(held_out)),
        workspace_free_bytes=free_disk(session.workspace.folder),
        at_size=found if at_size else None,
        efforts=tuple(_efforts(session, table, rates, run)) if at_size else (),
    )


def _efforts(session: Session, table: SolverTable, rates: Rates, run: RunBytes) -> Iterator[PlannedEffort]:
    """Every effort, with what the user chose beside it."""
    own, steps = session.options, table.num_inference_steps
    changes: dict[str, Any] = {
        name: FROM_EFFORT
        for name in ("trials", "calibration_prompts")
        if getattr(own, name) == getattr(own.limits, name)
    }
    for name in get_args(EffortName):
        other = replace(session, options=replace(own, effort=name, **changes))
        prompts, held_out = split_of(other.options, other.model)
        passes = list(_passes(other, table, prompts, held_out, rates, run))
        searches = sum(highest_costs(other.options, len(prompts), steps).values())
        yield PlannedEffort(
            name=name,
            prompts=len(prompts),
            full_runs=1.0 + searches,
            evaluations=sum(each.evaluations for each in passes),
            seconds=sum(each.seconds for each in passes),
            workspace_bytes=scratch_bytes(other, len(prompts), len(held_out))
            + sum(each.disk_bytes for each in passes if each.name != "emit"),
        )


def _passes(
    session: Session,
    table: SolverTable,
    prompts: Sequence[str],
    held_out: Sequence[str],
    rates: Rates,
    run: RunBytes,
) -> Iterator[PlannedPass]:
    """All passes in their order, up to the programs' evaluation, and then those that write the artifact."""
    options, steps = session.options, table.num_inference_steps
    check_evaluations(options, steps, table.scheduler)
    count = len(prompts)
    searched = session.workspace.has("search", search_key(session), ".json")
    measured = searched and evaluated(session, held_out)
    programs, peers = evaluation_counts(session, table, len(held_out))

    def planned(
        name: str, evaluations: float, pictures: int, kept: bool, *, disk: int = 0, exact: bool = True
    ) -> PlannedPass:
        whole = round(evaluations)
        return PlannedPass(
            name=name,
            evaluations=whole,
            exact=exact,
            seconds=whole * rates.evaluation_s + pictures * rates.picture_s,
            disk_bytes=disk,
            kept=kept,
            peak_bytes=rates.peak_bytes if whole else None,
        )

    calibration, evaluation = sample_sets(session, prompts, held_out)
    kept = not missing_runs(session, calibration)
    yield planned("capture", steps * count, count, kept, disk=run.kept * count)
    walks = highest_walks(options, count, steps)
    for name, full_runs in highest_costs(options, count, steps).items():
        pictures, exact = walks.get(name, 0) * count, name in ("residuals", "edges")
        yield planned(name, full_runs * steps * count, pictures, searched, exact=exact)
    kept = not missing_runs(session, evaluation)
    yield planned("held-out runs", steps * len(held_out), len(held_out), kept, disk=run.kept * len(held_out))
    yield planned("programs", programs, len(options.budgets) * len(held_out), measured)
    yield planned("peers", sum(peers), len(peers) * len(held_out), measured)
    yield from _writing_passes(session)


def _writing_passes(session: Session) -> Iterator[PlannedPass]:
    """Cut and exports, where engines are asked for, and the artifact."""
    options = session.options

    def planned(name: str, seconds: float, disk_bytes: float, kept: bool = False) -> PlannedPass:
        return PlannedPass(
            name=name, evaluations=0, exact=True, seconds=seconds, disk_bytes=round(disk_bytes), kept=kept
        )

    trunk, item_bytes = _stage_count(session.model.transformer), getattr(torch, options.dtype).itemsize
    if needs_stages(session):
        yield planned("cut", CUT_S_PER_STAGE * (trunk + 2), 0)
    whole = 0
    if options.engines == "onnx":
        modules = {EXPORTS[1]: session.encoders and session.encoders.module, EXPORTS[2]: session.decoder}
        weights = {
            EXPORTS[0]: (trunk, _weight_bytes(session.model.transformer, item_bytes)),
            **{name: (1, _weight_bytes(module)) if module else (0, 0) for name, module in modules.items()},
        }
        for name in EXPORTS:
            stages, weight_bytes = weights[name]
            size = weight_bytes + stages * GRAPH_BYTES
            whole += size
            kept = session.workspace.has(name, export_key(session, name), "")
            yield planned(name, stages * EXPORT_S_PER_STAGE + size / COPY_BYTES_PER_S, size, kept)
    yield planned("emit", REPORT_S + whole / COPY_BYTES_PER_S, whole + REPORT_BYTES)


def evaluated(session: Session, held_out: Sequence[str]) -> bool:
    """Whether every budget's evaluation is in the workspace; to be asked when the searches are."""
    path = session.workspace.path("search", search_key(session), ".json")
    found = FOUND.validate_python(json.loads(path.read_text(encoding="utf-8")))
    keys = [evaluation_key(session, held_out, budget, trials[0].program) for budget, trials in found.trials.items()]
    return all(
        session.workspace.has(*each) for key in keys for each in (("measured", key, ".json"), ("pictures", key, ".npz"))
    )


def evaluation_counts(session: Session, table: SolverTable, held_out: int) -> tuple[int, list[int]]:
    """Evaluations of pass `evaluate` on all held-out prompts: of the budgets' programs together, and of each peer.

    Peers are lowered, which takes no evaluation: what they cost is known exactly.
    """
    pipeline, options = session.model.pipeline, session.options

    def set_timesteps(scheduler: Any, steps: int) -> None:
        prepare_scheduler(pipeline, session.call, scheduler, steps)

    peers = [
        peer.nfe * held_out
        for budget in options.budgets
        for peer in baseline_programs(pipeline.scheduler, table, budget, set_timesteps).values()
    ]
    return sum(options.budgets) * held_out, peers


def _full_table(session: Session) -> SolverTable:
    """The pipeline's own sampler, lowered."""
    scheduler = session.model.pipeline.scheduler
    prepare_scheduler(session.model.pipeline, session.call, scheduler, session.call.num_inference_steps)
    return lower(scheduler, step_options=session.interface.step_options)


def _stage_count(transformer: torch.nn.Module) -> int:
    """Embed, blocks and head; blocks are the elements of its lists of modules."""
    lists = [child for child in transformer.children() if isinstance(child, torch.nn.ModuleList)]
    return 2 + sum(len(child) for child in lists)


def _weight_bytes(module: torch.nn.Module, item_bytes: int = 4) -> int:
    """Weights as they are exported, each once."""
    return sum(item_bytes * parameter.numel() for parameter in {id(p): p for p in module.parameters()}.values())


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _size(size_bytes: float) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size_bytes >= scale:
            return f"{size_bytes / scale:.1f} {unit}"
    return f"{size_bytes:.0f} B"
