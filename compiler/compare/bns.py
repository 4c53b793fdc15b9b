"""BNS, bespoke non-stationary solvers (arXiv 2403.01329): times and coefficients trained end to end.

As published (the abstract and notes of the paper, whose text was not at hand; no code is released): B evaluations at
times of their own; every update weighs the start and all outputs so far with numbers of its own, x_{i+1} = a_i x_0 +
Σ_j b_ij v_j, here as latent_coef · x_i + Σ_j b_ij v_j, which is the same family; training starts from a solver that the
family contains, and minimises the mean of log ‖x_B − X_T‖² over pairs of noise and final latents by gradients through
all evaluations of the frozen model.

Chosen here: where training starts, the best on calibration samples of Euler, DPM++ and UniPC with their shifts and
spacings tuned (the paper starts from Euler or the midpoint rule under a scheduler that is tuned by hand); how long it
goes, `ROUNDS` steps of Adam on the calibration samples in turns, where the paper makes millions of evaluations on 520
pairs; and what a change of 1 is. What comes of it is kept where calibration prefers it to its start. An evaluation
whose gradient is taken counts as three.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from otcache.schemas.program import Program, Step

from ..calibration.batch import Batch
from ..calibration.samples import Rows
from ..pipelines.arguments import arguments
from ..programs.baselines import nearest_step_indices
from ..programs.solver_table import MAX_MEMORY, SolverTable
from . import solvers
from .method import Bench, Built, NotApplicable, ProgramMethod, choose_program

STARTS = ("euler", "dpm++2m", "unipc")
"""Solvers, of `solvers`, whose best variants training may start from."""
ROUNDS, BATCH = 80, 8
"""Steps of Adam, and samples of each."""
GRADIENT_EVALUATIONS = 3
"""What an evaluation counts as whose gradient is taken."""


def rate(budget: int) -> float:
    """Of the first step; it falls to nothing in a straight line.

    >>> rate(4), rate(16)
    (0.02, 0.01)
    """
    return min(0.02, 0.16 / budget)


@dataclass(frozen=True, kw_only=True)
class Family:
    """The solvers of a budget B around a program, as vectors: changes of its times, then of its coefficients.

    A change of 1 in a time is the mean distance between two; of 1 in a coefficient of a step, the sum of the sizes of
    its output coefficients.
    """

    start: Program
    table: SolverTable

    @property
    def budget(self) -> int:
        """B."""
        return len(self.start.steps)

    @property
    def size(self) -> int:
        """Numbers: B − 1 times, the first being fixed, and 2 + 3 + … coefficients."""
        return self.budget - 1 + sum(2 + position for position in range(self.budget))

    def times(self, vector: Tensor) -> Tensor:
        """(B,) in the scheduler's units, within the full sampler's."""
        start = torch.tensor([step.timestep for step in self.start.steps], dtype=torch.float64)
        moved = torch.cat([vector.new_zeros(1), vector[: self.budget - 1]]) * start.diff().abs().mean().nan_to_num()
        ends = self.table.timesteps[[0, -1]].tolist() + start.tolist()
        return (start + moved).clamp(min(ends), max(ends))

    def scales(self, times: Tensor) -> Tensor:
        """(B,) factors of the latents on their way into the model, following the full sampler's between its times."""
        order = np.argsort(self.table.timesteps)
        known = torch.from_numpy(self.table.timesteps[order].copy())
        values = torch.from_numpy(self.table.input_scales[order].copy())

        def at(where: Tensor) -> Tensor:
            right = torch.searchsorted(known, where.detach()).clamp(1, len(known) - 1)
            part = ((where - known[right - 1]) / (known[right] - known[right - 1])).clamp(0.0, 1.0)
            return values[right - 1] + part * (values[right] - values[right - 1])

        if len(known) == 1:
            return torch.tensor([step.input_scale for step in self.start.steps], dtype=torch.float64)
        begun = torch.tensor([step.timestep for step in self.start.steps], dtype=torch.float64)
        own = torch.tensor([step.input_scale for step in self.start.steps], dtype=torch.float64)
        return own * at(times) / at(begun)

    def coefs(self, vector: Tensor) -> list[Tensor]:
        """Of each step, (2 + position,): the latents' coefficient and those of all outputs so far."""
        found, used = [], self.budget - 1
        for position, step in enumerate(self.start.steps):
            own = torch.zeros(2 + position, dtype=torch.float64)
            own[0] = step.latent_coef
            own[2 + position - len(step.output_coefs) :] = torch.tensor(step.output_coefs, dtype=torch.float64)
            found.append(own + own[1:].abs().sum() * vector[used : used + len(own)])
            used += len(own)
        return found

    def program(self, vector: np.ndarray) -> Program:
        """The solver as a program. Raises ValueError for coefficients that none may hold."""
        moved = torch.from_numpy(np.asarray(vector, dtype=np.float64))
        times = self.times(moved)
        indices = nearest_step_indices(times.tolist(), self.table.timesteps)
        steps = [
            Step(
                step_index=index,
                timestep=float(time),
                input_scale=float(scale),
                latent_coef=float(coefs[0]),
                output_coefs=tuple(coefs[1:].tolist()),
            )
            for index, time, scale, coefs in zip(indices, times, self.scales(times), self.coefs(moved), strict=True)
        ]
        return Program(payload="output", steps=tuple(steps))


def final_errors(family: Family, vector: np.ndarray) -> Callable[[Batch], Rows]:
    """For a batch: `loss` (m,), the log of each sample's mean squared error at the end, and `gradient` (m, size), the
    batch's mean one in every row.
    """

    def answer(batch: Batch) -> Rows:
        with torch.enable_grad():
            moved = torch.from_numpy(vector.copy()).requires_grad_()
            times = family.times(moved)
            scales = family.scales(times)
            latents, outputs = batch.latents(0), list[Tensor]()
            for time, scale, coefs in zip(times, scales, family.coefs(moved), strict=True):
                outputs.append(guided_output(batch, latents, time, scale))
                weights = coefs.to(latents.device, torch.float32)
                latents = weights[0] * latents + sum(w * v for w, v in zip(weights[1:], outputs, strict=True))
            missed = (latents - batch.latents(-1)).flatten(1).square().mean(dim=1)
            losses = missed.double().clamp_min(1e-12).log()
            (gradient,) = torch.autograd.grad(losses.mean(), moved)
        return {
            "loss": losses.detach().cpu().numpy(),
            "gradient": np.tile(gradient.numpy(), (batch.count, 1)),
        }

    return answer


def guided_output(batch: Batch, latents: Tensor, timestep: Tensor, input_scale: Tensor) -> Tensor:
    """The guided output (m, …) float32, as `Denoiser` computes it, with gradients of latents, time and scale."""
    denoiser, interface = batch.denoiser, batch.denoiser.interface
    inputs = denoiser.inputs(latents * input_scale.to(latents.device, latents.dtype), 0.0, 1.0)
    times = inputs[interface.timestep_input]
    inputs[interface.timestep_input] = (timestep * interface.timestep_scale).to(times).expand_as(times)
    output = denoiser.transformer(**arguments(inputs, interface.constants))
    return denoiser.guide(interface.output(output))


def trained_program(bench: Bench, start: Program) -> Program:
    """The program that training comes to from another; the other where its losses are not finite numbers."""
    family, samples = Family(start=start, table=bench.table), bench.calibration.samples
    vector = torch.zeros(family.size, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([vector], lr=rate(family.budget))
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 1.0 / ROUNDS, total_iters=ROUNDS)
    batches = [slice(first, first + BATCH) for first in range(0, samples.count, BATCH)]
    for position in range(ROUNDS):
        found = samples.map(final_errors(family, vector.detach().numpy()), batches[position % len(batches)])
        gradient = found["gradient"].mean(axis=0)
        if not np.isfinite(gradient).all():
            return start
        vector.grad = torch.from_numpy(gradient)
        optimizer.step()
        decay.step()
    return family.program(vector.detach().numpy())


def _build(bench: Bench, budget: int) -> Built:
    candidates = []
    for method in (each for each in solvers.METHODS if each.name in STARTS):
        try:
            built = method.build(bench, budget)
        except NotApplicable:
            continue
        candidates.append(Built(program=built.program, setting=f"from {method.name}, {built.setting}"))
    if not candidates:
        raise NotApplicable(f"no solver that BNS could start from can be built for {bench.table.scheduler}")
    start = choose_program(bench, candidates)
    if budget > MAX_MEMORY or len(start.program.steps) < 2:
        raise NotApplicable(f"BNS trains programs of 2 to {MAX_MEMORY} evaluations")
    count = bench.calibration.count
    key = [bench.key, count, [ROUNDS, BATCH, rate(budget)], start.program.model_dump(mode="json")]
    found = bench.workspace.json("bespoke", key, lambda: trained_program(bench, start.program).model_dump(mode="json"))
    trained = Built(program=Program.model_validate(found), setting=f"trained {start.setting}")
    best = choose_program(bench, [trained, start])
    spent = GRADIENT_EVALUATIONS * ROUNDS * min(BATCH, count) * budget / (bench.table.num_inference_steps * count)
    return replace(best, full_runs=spent)


PUBLISHED = (4, None)
"""The paper's least, on ImageNet-64."""

METHODS = (ProgramMethod(name="bns", group="solver", source="arXiv 2403.01329", build=_build, published=PUBLISHED),)
