"""Run programs in torch, on the build host: how candidates are tried and measured before anything is exported.

Shapes: m samples of one batch, latents (m, …) as the scheduler sees them, float32.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from otcache.schemas.program import Program, Step, position_axes

from ..graph.stages import Stages
from ..pipelines.arguments import tensor_of
from ..pipelines.denoiser import Denoiser
from ..programs.update import apply_step
from .batch import Batch
from .runs import FloatArray, gram_from_rows, new_array

Observe = Callable[[int, Tensor], None]
"""Called with the index of a step that is about to be computed, and the latents (m, …) before it."""

Cast = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
"""From inputs of the model in float32 to those that its stages take."""

WEIGHED_POSITIONS = 4096
"""Of a sample's residuals at most, chosen once with a fixed seed: the error of such an estimate is far below that of a
handful of prompts."""


@torch.no_grad()
def roll_out(
    program: Program,
    denoiser: Denoiser,
    latents: Tensor,
    stages: Stages | None = None,
    staged: StagedModel | None = None,
    observe: Observe | None = None,
    first_output: Tensor | None = None,
) -> Tensor:
    """Final latents (m, …) from initial ones.

    Args:
        program: a residual program needs the `stages` of the cut, or the `staged` model that is to run them.
        latents: initial ones (m, …).
        observe: told of every step that is computed.
        first_output: the guided output at the first step, where it is known: it is then not evaluated again. Programs
            of outputs only.
    """
    outputs: list[Tensor] = []
    if staged is None and program.payload == "residual" and stages:
        staged = StagedModel(stages, denoiser, keep=residual_memory(program))
    for position, step in enumerate(program.steps):
        if observe is not None and step.compute:
            observe(step.step_index, latents)
        if staged is not None:
            outputs.append(staged(latents, step))
        elif position == 0 and first_output is not None:
            outputs.append(first_output)
        else:
            outputs.append(denoiser(latents, step.timestep, step.input_scale))
        outputs = outputs[-program.output_memory :]
        latents = apply_step(step, latents, outputs)
    return latents


def residual_memory(program: Program) -> int:
    """How many computed steps back a cached step of the program looks, at least 1."""
    return max([1, *(len(step.residual_coefs) for step in program.steps if not step.compute)])


class StagedModel:
    """Embed, blocks and head run apart, with the blocks' residuals kept."""

    def __init__(self, stages: Stages, denoiser: Denoiser, keep: int = 16, cast: Cast = dict) -> None:
        self.stages, self.denoiser, self.keep, self.cast = stages, denoiser, keep, cast
        held = denoiser.interface.held
        self.constants = {name: tensor_of(held[name]) for name in stages.inputs if name in held}
        """Of the size, where the stages take them as inputs."""
        self.residuals: list[dict[str, Tensor]] = []
        """Of each computed step, newest last: result name → result − source."""

    def __call__(self, latents: Tensor, step: Step) -> Tensor:
        """The guided output at one step; the blocks run if `step.compute`."""
        inputs = self.cast(self.denoiser.inputs(latents, step.timestep, step.input_scale))
        values = {**self.constants, **inputs}
        for stage in self.stages.stages:
            if stage.kind == "block" and not step.compute:
                continue
            if stage.kind == "head":
                self._bridge(values, step)
            values.update(stage.run(values))
        return self.denoiser.guide(values[self.stages.output])

    def _bridge(self, values: dict[str, Tensor], step: Step) -> None:
        """Keep the residuals of a computed step, or put their forecast in place of the blocks' results."""
        if step.compute:
            self.residuals.append({result: values[result] - values[source] for source, result in self.stages.features})
            self.residuals = self.residuals[-self.keep :]
            return
        recent = self.residuals[-len(step.residual_coefs) :]
        for source, result in self.stages.features:
            forecast = sum(coef * kept[result] for coef, kept in zip(step.residual_coefs, recent, strict=True))
            values[result] = values[source] + forecast


@torch.no_grad()
def residual_gram(
    batch: Batch,
    program: Program,
    scratch: Path,
    *,
    positions: int = WEIGHED_POSITIONS,
    progress: Callable[[int, int], None] | None = None,
) -> FloatArray:
    """Mean inner products float64 (m, T, T) of the blocks' residuals along the full runs of `program`, for each sample.

    Residuals lie in a file while they are weighed. Of more than `positions` positions a fixed, seeded choice is
    weighed.
    """
    stages = batch.evaluator.stages
    assert stages is not None
    model = StagedModel(stages, batch.denoiser, keep=1)
    latents, outputs, total = batch.latents(0), list[Tensor](), len(program.steps)
    branches = batch.denoiser.interface.branches
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        kept: dict[str, np.memmap] = {}
        for index, step in enumerate(program.steps):
            outputs = [*outputs, model(latents, step)][-program.output_memory :]
            latents = apply_step(step, latents, outputs)
            for name, residual in model.residuals[-1].items():
                rows = take_positions(residual, positions).unflatten(0, (branches, batch.count)).transpose(0, 1)
                rows = rows.reshape(batch.count, -1).float().cpu()
                if name not in kept:
                    kept[name] = new_array(Path(folder) / f"{len(kept)}.npy", (batch.count, total, rows.shape[1]))
                kept[name][:, index] = rows.numpy()
            if progress:
                progress(index + 1, total)
        grams = np.zeros((batch.count, total, total))
        for array in kept.values():
            for row in range(batch.count):
                grams[row] += gram_from_rows(array[row]) / array.shape[2]
        kept.clear()
    return grams


def take_positions(value: Tensor, positions: int = WEIGHED_POSITIONS) -> Tensor:
    """(n, …) → (n, d): flattened, with at most so many of its positions (`position_axes`), the same at every call."""
    axes = position_axes(value.ndim)
    count = int(np.prod([value.shape[axis] for axis in axes]))
    if not axes or count <= positions:
        return value.flatten(1)
    rows = value if value.ndim == 3 else value.flatten(1, -3).flatten(2).transpose(1, 2)  # (n, positions, channels)
    chosen = np.sort(np.random.default_rng(0).choice(count, positions, replace=False))
    return rows[:, torch.from_numpy(chosen).to(value.device)].flatten(1)
