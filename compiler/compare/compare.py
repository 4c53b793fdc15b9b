"""`otc compare`: every method's fidelity to the same full runs, on the same prompts and seeds, in one process.

Consumes a model; produces a `Comparison`. Each cell is kept in the workspace, so an interrupted comparison goes on.
"""

from __future__ import annotations

from collections.abc import Sequence

from otcache.schemas.errors import UsageError

from ..options import CompileOptions
from ..passes.compile import search_schedules
from ..passes.prepare import prepare
from ..workspace.progress import Reporter
from . import (
    budcache,
    cache_dit,
    diffusers_caches,
    graph_taylor,
    lemica,
    meancache,
    paper,
    seacache,
    solvers,
    spectrum,
    teacache,
)
from . import robustness as elsewhere
from .cells import FURTHER, Cell, Comparison, Skipped, budget_within_blocks, peers_at, verdict_at
from .claims import interpolation_claims
from .measure import bench_of, default_method, library_versions, measure_cell
from .method import Method

BEST_PEERS = 3
"""So many of the best peers are measured at `FURTHER` times a budget."""


MODULES = (
    solvers,
    diffusers_caches,
    teacache,
    cache_dit,
    seacache,
    spectrum,
    meancache,
    lemica,
    budcache,
    graph_taylor,
    paper,
)


def methods() -> list[Method]:
    """Every peer, in the order of the table."""
    return [method for module in MODULES for method in module.METHODS]


def choose_methods(names: Sequence[str] | None) -> list[Method]:
    """Peers by name, all by default. Raises UsageError."""
    everything = methods()
    if names is None:
        return everything
    known = {method.name: method for method in everything}
    for name in names:
        if name not in known:
            raise UsageError(f"--against has {name!r}: expected names among {', '.join(known)}")
    return [known[name] for name in dict.fromkeys(names)]


def compare(
    options: CompileOptions,
    against: Sequence[str] | None = None,
    reporter: Reporter | None = None,
    *,
    claim: bool = True,
    robust: bool = True,
) -> Comparison:
    """Measure otcache and its peers at the options' budgets. Raises OTCacheError.

    Args:
        against: names of peers; None for all of them.
        claim: also test interpolation against searches per budget (`claims`).
        robust: also measure other guidance scales and numbers of prompts (`robustness`), where its budget is among the
            options'.
    """
    peers = choose_methods(against)
    reporter = reporter or Reporter()
    prepared = prepare(options, reporter)
    found = search_schedules(prepared)
    bench = bench_of(prepared, found)
    default = default_method(found)
    cells: list[Cell] = []
    skipped: list[Skipped] = []

    def measure(method: Method, budget: int) -> None:
        cell = measure_cell(bench, method, budget)
        (cells if isinstance(cell, Cell) else skipped).append(cell)  # type: ignore[arg-type]

    everything: list[Method] = [default, *peers]
    with reporter.on("compare", f"{len(everything)} methods at {len(options.budgets)} budgets") as advance:
        for position, method in enumerate(everything):
            for index, budget in enumerate(options.budgets):
                measure(method, budget)
                advance(position * len(options.budgets) + index + 1, len(everything) * len(options.budgets))
    with reporter.on("further", f"the best peers at {FURTHER:g} times each budget") as advance:
        for index, budget in enumerate(options.budgets):
            further = round(FURTHER * budget)
            if further <= bench.table.num_inference_steps and further not in options.budgets:
                best = sorted(peers_at(cells, budget), key=lambda cell: -cell.psnr_db.mean)[:BEST_PEERS]
                for cell in best:
                    measure(next(m for m in peers if m.name == cell.method), further)
            advance(index + 1, len(options.budgets))
    with reporter.on("blocks", "methods that run some blocks at every step, at equal blocks") as advance:
        over = [cell for cell in cells if cell.budget in options.budgets and not cell.within_blocks(cell.budget)]
        for index, cell in enumerate(over):
            fewer = budget_within_blocks(cell, bench.table.num_inference_steps)
            if fewer is not None and (cell.method, fewer) not in {(each.method, each.budget) for each in cells}:
                measure(next(m for m in peers if m.name == cell.method), fewer)
            advance(index + 1, len(over))
    claims = interpolation_claims(prepared, bench, found) if claim else ()
    robustness = None
    if robust and elsewhere.BUDGET in options.budgets:
        robustness = elsewhere.robustness(prepared, cells, peers)
    lemica_cost = next((cell.full_runs for cell in cells if cell.method == "lemica"), None)
    session = prepared.session
    return Comparison(
        model=options.model,
        pipeline=type(bench.pipeline).__name__,
        scheduler=bench.table.scheduler,
        num_inference_steps=bench.table.num_inference_steps,
        guidance_scale=options.nominal_scale,
        prompts=bench.count,
        calibration_prompts=bench.calibration.count,
        size=(session.call.height, session.call.width),
        budgets=options.budgets,
        cells=tuple(cells),
        skipped=tuple(skipped),
        verdicts=tuple(verdict_at(cells, budget) for budget in options.budgets if peers_at(cells, budget)),
        claims=tuple(claims),
        costs={"capture": 1.0, **found.costs},
        lemica_full_runs=lemica_cost,
        versions={**session.key["versions"], **library_versions()},
        robustness=robustness,
    )
