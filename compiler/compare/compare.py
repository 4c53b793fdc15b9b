"""`otc compare`: every method's fidelity to the same full runs, on the same prompts and seeds, in one process.

Consumes a model; produces a `Comparison`. Each cell is kept in the workspace, so an interrupted comparison goes on.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from otcache.schemas.errors import UsageError

from ..options import CompileOptions
from ..passes.compile import search_schedules
from ..passes.prepare import prepare
from ..workspace.progress import Reporter
from . import (
    bns,
    budcache,
    cache_dit,
    diffusers_caches,
    dpcache,
    graph_taylor,
    l2p,
    lemica,
    meancache,
    paper,
    seacache,
    solvers,
    spectrum,
    teacache,
    zeus,
)
from . import robustness as elsewhere
from .cells import FURTHER, Cell, Claim, Comparison, Skipped, Spent, budget_within_blocks, peers_at, verdict_at
from .claims import interpolation_claims
from .measure import bench_of, default_method, library_versions, measure_cell, measure_section
from .method import Bench, Method

BEST_PEERS = 3
"""So many of the best peers are measured at `FURTHER` times a budget."""


MODULES = (
    solvers,
    bns,
    diffusers_caches,
    teacache,
    cache_dit,
    seacache,
    zeus,
    spectrum,
    meancache,
    lemica,
    budcache,
    dpcache,
    l2p,
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


class Measurements:
    """Cells of every method, the default first, and why others have none."""

    def __init__(self, bench: Bench, methods: Sequence[Method], budgets: Sequence[int]) -> None:
        self.bench, self.methods, self.budgets = bench, {method.name: method for method in methods}, budgets
        self.cells: list[Cell] = []
        self.skipped: list[Skipped] = []

    def measure(self, name: str, budget: int) -> None:
        """One method at one budget."""
        found = measure_cell(self.bench, self.methods[name], budget)
        if isinstance(found, Cell):
            self.cells.append(found)
        else:
            self.skipped.append(found)

    def measure_budgets(self, reporter: Reporter) -> None:
        """All methods at all budgets."""
        pairs = [(name, budget) for name in self.methods for budget in self.budgets]
        with reporter.on("compare", f"{len(self.methods)} methods at {len(self.budgets)} budgets") as advance:
            for done, (name, budget) in enumerate(pairs, 1):
                self.measure(name, budget)
                advance(done, len(pairs))

    def measure_further(self, reporter: Reporter) -> None:
        """The best peers at `FURTHER` times each budget."""
        total = self.bench.table.num_inference_steps
        with reporter.on("further", f"the best peers at {FURTHER:g} times each budget") as advance:
            for done, budget in enumerate(self.budgets, 1):
                further = round(FURTHER * budget)
                if further <= total and further not in self.budgets:
                    for cell in sorted(peers_at(self.cells, budget), key=lambda cell: -cell.psnr_db.mean)[:BEST_PEERS]:
                        self.measure(cell.method, further)
                advance(done, len(self.budgets))

    def measure_equal_blocks(self, reporter: Reporter) -> None:
        """Methods that run some blocks at every step, with as many fewer evaluations as that costs."""
        over = [c for c in self.cells if c.budget in self.budgets and not c.within_blocks(c.budget)]
        with reporter.on("blocks", "methods that run some blocks at every step, at equal blocks") as advance:
            for done, cell in enumerate(over, 1):
                fewer = budget_within_blocks(cell, self.bench.table.num_inference_steps)
                known = {(each.method, each.budget) for each in self.cells}
                known |= {(each.method, each.budget) for each in self.skipped}
                if fewer is not None and (cell.method, fewer) not in known:
                    self.measure(cell.method, fewer)
                advance(done, len(over))


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
    measured = Measurements(bench, [default_method(found), *peers], options.budgets)
    measured.measure_budgets(reporter)
    measured.measure_further(reporter)
    measured.measure_equal_blocks(reporter)
    cells = measured.cells
    claims: Sequence[Claim] = ()
    robustness, sections = None, dict[str, Spent]()
    budgets = list(options.budgets)
    if claim:
        claims, sections["schedules of several ways"] = measure_section(
            bench, "claims", budgets, lambda: interpolation_claims(prepared, bench, found)
        )
    if robust and elsewhere.BUDGET in options.budgets:
        robustness, sections["other guidance, other numbers of prompts"] = measure_section(
            bench, "robustness", sorted(measured.methods), lambda: elsewhere.robustness(prepared, cells, peers)
        )
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
        skipped=tuple(measured.skipped),
        verdicts=tuple(verdict_at(cells, budget) for budget in options.budgets if peers_at(cells, budget)),
        claims=tuple(claims),
        costs={"capture": 1.0, **found.costs},
        lemica_full_runs=lemica_cost,
        versions={**session.key["versions"], **library_versions()},
        robustness=robustness,
        published={peer.name: peer.published for peer in peers if peer.published},
        sections=sections,
        threads=torch.get_num_threads(),
    )
