"""Run programs in torch, on the build host: how candidates are tried and evaluated before anything is exported."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from otcache.schemas.program import Program, Step

from ..graph.stages import Stages
from ..pipelines.arguments import tensor_of
from ..pipelines.denoiser import Denoiser
from ..programs.update import updated

Observe = Callable[[int, Tensor], None]
"""Called with the index of a step that is about to be computed, and the latents (n, …) before it."""

Cast = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
"""From inputs of the model in float32 to those that its stages take."""


@torch.no_grad()
def roll_out(
    program: Program,
    denoiser: Denoiser,
    latents: Tensor,
    stages: Stages | None = None,
    staged: StagedModel | None = None,
    observe: Observe | None = None,
) -> Tensor:
    """Final latents (n, …) float32 from initial ones.

    A residual program needs the `stages` of the cut, or the `staged` model that is to run them.
    """
    outputs: list[Tensor] = []
    memory = staged
    if memory is None and program.payload == "residual" and stages:
        memory = StagedModel(stages, denoiser)
    for step in program.steps:
        if observe is not None and step.compute:
            observe(step.step_index, latents)
        if memory is None:
            outputs.append(denoiser(latents, step.timestep, step.input_scale))
        else:
            outputs.append(memory(latents, step))
        outputs = outputs[-program.output_memory :]
        latents = updated(step, latents, outputs)
    return latents


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
        if step.compute:
            self.denoiser.evaluations[0] += latents.shape[0]
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


def residual_gram(
    program: Program,
    denoiser: Denoiser,
    latents: Tensor,
    stages: Stages,
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """Mean inner products float64 (T, T) of the blocks' residuals along the full run of `program`."""
    model = StagedModel(stages, denoiser, keep=len(program.steps))
    outputs: list[Tensor] = []
    total = len(program.steps)
    gram = np.zeros((total, total))
    with torch.no_grad():
        for index, step in enumerate(program.steps):
            outputs.append(model(latents, step))
            outputs = outputs[-program.output_memory :]
            latents = updated(step, latents, outputs)
            new = model.residuals[-1]
            for other, kept in enumerate(model.residuals):
                value = sum(float((new[name].double() * kept[name].double()).mean()) for name in new)
                gram[index, other] = gram[other, index] = value
            if progress:
                progress(index + 1, total)
    return gram
