"""`otc compile --dry-run`: what a compile would take, from its options, a loaded model and a short measurement.

Consumes what `prepare.begin` gives; writes nothing. Evaluations follow the formulas by which the manifest's costs are
charged. Those of the searches are upper bounds: schedules that come up twice are evaluated once, and how many do is
known only when they are there. Seconds are extrapolated from a few model evaluations, everything else from measured
rates.
"""

from __future__ import annotations

import json
import shutil
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..options import CompileOptions, check_evaluations
from ..pipelines.call import prepare_scheduler
from ..pipelines.probe import PROBE_SAMPLES, probe
from ..programs.baselines import baseline_programs
from ..programs.lower import lower
from ..programs.solver_table import SolverTable
from ..schedules.search import FOUND, highest_costs
from ..workspace.progress import Reporter
from .capture import calibration_scales, capture_chunks, capture_key
from .compile import search_key, target_of
from .emit import check_target
from .evaluate import evaluation_key
from .export import EXPORTS, export_key
from .session import EVALUATION_SEED, Session, begin

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

    def to_json(self) -> dict[str, Any]:
        """What `--dry-run --json` prints."""
        return {
            "model": self.model,
            "target": str(self.target),
            "workspace": str(self.workspace),
            "passes": [asdict(each) for each in self.passes],
            "evaluations": self.evaluations,
            "seconds": round(self.seconds, 1),
            "disk_bytes": self.disk_bytes,
            "free_bytes": self.free_bytes,
            "evaluation_s": self.evaluation_s,
            "measured_evaluations": self.measured,
        }

    def text(self) -> str:
        """For people."""
        lines = [f"{'pass':<22}{'evaluations':>14}{'time':>10}{'disk':>11}"]
        for each in self.passes:
            bound = "" if each.exact or not each.evaluations else "≤ "
            kept = "  in the workspace" if each.kept else ""
            lines.append(
                f"{each.name:<22}{bound + format(each.evaluations, ','):>14}{_time(each.seconds):>10}"
                f"{_size(each.disk_bytes):>11}{kept}"
            )
        lines += [
            f"{'to do':<22}{'≤ ' + format(self.evaluations, ','):>14}"
            f"{_time(self.seconds):>10}{_size(self.disk_bytes):>11}",
            f"An evaluation is one sample through the model; one took {self.evaluation_s:.3g} s, "
            f"measured on {self.measured}. "
            "Times are extrapolated from that and rough; those of searches are upper bounds.",
            f"artifact: {self.target} ({_size(self.free_bytes)} free); workspace: {self.workspace}; "
            "nothing was written",
        ]
        return "\n".join(lines)


def plan_compile(options: CompileOptions, reporter: Reporter | None = None) -> Plan:
    """What `compile_model` would take with these options. Raises what it would raise before its first pass."""
    reporter = reporter or Reporter()
    target = target_of(options)
    check_target(target, force=options.force)
    session, prompts, held_out = begin(options, reporter)
    with reporter.on("measure", "a few model evaluations"):
        evaluation_s, measured = _evaluation_seconds(session, prompts)
    passes = _passes(session, prompts, held_out, evaluation_s)
    absolute = target.absolute()
    existing = next(folder for folder in (absolute, *absolute.parents) if folder.exists())
    return Plan(
        model=session.model.name,
        target=target,
        workspace=session.workspace.folder,
        passes=tuple(passes),
        evaluation_s=evaluation_s,
        measured=measured,
        free_bytes=shutil.disk_usage(existing).free,
    )


def _passes(
    session: Session, prompts: Sequence[str], held_out: Sequence[str], evaluation_s: float
) -> Iterator[PlannedPass]:
    options, workspace, table = session.options, session.workspace, _full_table(session)
    steps = table.num_inference_steps
    check_evaluations(options, steps, table.scheduler)

    def planned(name: str, evaluations: float, disk_bytes: float, kept: bool, exact: bool = True, other_s: float = 0.0):  # type: ignore[no-untyped-def]
        count = round(evaluations)
        return PlannedPass(
            name=name,
            evaluations=count,
            exact=exact,
            seconds=count * evaluation_s + other_s,
            disk_bytes=round(disk_bytes),
            kept=kept,
        )

    trajectory_bytes = 4 * (2 * steps + 1) * _numel(session.interface.latents_shape)
    yield planned(
        "capture",
        steps * len(prompts),
        trajectory_bytes * len(prompts),
        captured(session, "capture", prompts, options.seed, session.margin),
    )
    searched = workspace.has("search", search_key(session), ".json")
    for name, full_runs in highest_costs(options, len(prompts), steps).items():
        exact = name in ("residuals", "edges")
        yield planned(name, full_runs * steps * len(prompts), 0, searched, exact)
    seed = options.seed + EVALUATION_SEED
    yield planned(
        "held-out runs",
        steps * len(held_out),
        trajectory_bytes * len(held_out),
        captured(session, "evaluate", held_out, seed),
    )
    kept = searched and evaluated(session, held_out)
    yield planned("evaluate", evaluation_count(session, table, len(held_out)), 0, kept)
    trunk, item_bytes = _stage_count(session.model.transformer), getattr(torch, options.dtype).itemsize
    modules = {EXPORTS[1]: session.encoders and session.encoders.module, EXPORTS[2]: session.decoder}
    weights = {
        "cut": (0, 0),
        EXPORTS[0]: (trunk, _weight_bytes(session.model.transformer, item_bytes)),
        **{name: (1, _weight_bytes(module)) if module else (0, 0) for name, module in modules.items()},
    }
    yield planned("cut", 0, 0, False, other_s=CUT_S_PER_STAGE * (trunk + 2))
    whole = 0
    for name in EXPORTS:
        stages, weight_bytes = weights[name]
        size = weight_bytes + stages * GRAPH_BYTES
        whole += size
        kept = workspace.has(name, export_key(session, name), "")
        yield planned(name, 0, size, kept, other_s=stages * EXPORT_S_PER_STAGE + size / COPY_BYTES_PER_S)
    yield planned("emit", 0, whole + REPORT_BYTES, False, other_s=REPORT_S + whole / COPY_BYTES_PER_S)


def captured(session: Session, name: str, prompts: Sequence[str], seed: int, margin: float = 1.0) -> bool:
    """Whether all full runs of `prompts` are in the workspace."""
    scales = calibration_scales(*session.options.guidance_scale, len(prompts), margin)
    return all(
        session.workspace.has(name, capture_key(session, list(prompts[rows]), seed + rows.start, scales[rows]), "")
        for rows in capture_chunks(session, len(prompts))
    )


def evaluated(session: Session, held_out: Sequence[str]) -> bool:
    """Whether every budget's evaluation is in the workspace; to be asked when the searches are."""
    path = session.workspace.path("search", search_key(session), ".json")
    found = FOUND.validate_python(json.loads(path.read_text(encoding="utf-8")))
    keys = [evaluation_key(session, held_out, budget, trials[0].program) for budget, trials in found.trials.items()]
    return all(
        session.workspace.has(*each) for key in keys for each in (("measured", key, ".json"), ("pictures", key, ".npz"))
    )


def evaluation_count(session: Session, table: SolverTable, held_out: int) -> int:
    """Evaluations of pass `evaluate`: every budget's program and its peers' on all held-out prompts.

    Peers are lowered, which takes no evaluation: what they cost is known exactly.
    """
    pipeline, options = session.model.pipeline, session.options

    def set_timesteps(scheduler: Any, steps: int) -> None:
        prepare_scheduler(pipeline, session.call, scheduler, steps)

    count = 0
    for budget in options.budgets:
        peers = baseline_programs(pipeline.scheduler, table, budget, set_timesteps)
        count += (budget + sum(peer.nfe for peer in peers.values())) * held_out
    return count


def _full_table(session: Session) -> SolverTable:
    """The pipeline's own sampler, lowered."""
    scheduler = session.model.pipeline.scheduler
    prepare_scheduler(session.model.pipeline, session.call, scheduler, session.call.num_inference_steps)
    return lower(scheduler, step_options=session.interface.step_options)


def _evaluation_seconds(session: Session, prompts: Sequence[str]) -> tuple[float, int]:
    """Seconds per sample and evaluation, and how many were timed: the pipeline's own calls in a second probe run."""
    calls: list[float] = []
    with _timed(session.model.transformer, calls):
        probe(session.model.pipeline, session.call, session.options.nominal_scale, prompts)
    branches = 1 if session.interface.stacked else session.interface.branches
    per_call = statistics.median(calls)
    return per_call * branches / PROBE_SAMPLES, len(calls) * PROBE_SAMPLES // branches


@contextmanager
def _timed(module: torch.nn.Module, seconds: list[float]) -> Iterator[None]:
    """Record how long each call of a module takes."""
    start = [0.0]

    def before(*_: Any) -> None:
        start[0] = time.perf_counter()

    def after(*_: Any) -> None:
        seconds.append(time.perf_counter() - start[0])

    handles = [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _stage_count(transformer: torch.nn.Module) -> int:
    """Embed, blocks and head; blocks are the elements of its lists of modules."""
    lists = [child for child in transformer.children() if isinstance(child, torch.nn.ModuleList)]
    return 2 + sum(len(child) for child in lists)


def _weight_bytes(module: torch.nn.Module, item_bytes: int = 4) -> int:
    """Weights as they are exported, each once."""
    return sum(item_bytes * parameter.numel() for parameter in {id(p): p for p in module.parameters()}.values())


def _numel(shape: Sequence[int]) -> int:
    return int(torch.Size(shape).numel())


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _size(size_bytes: float) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size_bytes >= scale:
            return f"{size_bytes / scale:.1f} {unit}"
    return f"{size_bytes:.0f} B"
