"""A method at a budget → a `Cell`: what `otc compare` writes down, kept in the workspace so that nothing is measured
twice.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, TypeVar

from pydantic import TypeAdapter

from otcache.schemas.errors import ModelError

from ..calibration.lpips import check_size, is_given, weights_digest
from ..calibration.trials import Calibration
from ..passes.capture import full_runs
from ..passes.evaluate import held_out_runs
from ..passes.prepare import Prepared, calibration_of, samples_of
from ..schedules.search import Found
from ..workspace.ledger import Ledger
from .cells import DEFAULT, Cell, Skipped, Spent, Spread
from .method import Bench, Built, Method, NotApplicable, Outcome, ProgramMethod
from .pipeline_method import pipeline_error
from .spent import metered

LIBRARIES = ("cache-dit",)
"""Beside diffusers, whose version is the compile's as well."""
INTACT = 1e-2
"""Relative error of a full run's final latents below which a pipeline counts as unchanged, in any precision."""

_LOG = logging.getLogger(__name__)
T = TypeVar("T")


def bench_of(prepared: Prepared, found: Found | None = None) -> Bench:
    """What every method is given.

    found: what this compile came to: its schedules are given to libraries that take any.
    """
    session, options = prepared.session, prepared.session.options
    measured = []
    if is_given():
        check_size(session.call.height, session.call.width)
        measured = [f"lpips, {weights_digest()}"]  # a table of its own
    return Bench(
        pipeline=session.model.pipeline,
        call=session.call,
        interface=session.interface,
        table=prepared.table,
        calibration=nominal_calibration(prepared),
        evaluation=samples_of(session, held_out_runs(prepared), prepared.table, prepared.stages, lpips=bool(measured)),
        prompts=tuple(prepared.held_out),
        seeds=prepared.held_out_seeds,
        calibration_prompts=tuple(prepared.prompts),
        calibration_seeds=prepared.seeds,
        guidance_scale=options.nominal_scale,
        workspace=session.workspace,
        key=[session.key, list(prepared.held_out)],
        measured=tuple(measured),
        set_timesteps=prepared.set_timesteps,
        seed=options.seed,
        stages=prepared.stages,
        own={} if found is None else {budget: trials[0].schedule for budget, trials in found.trials.items()},
    )


def default_method(found: Found) -> ProgramMethod:
    """What a compile came to, as a method beside its peers."""
    programs = {budget: trials[0].program for budget, trials in found.trials.items()}

    def build(bench: Bench, budget: int) -> Built:
        if budget not in programs:
            raise NotApplicable(f"not compiled for {budget}")
        return Built(program=programs[budget])

    return ProgramMethod(name=DEFAULT, group="otcache", source="this compiler's choice", build=build, made_of=programs)


def measure_cell(bench: Bench, method: Method, budget: int) -> Cell | Skipped:
    """The method on the held-out prompts, or what that came to before; why not, where it does not run.

    A method that breaks is skipped with its error, after a check that it has left the pipeline as it was. Reasons are
    not kept: what is missing may be there the next time.

    Raises ModelError where a method has left the pipeline changed.
    """
    made_of = method.made_of.get(budget) if isinstance(method, ProgramMethod) else None
    name = "compare-" + "".join(c if c.isalnum() else "-" for c in method.name)
    key = [[*bench.key, *bench.measured], method.name, budget, made_of and made_of.model_dump(mode="json")]
    if method.group == "library":
        key.append(library_versions())
    if method.uses_own:
        key.append(list(bench.own.get(budget, ())))

    def compute() -> dict[str, Any]:
        with metered(bench) as meter:
            outcome = method.run(bench, budget)
        return asdict(_cell_from_outcome(method, budget, outcome, meter.spent()))

    try:
        value = bench.workspace.json(name, key, compute)
    except NotApplicable as error:
        reason = str(error)
    except (OSError, MemoryError):  # of the host, and no method's fault
        raise
    except Exception as error:
        _LOG.debug("%s at %d broke", method.name, budget, exc_info=True)
        cause = error.__cause__ if isinstance(error, ModelError) and error.__cause__ else error  # what the pipeline met
        reason = f"it breaks: {type(cause).__name__}: {' '.join(str(cause).split())[:200]}"
        check_intact(bench, method.name)
    else:
        return TypeAdapter(Cell).validate_python(value)
    _LOG.info("%s at %d: %s", method.name, budget, reason)
    return Skipped(method=method.name, budget=budget, reason=reason)


def library_versions() -> dict[str, str]:
    """Of the libraries that are compared with, those that are installed."""
    found = {}
    for name in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def check_intact(bench: Bench, name: str) -> None:
    """Raises ModelError where the pipeline no longer ends where its recorded full run of the first prompt ended."""
    error = float(bench.evaluation.map(pipeline_error(bench), slice(1))["latent_error"][0])
    if not error < INTACT:
        raise ModelError(
            f"{name} broke and left {type(bench.pipeline).__name__} changed: its latents are now {error:.1e} from the "
            "recorded run's: leave it out with --against, which takes the names of the others"
        )


def _cell_from_outcome(method: Method, budget: int, outcome: Outcome, spent: Spent) -> Cell:
    scores = outcome.scores
    return Cell(
        method=method.name,
        group=method.group,
        budget=budget,
        nfe_mean=float(outcome.nfe.mean()),
        nfe_worst=float(outcome.nfe.max()),
        blocks_mean=float(outcome.blocks.mean()),
        psnr_db=Spread.of(scores["psnr_db"]),
        ssim=Spread.of(scores["ssim"]),
        lpips=float(scores["lpips"].mean()) if "lpips" in scores else None,
        seconds=outcome.seconds,
        setting=outcome.setting,
        full_runs=outcome.full_runs,
        spent=spent,
    )


def measure_section(bench: Bench, name: str, key: Any, measure: Callable[[], T]) -> tuple[T, Spent]:
    """What `measure` gives, and what it took: of the first time, where it was measured before and kept its parts.

    key: JSON, what it depends on beside the bench.
    """
    with metered(bench) as meter:
        found = measure()
    kept = bench.workspace.json("spent", [bench.key, list(bench.measured), name, key], lambda: asdict(meter.spent()))
    return found, Spent(**kept)


def nominal_calibration(prepared: Prepared) -> Calibration:
    """The calibration set without the margin, for methods that are compared with ours: each is fitted to what is
    served.
    """
    session, table = prepared.session, prepared.table
    runs = full_runs(session, table, "capture", prepared.prompts, session.options.seed)
    return calibration_of(session, runs, table, prepared.stages, ledger=Ledger())
