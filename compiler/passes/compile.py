"""The order of the passes: options → artifact. Each pass lives in a module of its name; what they pass on is frozen."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from otcache.schemas import manifest as schema
from otcache.schemas.manifest_file import read_manifest
from otcache.schemas.shapes import describe_size

from ..models.model import Model
from ..options import CompileOptions
from ..report.evidence import PassEvidence, Recorder, gather
from ..report.page import ATTACHMENTS, write_report
from ..report.redraw import redraw
from ..schedules.search import FOUND, Found, refit, search
from ..sizes.served import Seen
from ..workspace.progress import Reporter
from .bench import bench
from .capture import full_runs
from .crew import Crew
from .emit import check_target, emit, recover
from .engines import Engines, exportable_from_prepared, make_engines
from .evaluate import Evaluated, evaluate
from .manifest import budget_programs, latents_with_engines, program_fields
from .prepare import Prepared, calibration_of, needs_stages, prepare
from .reach import reach
from .search_small import options_at_served_size, search_small
from .session import Session


def compile_model(
    options: CompileOptions, reporter: Reporter | None = None, live: Model | None = None, crew: Crew | None = None
) -> tuple[Path, schema.Manifest]:
    """Compile a model into an artifact. Returns its folder and manifest.

    live: the model where it is in memory, rather than to be loaded as `options.model` says.
    crew: makes full runs and holds samples in place of this process (`fleet.crew`).

    Raises OTCacheError (UsageError, ModelError, ArtifactError, HostError) and then leaves no artifact behind; what was
    computed stays in the workspace, so that the same options go on where they stopped.
    """
    recorder = Recorder(reporter or Reporter())
    target = target_of(options)
    recover(target)
    check_target(target, force=options.force)
    with contextlib.ExitStack() as held:
        held.callback(torch.set_num_threads, torch.get_num_threads())  # `prepare` takes the options' number
        prepared = prepare(options_at_served_size(options), recorder, held, live, crew=crew)
        if options.search_size is None:
            found = search_schedules(prepared)
        else:
            found = search_small(prepared, options, recorder, held, search_schedules)
        manifest = _compile(prepared, found, target, recorder.passes)
        return target, _benched(prepared, target, manifest) if options.bench else manifest


def _benched(prepared: Prepared, target: Path, manifest: schema.Manifest) -> schema.Manifest:
    """The manifest once the artifact's latency here is in its report, where it has engines."""
    session = prepared.session
    if session.options.engines == "none":
        return manifest
    budgets = [entry.program.nfe for entry in manifest.programs if entry.budget != schema.FULL]
    with session.reporter.on("bench", f"latency of {target} on this host"):
        found = bench(target, budgets, manifest.sampler.num_inference_steps, session.reporter.evaluation_s)
        redraw(target, found)
    return read_manifest(target).manifest


def target_of(options: CompileOptions) -> Path:
    """Where the artifact goes."""
    return options.output or Path("artifacts") / Path(options.model).name


def _compile(prepared: Prepared, found: Found, target: Path, passes: Sequence[PassEvidence]) -> schema.Manifest:
    """The passes after the searches; `passes` grows with them."""
    session = prepared.session
    quality = evaluate(prepared, found)
    programs = {
        describe_size(seen.point): _programs_at(prepared, found, seen) for seen in prepared.sizes.own_samplers()
    }
    fields = program_fields(prepared, found, quality, programs)
    engines: Engines | None = None
    if session.options.engines == "onnx":
        with exportable_from_prepared(prepared) as source:
            engines = make_engines(source, found, quality, prepared.held_out[0], programs)
        latents = latents_with_engines(fields["latents"], engines.source, engines.exported)
        fields = {**fields, **engines.fields, "latents": latents}

    def fill(folder: Path) -> None:
        if engines is not None:
            engines.write(folder)
        _write_report(folder, prepared, quality, fields, passes)

    with session.reporter.on("emit", str(target)):
        return emit(target, fill, fields, force=session.options.force, attachments=ATTACHMENTS)


def _write_report(
    folder: Path,
    prepared: Prepared,
    quality: Evaluated,
    fields: dict[str, Any],
    passes: Sequence[PassEvidence],
) -> None:
    """The report, of what was measured on the way."""
    sigmas = prepared.table.sigmas
    evidence, shown = gather(
        quality.outcomes,
        quality.references,
        prompts=prepared.held_out,
        seeds=prepared.held_out_seeds,
        timesteps=prepared.table.timesteps.tolist(),
        sigmas=None if sigmas is None else sigmas.tolist(),
        passes=passes,
        peers=quality.peers,
        targets=prepared.session.options.targets,
    )
    write_report(folder, fields, evidence, shown)


def search_schedules(prepared: Prepared) -> Found:
    """The searches' result at the budgets that are asked for, by number or by what they are to reach.

    Raises ModelError for a target that no budget reaches.
    """
    session = prepared.session
    if not session.options.wanted:
        return _search_budgets(prepared)

    def find(budgets: Sequence[int], reporter: Reporter) -> Found:
        at = replace(session.options, budgets=tuple(budgets))
        return search(prepared.calibration, at, reporter, anchor_storage(session))

    given = find(session.options.budgets, session.reporter) if session.options.budgets else None
    return reach(prepared, session.options.wanted, find, given)


def _search_budgets(prepared: Prepared) -> Found:
    """The searches' result at the budgets that are asked for by number, from the workspace where it is known."""
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
        session.objective,
        options.payload,
        options.edge_costs,
        needs_stages(session),
    ]


def anchor_storage(session: Session) -> Path:
    """Optuna's database of the anchor search."""
    options = session.options
    key = [
        session.key,
        session.margin,
        options.reference,
        options.anchor,
        session.objective,
        options.payload,
        options.edge_costs,
        needs_stages(session),
    ]
    return session.workspace.path("anchor", key, ".db")


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
    with session.reporter.on("fit", f"schedules at {describe_size(seen.point)}"):
        here = refit(found, calibration)
    at_size = replace(prepared, session=session, runs=runs, table=seen.table, calibration=calibration)
    return budget_programs(here, evaluate(at_size, here))
