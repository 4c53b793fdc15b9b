"""The cut model: a chain of stages, embed | block 0 … n−1 | head, wired by the names of tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, fx

from ..models.mapped_weights import give_back

StageKind = Literal["embed", "block", "head"]


@dataclass(frozen=True)
class StageGraph:
    """A piece of the model in torch: `module(*inputs)` gives the tuple of `outputs`, by names of the whole chain."""

    name: str
    kind: StageKind
    module: fx.GraphModule
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def run(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run the stage. `tensors` has at least its inputs; the result has its outputs by name."""
        with torch.no_grad():
            results = self.module(*(tensors[name] for name in self.inputs))
        return dict(zip(self.outputs, results, strict=True))


@dataclass(frozen=True)
class Stages:
    """The model as a chain of stages, in order of execution."""

    stages: tuple[StageGraph, ...]
    inputs: tuple[str, ...]
    """Names of what varies per step or per request: the keyword arguments of the model."""
    output: str
    """Name of the model output."""
    features: tuple[tuple[str, str], ...]
    """(source, result): the blocks turn `source`, made by embed or an input, into `result`, read by head, of the same
    shape. Head can be fed source + residual in place of the blocks. Empty where no such pairs exist: the model then
    has no payload `residual`."""

    def of_kind(self, kind: StageKind) -> tuple[StageGraph, ...]:
        """The stages of a kind, in order of execution."""
        return tuple(stage for stage in self.stages if stage.kind == kind)


def run_in_turn(stages: Stages, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Run every stage in torch, and give the memory of its weights back (`mapped_weights`) before the next one runs.

    Args:
        stages: from pass `cut`.
        inputs: those of the model by name, in the dtypes that it was traced with and at any batch size.

    Returns:
        Every tensor of the chain by name, inputs included; the model's output is the one called `stages.output`.
    """
    tensors = dict(inputs)
    for stage in stages.stages:
        tensors.update(stage.run(tensors))
        give_back(stage.module)
    return tensors
