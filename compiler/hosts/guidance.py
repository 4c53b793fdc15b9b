"""Which guidance a pipeline runs with, measured on its first step: pipelines do not tell their scheduler.

The transformer's outputs are kept from the start of a request to its first `step`, whose model output is then written
as a combination of them. Shapes: n samples, outputs (n, …) of one branch or (2n, …) of two.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from otcache.schemas.errors import RequestError

from ..models.model import transformer_of
from ..pipelines.arguments import PLAIN
from ..pipelines.call import scale_offset
from .recipe import Recipe

TOLERANCE = 0.02
"""Of a measured scale, relative: bfloat16 outputs have eight bits."""


@dataclass
class Seen:
    """What the transformer did in the first step."""

    outputs: list[Tensor] = field(default_factory=list)
    embedded: float | None = None
    """The scale that a guidance-distilled model was given."""
    offset: float = 0.0
    """Of the pipeline's own argument from the scale (`calling.scale_offset`)."""

    def named(self, scale: float) -> str:
        """A scale, and what this pipeline calls it where that is another number."""
        return f"{scale:g}" + (f" (here called {scale + self.offset:g})" if self.offset else "")

    def __bool__(self) -> bool:
        return bool(self.outputs)


class GuidanceProbe:
    """Listens to what this thread's calls of a pipeline's transformer give, until it is closed.

    Hears nothing of a model that was compiled in place, whose hooks do not run.
    """

    def __init__(self, pipeline: Any) -> None:
        self._seen = Seen(offset=scale_offset(pipeline))
        self._thread = threading.get_ident()
        self._scale = getattr(
            pipeline, "guidance_scale", None
        )  # as it was called; what the model is given may be a multiple
        transformer = transformer_of(pipeline, "the pipeline")
        self._handle = None
        if getattr(transformer, "_compiled_call_impl", None) is None:
            self._handle = transformer.register_forward_hook(self._listen, with_kwargs=True)

    def _listen(self, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if threading.get_ident() == self._thread:
            self._seen.outputs.append(PLAIN(output))
            if kwargs.get("guidance") is not None:
                self._seen.embedded = self._scale

    def close(self) -> Seen:
        """What was seen; nothing the second time."""
        seen, self._seen = self._seen, Seen(offset=self._seen.offset)
        if self._handle is not None:
            self._handle.remove()
        return seen


def guidance_fault(seen: Seen, guided: Tensor, recipe: Recipe) -> RequestError | None:
    """How the guidance differs from what the program was calibrated for, if it does."""
    expected = recipe.guidance
    scale = measured_scale(seen.outputs, guided)
    if scale is not None and math.isnan(scale):
        return None
    if scale is None and seen.embedded is not None and expected.kind == "none":
        scale = seen.embedded
    elif expected.kind == "none":
        if scale is None:
            return None
        return RequestError(
            f"the pipeline guides with two branches (scale {scale:.3g}): expected one, as {recipe} was calibrated: switch "
            "its guidance off"
        )
    low, high = expected.minimum, expected.maximum
    span = seen.named(low) if low == high else f"{seen.named(low)} to {seen.named(high)}"
    wanted = f"expected {span}, which {recipe} was calibrated for"
    if scale is None:
        return RequestError(f"the pipeline runs without guidance: {wanted}: give a scale and a negative prompt")
    if not low * (1 - TOLERANCE) <= scale <= high * (1 + TOLERANCE):
        return RequestError(
            f"guidance scale is {seen.named(float(f'{scale:.3g}'))}: {wanted}: pass one of those, or compile for a wider range"
        )
    return None


def measured_scale(outputs: list[Tensor], guided: Tensor) -> float | None:
    """The scale s with which guided ∝ (1 − s) · negative + s · positive; None for a single branch, NaN for two equal
    ones.

    The larger of the two weights is the positive branch's, and only their ratio counts, so that a norm that is kept or
    rescaled afterwards (Qwen-Image, `guidance_rescale`) does not matter. Least squares along the last axis, then the
    median over the half of the vectors where the branches are furthest apart.
    """
    guided, count = _one_of_equal_halves(guided), len(outputs)
    if count == 1 and outputs[0].shape[0] == 2 * guided.shape[0]:
        outputs = list(outputs[0].chunk(2))
    elif count != 2:
        return None
    first, second = (output[:, : guided.shape[1]].float() for output in outputs)  # beyond: a learned variance
    apart = (first - second).norm(dim=-1).flatten()
    if not apart.any():
        return math.nan
    chosen = apart >= apart.median()
    basis = torch.stack([first, second], dim=-1).flatten(0, -3)[chosen]
    target = guided.float().flatten(0, -2)[chosen, :, None]
    weights = torch.linalg.lstsq(basis.double().cpu(), target.double().cpu()).solution[..., 0]
    shares = weights / weights.sum(dim=1, keepdim=True)
    return float(shares.max(dim=1).values.median())


def _one_of_equal_halves(guided: Tensor) -> Tensor:
    """DiT steps both halves of its batch with the same guided output."""
    half = guided.shape[0] // 2
    twice = half > 0 and guided.shape[0] == 2 * half and torch.equal(guided[:half], guided[half:])
    return guided[:half] if twice else guided
