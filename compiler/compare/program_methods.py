"""Methods that are programs: few-step solvers, caches with a fixed schedule, and schedules found by graphs or searches."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from otcache.schemas.program import Program

from ..calibration import metrics
from ..calibration.rollout import StagedModel, residual_gram, roll_out
from ..calibration.trials import Calibration
from ..graph.stages import Stages
from ..pipelines.denoiser import Denoiser, denoiser_of
from ..programs.baselines import baseline_programs
from ..programs.residual import residual_edge_errors, residual_program
from ..programs.schedule import uniform_schedule
from ..programs.solver_table import SolverTable, program_from_table, step_from_table
from ..programs.update import updated
from ..schedules.anchor import search_anchor
from ..schedules.gram import TrajectoryStatistics, statistics_from_trajectory
from ..schedules.interpolate import interpolated_schedule
from ..schedules.reference import Minimax, Power, end_to_end_edge_errors, shortest_schedule
from .method import Bench, NotApplicable, ProgramMethod

LEMICA_PROMPTS = 2
LEMICA_SPAN = 25
"""Longest jump whose end-to-end error is replayed."""
ANNEALING_PROMPTS = 2
JVP_ORDERS = (1, 2, 3, 4, 5, 6)
"""Steps behind an edge over which MeanCache may take its derivative, as in its released schedules."""


# --- few steps
# -----------------------------------------------------------------------------------------------------------


def few_steps(name: str, source: str) -> ProgramMethod:
    """One of `baseline_programs`: a solver with `budget` steps instead of T."""

    def build(bench: Bench, budget: int) -> Program:
        found = baseline_programs(bench.pipeline.scheduler, bench.table, budget, bench.set_timesteps)
        if name not in found:
            raise NotApplicable(f"{name} cannot be built for {bench.table.scheduler} at {budget} steps")
        return found[name]

    return ProgramMethod(name=name, group="solver", source=source, build=build)


# --- Spectrum
# ------------------------------------------------------------------------------------------------------------


class FeatureModel(StagedModel):
    """Forecasts what the blocks put out, rather than what they add, as Spectrum and TaylorSeer's lite form do."""

    def _bridge(self, values: dict[str, Tensor], step: Any) -> None:
        results = [result for _, result in self.stages.features]
        if step.compute:
            self.residuals.append({name: values[name] for name in results})
            self.residuals = self.residuals[-self.keep :]
            return
        recent = self.residuals[-len(step.residual_coefs) :]
        for name in results:
            values[name] = sum(coef * kept[name] for coef, kept in zip(step.residual_coefs, recent, strict=True))  # type: ignore[assignment]


def chebyshev_coefs(
    computed: Sequence[int], step_index: int, num_inference_steps: int, *, degree: int = 4, penalty: float = 0.1
) -> np.ndarray:
    """Weights float64 (len(computed),) of computed features in Spectrum's forecast (arXiv 2603.01623).

    Ridge regression on Chebyshev polynomials T_0 … T_degree of τ = 2t/T − 1; degree and penalty as released.
    """

    def design(steps: Sequence[int]) -> np.ndarray:
        tau = 2.0 * np.asarray(steps, dtype=np.float64) / num_inference_steps - 1.0
        return np.polynomial.chebyshev.chebvander(tau, degree)

    basis = design(computed)
    normal = basis.T @ basis + penalty * np.eye(degree + 1)
    return (design([step_index]) @ np.linalg.solve(normal, basis.T))[0]


def spectrum_schedule(warmup: int, window: float, growth: float, num_inference_steps: int) -> tuple[int, ...]:
    """Spectrum's adaptive schedule: `warmup` steps, then one in each window, which grows by `growth` every time."""
    computed, cached = [], 0
    for step in range(num_inference_steps):
        actual = step < warmup
        if not actual:
            actual = (cached + 1) % math.floor(window) == 0
            if actual:
                window = round(window + growth, 3)
        cached = 0 if actual else cached + 1
        if actual:
            computed.append(step)
    return tuple(computed)


def spectrum_program(table: SolverTable, schedule: Sequence[int]) -> Program:
    """Every step of the sampler, features forecast by `chebyshev_coefs` where they are not computed."""
    computed: list[int] = []
    steps = []
    for step in program_from_table(table, payload="residual").steps:
        if step.step_index in schedule:
            computed.append(step.step_index)
            steps.append(step)
        else:
            coefs = chebyshev_coefs(computed[-16:], step.step_index, table.num_inference_steps)
            steps.append(step.model_copy(update={"compute": False, "residual_coefs": tuple(coefs.tolist())}))
    return Program(payload="residual", steps=tuple(steps))


def _spectrum(bench: Bench, budget: int) -> Program:
    """Warm-up, first window and growth chosen for the budget: the best on the calibration set."""
    total = bench.table.num_inference_steps
    schedules = {
        schedule
        for warmup in range(1, min(6, budget) + 1)
        for window in range(1, total)
        for growth in (0.0, 0.75, 3.0)
        if len(schedule := spectrum_schedule(warmup, float(window), growth, total)) == budget
    }
    if not schedules:
        raise NotApplicable(f"no window of Spectrum's gives {budget} evaluations of {total}")
    spread = sorted(schedules)[:: max(1, len(schedules) // 8)]
    return max(
        (spectrum_program(bench.table, schedule) for schedule in spread),
        key=lambda p: _calibrated(bench, p, FeatureModel),
    )


# --- MeanCache
# -----------------------------------------------------------------------------------------------------------


def mean_velocity_coefs(sigmas: np.ndarray, start: int, end: int, order: int, history: np.ndarray) -> np.ndarray:
    """Outputs at steps start+1 … end−1 as MeanCache forecasts them (arXiv 2601.19961, equation of its average
    velocity).

    v_s = v_{s−1} − J·(σ_{s+1} − σ_s) with J = (v_r − u_{r→s}) / (σ_s − σ_r), r = s − order, u the average velocity from
    r to s.

    history: coefficients float64 (steps up to start, m) of every output so far in m computed outputs.
    Returns the rows float64 (end, m) of history and forecasts together.
    """
    rows = list(history)
    for step in range(start + 1, end):
        first = max(0, step - order)
        span = sigmas[step] - sigmas[first]
        average = sum((sigmas[m + 1] - sigmas[m]) * rows[m] for m in range(first, step)) / span
        derivative = (rows[first] - average) / span
        rows.append(rows[step - 1] - derivative * (sigmas[step + 1] - sigmas[step]))
    return np.stack(rows)


def meancache_edges(table: SolverTable, statistics: TrajectoryStatistics) -> tuple[np.ndarray, np.ndarray]:
    """Squared errors (T, T+1) of MeanCache's forecast along the full run, and the order that gives each; no
    evaluations.

    Only orders whose history lies behind the edge's start are weighed with the full run's own outputs.
    """
    total = table.num_inference_steps
    sigmas = _flow_sigmas(table)
    gram = statistics.gram[total + 1 :, total + 1 :]
    errors = np.full((total, total + 1), np.inf)
    orders = np.ones((total, total + 1), dtype=int)
    moves = np.diff(sigmas)
    for start in range(total):
        history = np.eye(start + 1, total)
        for order in JVP_ORDERS if start else JVP_ORDERS[:1]:
            rows = mean_velocity_coefs(sigmas, start, total, order, history)
            gaps = rows - np.eye(total)
            moved = np.cumsum(moves[start:, None] * gaps[start:], axis=0)
            costs = np.einsum("em,mn,en->e", moved, gram, moved)
            better = costs < errors[start, start + 1 :]
            errors[start, start + 1 :] = np.where(better, np.maximum(costs, 0.0), errors[start, start + 1 :])
            orders[start, start + 1 :] = np.where(better, order, orders[start, start + 1 :])
    return errors, orders


def meancache_program(table: SolverTable, schedule: Sequence[int], orders: np.ndarray) -> Program:
    """MeanCache's forecast between the computed steps of a flow sampler, folded into one update for each."""
    sigmas = _flow_sigmas(table)
    ends = [*schedule[1:], table.num_inference_steps]
    rows = np.zeros((0, len(schedule)))
    steps = []
    for position, (start, end) in enumerate(zip(schedule, ends, strict=True)):
        rows = np.concatenate([rows, np.eye(len(schedule))[position : position + 1]])
        rows = mean_velocity_coefs(sigmas, start, end, int(orders[start, end]), rows)
        move = np.diff(sigmas)[start:end] @ rows[start:end]
        steps.append(step_from_table(table, start, 1.0, move[: position + 1]))
    return Program(payload="output", steps=tuple(steps))


def _meancache(bench: Bench, budget: int) -> Program:
    trajectory = bench.calibration.trajectory
    statistics = statistics_from_trajectory(trajectory.latents.numpy(), trajectory.outputs.numpy())
    errors, orders = meancache_edges(bench.table, statistics)
    return meancache_program(bench.table, shortest_schedule(errors, budget, Power(4.0)), orders)


def _flow_sigmas(table: SolverTable) -> np.ndarray:
    """Sigmas (T+1,) of a sampler whose every step is Euler's on a flow, as MeanCache's; else NotApplicable."""
    if table.sigmas is None or table.prediction_type != "flow_prediction":
        raise NotApplicable(f"MeanCache forecasts velocities of flow matching: {table.scheduler} has none")
    moves = np.diff(table.sigmas)
    if not (np.allclose(table.latent_coefs, 1.0) and np.allclose(table.output_coefs, np.diag(moves), atol=1e-5)):
        raise NotApplicable(f"MeanCache's schedule is for Euler steps: {table.scheduler} takes others")
    return np.asarray(table.sigmas)


# --- LeMiCa, annealing, and the paper's three stages: residual reuse
# ------------------------------------------------------


def few(calibration: Calibration, count: int) -> Calibration:
    """The first samples of a calibration set, with a counter of their own."""
    trajectory = calibration.trajectory.rows(slice(count))
    denoiser = calibration.denoiser
    return replace(
        calibration,
        trajectory=trajectory,
        references=calibration.references[:count],
        fitted={},
        denoiser=denoiser_of(denoiser.transformer, denoiser.interface, trajectory),
    )


def lemica_edges(bench: Bench) -> tuple[np.ndarray, float]:
    """End-to-end errors (T, T+1) of reusing the residual along each edge, and what they cost in full runs per prompt.

    LeMiCa, arXiv 2511.00090: the sampler is replayed with one jump, everything else computed.
    """
    table = bench.table
    calibration = few(bench.calibration, LEMICA_PROMPTS)
    if calibration.stages is None or not calibration.stages.features:
        raise NotApplicable("the blocks turn no tensor into one of its shape: there is no residual to reuse")
    if any(len(step.output_coefs) != 1 for step in program_from_table(table).steps):
        raise NotApplicable(f"{table.scheduler} weighs earlier outputs: a replay cannot start in the middle")
    total = table.num_inference_steps

    def row(start: int) -> dict[str, np.ndarray]:
        before = calibration.denoiser.evaluations[0]
        errors = jump_errors(table, calibration, start)
        spent = (calibration.denoiser.evaluations[0] - before) / calibration.trajectory.count / total
        return {"errors": errors, "full_runs": np.asarray(spent)}

    rows = [
        bench.workspace.arrays("lemica", [bench.key, LEMICA_PROMPTS, LEMICA_SPAN, start], partial(row, start))
        for start in range(total)
    ]  # one by one: replays take long, and an interrupted comparison goes on with the next row
    found = end_to_end_edge_errors(lambda start, end: float(rows[start]["errors"][end - start - 2]), total)
    return found, sum(float(kept["full_runs"]) for kept in rows)


@torch.no_grad()
def jump_errors(table: SolverTable, calibration: Calibration, start: int) -> np.ndarray:
    """Mean squared errors float64 (T − start − 1,) of the final latents after jumps from `start` to start+2 … T.

    One run reuses the residual of `start` as far as jumps go. What it has come to at each end is carried on with every
    step computed, all ends in one batch. Infinite beyond `LEMICA_SPAN`.
    """
    total, trajectory, stages = table.num_inference_steps, calibration.trajectory, calibration.stages
    assert stages is not None
    last = min(total, start + LEMICA_SPAN)
    schedule = [index for index in range(total) if not start < index < last]
    reused = residual_program(table, schedule, "reuse", np.zeros((total, total)))
    model = StagedModel(stages, calibration.denoiser)
    jumping, landed = trajectory.latents[start], trajectory.latents[start, :0]
    for index in range(start, total):
        step = reused.steps[index]
        if landed.shape[0]:
            denoiser = repeated(calibration.denoiser, landed.shape[0] // trajectory.count)
            landed = updated(step, landed, [denoiser(landed, step.timestep, step.input_scale)])
        if index < last:
            jumping = updated(step, jumping, [model(jumping, step)])
            landed = torch.cat([landed, jumping]) if index > start else landed
    errors = (landed.unflatten(0, (-1, trajectory.count)) - trajectory.latents[-1]).square().flatten(1).mean(1)
    return np.concatenate([errors.double().numpy(), np.full(total - last, math.inf)])


def repeated(denoiser: Denoiser, copies: int) -> Denoiser:
    """The denoiser for so many copies of its samples, one set after the other."""
    return replace(
        denoiser,
        guidance=denoiser.guidance.repeat(copies),
        conditioning={
            name: value.repeat(1, copies, *[1] * (value.ndim - 2)) for name, value in denoiser.conditioning.items()
        },
    )


def _lemica(bench: Bench, budget: int) -> tuple[Program, str, float]:
    errors, full_runs = lemica_edges(bench)
    try:
        schedule = shortest_schedule(errors, budget, Minimax())
    except ValueError:
        raise NotApplicable(f"no path of {budget} edges of at most {LEMICA_SPAN} steps") from None
    return _reuse(bench, schedule), "", full_runs


def _reuse(bench: Bench, schedule: Sequence[int]) -> Program:
    total = bench.table.num_inference_steps
    return residual_program(bench.table, tuple(schedule), "reuse", np.zeros((total, total)))


def annealed_schedule(
    loss: Callable[[tuple[int, ...]], float],
    budget: int,
    num_inference_steps: int,
    *,
    iterations: int,
    rounds: int,
    seed: int,
) -> tuple[int, ...]:
    """BudCache's search (arXiv 2606.13496): simulated annealing over computed steps, then steepest descent.

    As released: a random start that computes the first budget/4 steps, one step moved at a time (at most three away,
    seven times in ten), temperatures from 0.05 to 1e-5, then the best neighbour until none is better.
    """
    random = np.random.default_rng(seed)
    prefix = max(1, budget // 4)
    known: dict[tuple[int, ...], float] = {}

    def cost(schedule: tuple[int, ...]) -> float:
        if schedule not in known:
            known[schedule] = loss(schedule)
        return known[schedule]

    free = range(prefix, num_inference_steps)
    current = tuple(range(prefix)) + tuple(sorted(random.choice(free, budget - prefix, replace=False).tolist()))
    best = current
    for iteration in range(iterations if budget > prefix else 0):
        heat = 0.05 * (1e-5 / 0.05) ** (iteration / iterations)
        moved = int(random.choice(current[prefix:]))
        near = [step for step in free if step not in current and abs(step - moved) <= 3]
        targets = near if near and random.random() < 0.7 else [step for step in free if step not in current]
        if not targets:
            break
        candidate = tuple(sorted({*current, int(random.choice(targets))} - {moved}))
        change = cost(candidate) - cost(current)
        if change < 0 or random.random() < math.exp(-change / heat):
            current = candidate
        best = min(best, current, key=cost)
    for _ in range(rounds):
        neighbours = {
            tuple(sorted({*best, step} - {moved}))
            for moved in best[prefix:]
            for step in range(max(prefix, moved - 3), min(num_inference_steps, moved + 4))
            if step not in best
        }
        better = min(neighbours, key=cost, default=best)
        if cost(better) >= cost(best):
            break
        best = better
    return best


def _annealing(bench: Bench, budget: int) -> tuple[Program, str, float]:
    calibration = few(bench.calibration, ANNEALING_PROMPTS)
    if calibration.stages is None or not calibration.stages.features:
        raise NotApplicable("the blocks turn no tensor into one of its shape: there is no residual to reuse")
    total, latents = bench.table.num_inference_steps, calibration.trajectory.latents

    def loss(schedule: tuple[int, ...]) -> float:
        final = roll_out(_reuse(bench, schedule), calibration.denoiser, latents[0], calibration.stages)
        return float((final - latents[-1]).square().mean())

    def compute() -> Any:
        found = annealed_schedule(loss, budget, total, iterations=200, rounds=4, seed=bench.seed)
        return {"schedule": found, "full_runs": calibration.denoiser.evaluations[0] / ANNEALING_PROMPTS / total}

    found = bench.workspace.json("annealing", [bench.key, budget, ANNEALING_PROMPTS, bench.seed], compute)
    return _reuse(bench, found["schedule"]), "", found["full_runs"]


def _paper(bench: Bench, budget: int) -> tuple[Program, str, float]:
    """OTCache as published, with nothing of ours: residuals reused, reference graph, Optuna anchor, interpolated
    schedule.
    """
    calibration = few(bench.calibration, 8)
    stages = calibration.stages
    if stages is None or not stages.features:
        raise NotApplicable("the blocks turn no tensor into one of its shape: there is no residual to reuse")
    total = bench.table.num_inference_steps
    reference_budget, anchor_budget = round(0.4 * total), max(2, round(total / 12))

    def compute() -> Any:
        program = program_from_table(bench.table, payload="residual")
        gram = residual_gram(program, calibration.denoiser, calibration.trajectory.latents[0], stages)
        errors = residual_edge_errors(bench.table, gram)
        reference = shortest_schedule(errors, reference_budget, Power(4.0))
        anchor = search_anchor(
            lambda schedule: calibration.try_program("anchor", _reuse(bench, schedule)).score,
            budget=anchor_budget,
            num_inference_steps=total,
            trials=48,
            seed=bench.seed,
            starts=[shortest_schedule(errors, anchor_budget, Power(4.0)), uniform_schedule(anchor_budget, total)],
        ).schedule
        spent = calibration.denoiser.evaluations[0] / calibration.trajectory.count / total
        return {"reference": reference, "anchor": anchor, "full_runs": spent}

    found = bench.workspace.json("paper", [bench.key, bench.seed], compute)
    schedule = interpolated_schedule(found["reference"], found["anchor"], budget, total)
    return _reuse(bench, schedule), "", found["full_runs"]


def _calibrated(bench: Bench, program: Program, staged: type[StagedModel] = StagedModel) -> float:
    """PSNR in dB of a program on a few calibration prompts, by which a method's free settings are chosen."""
    calibration = few(bench.calibration, 8)
    if calibration.stages is None or not calibration.stages.features:
        raise NotApplicable("the blocks turn no tensor into one of its shape: there is no feature to forecast")
    model = staged(calibration.stages, calibration.denoiser)
    latents = roll_out(program, calibration.denoiser, calibration.trajectory.latents[0], calibration.stages, model)
    return float(metrics.psnr(calibration.decode(latents), calibration.references).mean())


def program_methods() -> list[ProgramMethod]:
    """All of them, in the order of the table."""
    return [
        few_steps("euler", "fewer steps of Euler"),
        few_steps("dpm++2m", "DPM-Solver++ 2M, arXiv 2211.01095"),
        few_steps("unipc", "UniPC, arXiv 2302.04867"),
        few_steps("uniform reuse", "output reused at uniform steps"),
        few_steps("uniform taylor-1", "output extrapolated at uniform steps"),
        ProgramMethod(
            name="spectrum",
            group="cache",
            source="arXiv 2603.01623",
            build=_spectrum,
            staged=lambda bench, evaluation: FeatureModel(cast(Stages, evaluation.stages), evaluation.denoiser),
        ),
        ProgramMethod(name="meancache", group="schedule", source="arXiv 2601.19961", build=_meancache),
        ProgramMethod(name="lemica", group="schedule", source="arXiv 2511.00090", build=_lemica),
        ProgramMethod(name="budcache", group="schedule", source="arXiv 2606.13496", build=_annealing),
        ProgramMethod(name="otcache (paper)", group="otcache", source="arXiv 2606.31026", build=_paper),
    ]
