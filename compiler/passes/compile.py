"""The order of the passes: options → artifact. Each pass lives in a module of its name; what they pass on is frozen."""

from __future__ import annotations

import contextlib
import functools
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from otcache.schemas import manifest as schema
from otcache.schemas.shapes import described

from ..export.at_sizes import constant_files
from ..export.precision import Served
from ..models.model import Model
from ..options import CompileOptions
from ..report.evidence import PassEvidence, Recorder, gather
from ..report.page import ATTACHMENTS, write_report
from ..schedules.search import FOUND, Found, refit, search
from ..sizes.served import Seen
from ..workspace.progress import Reporter
from .capture import full_runs
from .emit import check_target, emit, recover
from .evaluate import Evaluated, evaluate, evaluation_key
from .export import DESCRIPTION, EXPORTS, Exported, export_key, exported_parts, served_trunk
from .golden import rounding_of, tolerance_of, write_golden
from .manifest import budget_programs, manifest_fields
from .prepare import Prepared, calibration_of, prepare
from .session import Session


def compile_model(
    options: CompileOptions, reporter: Reporter | None = None, live: Model | None = None
) -> tuple[Path, schema.Manifest]:
    """Compile a model into an artifact. Returns its folder and manifest.

    live: the model where it is in memory, rather than to be loaded as `options.model` says.

    Raises OTCacheError (UsageError, ModelError, ArtifactError, HostError) and then leaves no artifact behind; what was
    computed stays in the workspace, so that the same options go on where they stopped.
    """
    recorder = Recorder(reporter or Reporter())
    target = target_of(options)
    recover(target)
    check_target(target, force=options.force)
    with contextlib.ExitStack() as held:
        held.callback(torch.set_num_threads, torch.get_num_threads())  # `prepare` takes the options' number
        return target, _compiled(prepare(options, recorder, held, live), target, recorder.passes)


def target_of(options: CompileOptions) -> Path:
    """Where the artifact goes."""
    return options.output or Path("artifacts") / Path(options.model).name


def _compiled(prepared: Prepared, target: Path, passes: Sequence[PassEvidence]) -> schema.Manifest:
    """The passes after `prepare`; `passes` grows with them."""
    session, table = prepared.session, prepared.table
    options, reporter = session.options, session.reporter
    found = search_schedules(prepared)
    quality = evaluate(prepared, found)
    programs = {described(seen.point): _programs_at(prepared, found, seen) for seen in prepared.sizes.own_samplers()}
    trunk = functools.cache(partial(served_trunk, prepared))
    exported = exported_parts(prepared, trunk)
    tolerance = _golden_tolerance(prepared, found, quality, exported, trunk)
    fields = manifest_fields(prepared, found, quality, exported, programs, tolerance)

    def fill(folder: Path) -> None:
        for exported_folder in exported.folders:
            shutil.copytree(exported_folder, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(DESCRIPTION))
        for path, content in constant_files(prepared.sizes).items():
            (folder / path).parent.mkdir(exist_ok=True)
            (folder / path).write_bytes(content)
        if session.encoders is not None:
            write_golden(folder, quality.golden)
        evidence, shown = gather(
            quality.outcomes,
            quality.references,
            prompts=prepared.held_out,
            seeds=prepared.held_out_seeds,
            timesteps=table.timesteps.tolist(),
            sigmas=None if table.sigmas is None else table.sigmas.tolist(),
            passes=passes,
        )
        write_report(folder, fields, evidence, shown)

    with reporter.on("emit", str(target)):
        return emit(target, fill, fields, force=options.force, attachments=ATTACHMENTS)


def search_schedules(prepared: Prepared) -> Found:
    """The searches' result, from the workspace where it is known."""
    session, calibration, options = prepared.session, prepared.calibration, prepared.session.options
    storage = anchor_storage(session)

    def compute() -> dict[str, Any]:
        return FOUND.dump_python(search(calibration, options, session.reporter, storage), mode="json")

    return FOUND.validate_python(session.workspace.json("search", search_key(session), compute))


def search_key(session: Session) -> Any:
    """What all searches together depend on, for the workspace; what they try is kept one by one as well."""
    options = session.options
    return [
        session.key,
        session.margin,
        list(options.budgets),
        options.reference,
        options.anchor,
        options.trials,
        options.effort,
        options.objective,
        options.payload,
        options.edge_costs,
    ]


def anchor_storage(session: Session) -> Path:
    """Optuna's database of the anchor search."""
    options = session.options
    key = [
        session.key,
        session.margin,
        options.reference,
        options.anchor,
        options.objective,
        options.payload,
        options.edge_costs,
    ]
    return session.workspace.path("anchor", key, ".db")


def _golden_tolerance(
    prepared: Prepared, found: Found, quality: Evaluated, exported: Exported, trunk_of: Callable[[], Served]
) -> float:
    """How far a host's golden latents may be from the stored ones (`golden`)."""
    session, budget = prepared.session, min(found.trials)
    if session.options.dtype == "float32" or session.encoders is None:
        return tolerance_of(exported.max_relative_error, None)
    program = found.trials[budget][0].program
    key = [export_key(session, EXPORTS[0]), evaluation_key(session, prepared.held_out[:1], budget, program)]

    def compute() -> float:
        return rounding_of(trunk_of(), program, session, quality.runs, quality.golden)

    return tolerance_of(exported.max_relative_error, session.workspace.json("rounding", key, compute))


def _programs_at(prepared: Prepared, found: Found, seen: Seen) -> list[schema.BudgetProgram]:
    """Programs of a size whose sampler is another: the schedules that were found, with coefficients fitted and measured
    there.
    """
    own = prepared.session
    session = replace(
        own, call=seen.call, interface=seen.interface, decoder=None, key={**own.key, "served at": seen.point}
    )  # pictures are the pipeline's own: its decoder is for the size that is compiled
    runs = full_runs(session, seen.table, "capture", prepared.prompts, session.options.seed, session.margin)
    calibration = calibration_of(session, runs, seen.table, prepared.stages)
    with session.reporter.on("fit", f"schedules at {described(seen.point)}"):
        here = refit(found, calibration)
    at_size = replace(prepared, session=session, runs=runs, table=seen.table, calibration=calibration)
    return budget_programs(here, evaluate(at_size, here))
