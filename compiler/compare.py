"""`otc compare`: every method's fidelity to the same full runs, on the same prompts and seeds, in one process.

Consumes a model; produces a `Comparison`. Each cell is kept in the workspace, so an interrupted comparison goes on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from otcache.schemas.errors import UsageError
from otcache.schemas.program import Program

from . import metrics
from .anchor import search_anchor
from .baselines import uniform_schedule
from .calibrate import Trial
from .evaluate import Evaluation
from .families import OutputFamily
from .interpolate import interpolated_schedule
from .options import CompileOptions
from .peers.hooks import hook_methods
from .peers.method import Bench, Group, Method, NotApplicable, Outcome, ProgramMethod
from .peers.programs import program_methods
from .pipeline import Prepared, held_out_trajectory, prepare, searched
from .policy import policy_from_schedule, wasserstein_distance
from .progress import Reporter
from .search import Found

DEFAULT = "otcache"
AHEAD_DB = 0.5
"""What the default must be ahead of every other method by."""
AIM_DB = 3.0
FURTHER = 1.5
"""Peers are also measured at this multiple of a budget: how much further otcache carries."""
BEST_PEERS = 3
"""So many of the best peers are measured there."""
SEARCHES = (8, 80)
"""Trials of the per-budget searches that the paper's claim is tested against: about equal, and ten times the cost."""

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Spread:
    """A figure over the prompts."""

    mean: float
    std: float
    worst: float

    @classmethod
    def of(cls, values: np.ndarray) -> Spread:
        return cls(mean=float(values.mean()), std=float(values.std()), worst=float(values.min()))


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One method at one budget."""

    method: str
    group: Group
    budget: int
    nfe_mean: float
    nfe_worst: float
    psnr_db: Spread
    ssim: Spread
    lpips: float | None
    seconds: float
    setting: str
    full_runs: float
    """What a search for this method took, in full runs per prompt it used; 0 where there is none."""


@dataclass(frozen=True, kw_only=True)
class Skipped:
    method: str
    budget: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether the default is ahead at a budget, against the best other method by PSNR."""

    budget: int
    psnr_db: float
    best_peer: str
    best_peer_psnr_db: float
    ahead_db: float
    ssim_ahead: float
    """SSIM less the highest of any other method."""
    worst_prompt_db: float
    """The worst prompt's PSNR less the best peer's worst prompt's."""
    further_peer: str | None
    further_ahead_db: float | None
    """PSNR less that of the best peer at `FURTHER` times the budget."""
    must: bool
    aim: bool


@dataclass(frozen=True, kw_only=True)
class Claim:
    """The paper's claim at one budget: ways to a schedule under the same closed-loop fit, on held-out prompts."""

    budget: int
    way: str
    schedule: tuple[int, ...]
    psnr_db: float
    ssim: float
    rollouts: int
    """Roll-outs of the budget on the calibration set that finding it took."""
    w2_to_interpolated: float
    """W_2 on the timeline [0, 1] from the interpolated schedule's policy."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Everything that was measured."""

    model: str
    pipeline: str
    scheduler: str
    num_inference_steps: int
    guidance_scale: float
    prompts: int
    calibration_prompts: int
    size: tuple[int, int]
    budgets: tuple[int, ...]
    cells: tuple[Cell, ...]
    skipped: tuple[Skipped, ...]
    verdicts: tuple[Verdict, ...]
    claims: tuple[Claim, ...]
    costs: dict[str, float]
    """Of otcache's own compile, in full runs per calibration prompt."""
    lemica_full_runs: float | None
    """Of LeMiCa's graph on the same T, counted by the same code."""
    versions: dict[str, str]

    def cell(self, method: str, budget: int) -> Cell | None:
        return next((c for c in self.cells if (c.method, c.budget) == (method, budget)), None)

    def best_psnr_db(self, budget: int) -> float:
        """Of all methods at a budget."""
        return max(cell.psnr_db.mean for cell in self.cells if cell.budget == budget)

    def json(self) -> dict[str, Any]:
        return asdict(self)


def methods() -> list[Method]:
    """Every peer, in the order of the table."""
    programs = program_methods()
    order: list[Method] = [m for m in programs if m.group == "solver"]
    order += hook_methods()
    order += [m for m in programs if m.group != "solver"]
    return order


def chosen_methods(names: Sequence[str] | None) -> list[Method]:
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
) -> Comparison:
    """Measure otcache and its peers at the options' budgets. Raises OTCacheError."""
    peers = chosen_methods(against)
    reporter = reporter or Reporter()
    prepared = prepare(options, reporter)
    found = searched(prepared)
    bench = bench_of(prepared)
    default = _default(found)
    cells: list[Cell] = []
    skipped: list[Skipped] = []

    def measure(method: Method, budget: int) -> None:
        cell = _cell(bench, method, budget, found)
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
            if further <= options.num_inference_steps and further not in options.budgets:
                best = sorted(_peers_at(cells, budget), key=lambda cell: -cell.psnr_db.mean)[:BEST_PEERS]
                for cell in best:
                    measure(next(m for m in peers if m.name == cell.method), further)
            advance(index + 1, len(options.budgets))
    claims = _claims(prepared, bench, found) if claim else ()
    lemica = next((cell.full_runs for cell in cells if cell.method == "lemica"), None)
    session = prepared.session
    return Comparison(
        model=options.model, pipeline=type(bench.pipeline).__name__, scheduler=bench.table.scheduler,
        num_inference_steps=bench.table.num_inference_steps, guidance_scale=options.nominal_scale, prompts=bench.count,
        calibration_prompts=bench.calibration.trajectory.count, size=(session.call.height, session.call.width),
        budgets=options.budgets, cells=tuple(cells), skipped=tuple(skipped),
        verdicts=tuple(_verdict(cells, budget) for budget in options.budgets if _peers_at(cells, budget)),
        claims=tuple(claims), costs={"capture": 1.0, **found.costs}, lemica_full_runs=lemica,
        versions=session.key["versions"],
    )  # fmt: skip


def bench_of(prepared: Prepared) -> Bench:
    """What every method is given."""
    session, options = prepared.session, prepared.session.options
    trajectory = held_out_trajectory(prepared)
    evaluation = Evaluation(
        denoiser=replace(
            prepared.calibration.denoiser, conditioning=trajectory.conditioning, guidance=trajectory.guidance,
            evaluations=[0],
        ),
        trajectory=trajectory, decode=session.decode, references=session.decode(trajectory.latents[-1]),
        stages=prepared.stages,
    )  # fmt: skip
    calibration = prepared.calibration
    return Bench(
        pipeline=session.model.pipeline, call=session.call, table=prepared.table, calibration=calibration,
        evaluation=evaluation, prompts=tuple(prepared.held_out), seeds=prepared.held_out_seeds,
        calibration_prompts=tuple(prepared.prompts), calibration_seeds=prepared.seeds,
        guidance_scale=options.nominal_scale, workspace=session.workspace, key=[session.key, list(prepared.held_out)],
        set_timesteps=prepared.set_timesteps, seed=options.seed,
    )  # fmt: skip


def _default(found: Found) -> ProgramMethod:
    def build(bench: Bench, budget: int) -> Program:
        if budget not in found.trials:
            raise NotApplicable(f"not compiled for {budget}")
        return found.trials[budget][0].program

    return ProgramMethod(name=DEFAULT, group="otcache", source="this compiler's choice", build=build)


def _cell(bench: Bench, method: Method, budget: int, found: Found) -> Cell | Skipped:
    """Measured, or from the workspace where it was measured before."""
    program = found.trials[budget][0].program.model_dump(mode="json") if method.name == DEFAULT else None

    def compute() -> dict[str, Any]:
        try:
            outcome = method.run(bench, budget)
        except NotApplicable as error:
            return {"reason": str(error)}
        return asdict(_scored(bench, method, budget, outcome))

    name = "compare-" + "".join(c if c.isalnum() else "-" for c in method.name)
    value = bench.workspace.json(name, [bench.key, method.name, budget, program], compute)
    if "reason" in value:
        _LOG.info("%s at %d: %s", method.name, budget, value["reason"])
        return Skipped(method=method.name, budget=budget, reason=value["reason"])
    return Cell(**{**value, "psnr_db": Spread(**value["psnr_db"]), "ssim": Spread(**value["ssim"])})


def _scored(bench: Bench, method: Method, budget: int, outcome: Outcome) -> Cell:
    pictures, references = bench.evaluation.decode(outcome.latents), bench.evaluation.references
    lpips = bench.calibration.lpips
    return Cell(
        method=method.name, group=method.group, budget=budget, nfe_mean=float(outcome.nfe.mean()),
        nfe_worst=float(outcome.nfe.max()), psnr_db=Spread.of(metrics.psnr(pictures, references)),
        ssim=Spread.of(metrics.ssim(pictures, references)),
        lpips=float(lpips(pictures, references).mean()) if lpips else None,
        seconds=outcome.seconds, setting=outcome.setting, full_runs=outcome.full_runs,
    )  # fmt: skip


def _peers_at(cells: Sequence[Cell], budget: int) -> list[Cell]:
    return [cell for cell in cells if cell.budget == budget and cell.method != DEFAULT]


def _verdict(cells: Sequence[Cell], budget: int) -> Verdict:
    own = next(cell for cell in cells if (cell.method, cell.budget) == (DEFAULT, budget))
    peers = _peers_at(cells, budget)
    best = max(peers, key=lambda cell: cell.psnr_db.mean)
    further = max(_peers_at(cells, round(FURTHER * budget)), key=lambda cell: cell.psnr_db.mean, default=None)
    ahead = own.psnr_db.mean - best.psnr_db.mean
    ssim_ahead = own.ssim.mean - max(cell.ssim.mean for cell in peers)
    further_ahead = own.psnr_db.mean - further.psnr_db.mean if further else None
    return Verdict(
        budget=budget, psnr_db=own.psnr_db.mean, best_peer=best.method, best_peer_psnr_db=best.psnr_db.mean,
        ahead_db=ahead, ssim_ahead=ssim_ahead, worst_prompt_db=own.psnr_db.worst - best.psnr_db.worst,
        further_peer=further.method if further else None, further_ahead_db=further_ahead,
        must=ahead >= AHEAD_DB and ssim_ahead >= 0,
        aim=ahead >= AIM_DB and further_ahead is not None and further_ahead >= 0,
    )  # fmt: skip


def _claims(prepared: Prepared, bench: Bench, found: Found) -> list[Claim]:
    """Does interpolation match a search per budget? Schedules of several ways, fitted alike, on held-out prompts."""
    options, calibration, total = prepared.session.options, prepared.calibration, bench.table.num_inference_steps
    family = OutputFamily(calibration)
    claims: list[Claim] = []
    with prepared.session.reporter.on("claim", "interpolated, graph and searched schedules") as advance:
        for position, budget in enumerate(options.budgets):
            key = [
                bench.key,
                budget,
                list(found.reference.schedule),
                list(found.anchor.schedule),
                list(SEARCHES),
                options.objective,
            ]

            def compute(budget: int = budget) -> list[dict[str, Any]]:
                law = interpolated_schedule(found.reference.schedule, found.anchor.schedule, budget, total)
                graphs = family.graph_schedules(budget)

                def score(schedule: tuple[int, ...]) -> float:
                    return calibration.fit(schedule).score

                def search(trials: int) -> Callable[[], Trial]:
                    starts = [next(iter(graphs.values())), uniform_schedule(budget, total)]
                    return lambda: calibration.fit(
                        search_anchor(
                            score, budget=budget, num_inference_steps=total, starts=starts, trials=trials,
                            seed=options.seed,
                        ).schedule
                    )  # fmt: skip

                interpolated = [trial for trial in found.trials[budget] if trial.name == "interpolated"]
                ways: dict[str, tuple[Callable[[], Trial], int]] = {
                    "interpolated, law in 1/B": (lambda: calibration.fit(law), 1),
                    "graph": (lambda: calibration.fit(next(iter(graphs.values()))), 1),
                    **{f"search, {trials} trials": (search(trials), trials) for trials in SEARCHES},
                }
                if interpolated:
                    ways["interpolated, best weight"] = (lambda: interpolated[0], len(interpolated))
                rows = []
                for way, (make, rollouts) in ways.items():
                    trial = make()
                    quality = bench.evaluation.quality(trial.program)
                    distance = wasserstein_distance(
                        policy_from_schedule(trial.schedule, total), policy_from_schedule(law, total)
                    )
                    rows.append(
                        asdict(
                            Claim(
                                budget=budget, way=way, schedule=tuple(trial.schedule), psnr_db=quality.psnr_db.mean,
                                ssim=quality.ssim.mean, rollouts=rollouts, w2_to_interpolated=distance,
                            )
                        )
                    )  # fmt: skip
                return rows

            rows = bench.workspace.json("claim", key, compute)
            claims += [Claim(**{**row, "schedule": tuple(row["schedule"])}) for row in rows]
            advance(position + 1, len(options.budgets))
    return claims
