"""Which guidance a pipeline runs with, measured at every step: pipelines do not tell their scheduler.

The transformer's outputs are kept from one `step` to the next, whose model output is then written as a combination of
them. Shapes: n samples, outputs (n, …) of one branch or (2n, …) of two.
"""

from __future__ import annotations

import math
import threading
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from otcache.schemas.errors import RequestError

from ..models.model import transformer_of
from ..pipelines.arguments import PLAIN
from ..pipelines.call import scale_offset
from .calls import calling_pipeline
from .recipe import Recipe

TOLERANCE = 0.02
"""Of a measured scale, relative: bfloat16 outputs have eight bits."""
MOST_CALLS = 8
"""Of the transformer that are kept: more than any pipeline makes in a step."""
MOST_VECTORS = 1024
"""That a scale is measured on."""


@dataclass
class Seen:
    """What the transformer did in one step."""

    outputs: list[Tensor] = field(default_factory=list)
    embedded: float | None = None
    """The scale that a guidance-distilled model was given."""
    offset: float = 0.0
    """Of the pipeline's own argument from the scale (`pipelines.call.scale_offset`)."""

    def scale_in_words(self, scale: float) -> str:
        """A scale, and what this pipeline calls it where that is another number."""
        return f"{scale:g}" + (f" (here called {scale + self.offset:g})" if self.offset else "")

    def __bool__(self) -> bool:
        return bool(self.outputs)


class GuidanceProbe:
    """Listens to what calls of a pipeline's transformer in this thread give, until it is closed.

    Hears nothing of a model that was compiled in place, whose hooks do not run, and nothing that another pipeline,
    which shares the transformer, has asked for.
    """

    def __init__(self, pipeline: Any) -> None:
        self._offset = scale_offset(pipeline)
        self._seen = Seen(offset=self._offset)
        self._pipeline = weakref.ref(pipeline)
        self._thread = threading.get_ident()
        self._scale = getattr(pipeline, "guidance_scale", None)
        """As the pipeline was called; what the model is given may be a multiple, which stays the same."""
        self._first_given: float | None = None
        transformer = transformer_of(pipeline, "the pipeline")
        self._handle = None
        if getattr(transformer, "_compiled_call_impl", None) is None:
            self._handle = transformer.register_forward_hook(self._listen, with_kwargs=True)

    def _listen(self, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if threading.get_ident() != self._thread or calling_pipeline() not in (None, self._pipeline()):
            return
        if len(self._seen.outputs) < MOST_CALLS:
            self._seen.outputs.append(PLAIN(output))
        guidance = kwargs.get("guidance")
        if isinstance(guidance, Tensor) and guidance.numel() and self._scale is not None:
            given = float(guidance.flatten()[0])
            self._first_given = given if self._first_given is None else self._first_given
            self._seen.embedded = self._scale * (given / self._first_given if self._first_given else 1.0)

    def take(self) -> Seen:
        """What was seen since the last time."""
        seen, self._seen = self._seen, Seen(offset=self._offset)
        return seen

    def close(self) -> None:
        """Stop listening, and forget."""
        self.take()
        if self._handle is not None:
            self._handle.remove()


def guidance_fault(seen: Seen, guided: Tensor, recipe: Recipe, step: int = 0) -> RequestError | None:
    """How the guidance at a step differs from what the program was calibrated for, if it does."""
    expected, where = recipe.guidance, f" at step {step}" if step else ""
    low, high = expected.minimum, expected.maximum
    span = seen.scale_in_words(low) if low == high else f"{seen.scale_in_words(low)} to {seen.scale_in_words(high)}"
    wanted = f"expected {span}{' throughout' if step else ''}, which {recipe} was calibrated for"
    branches = sum(output.shape[0] for output in seen.outputs) / _one_of_equal_halves(guided).shape[0]
    if branches not in (1, 2):
        return RequestError(
            f"the pipeline combines {branches:g} branches{where}, as with skipped layers or perturbed attention: "
            f"expected {expected.branches}, as {recipe} was calibrated: switch that off, or use strict=False"
        )
    scale = measure_scale(seen.outputs, guided)
    if scale is not None and math.isnan(scale):
        return None
    if expected.kind == "none":
        if scale is not None:
            return RequestError(
                f"the pipeline guides with two branches (scale {scale:.3g}){where}: expected one, as {recipe} was "
                "calibrated: switch its guidance off"
            )
        if seen.embedded is None:
            return None
        scale = seen.embedded
    if scale is None:
        return RequestError(
            f"the pipeline runs without guidance{where}: {wanted}: give a scale and a negative prompt"
            f"{', and let no callback cut guidance off' if step else ''}"
        )
    if not low * (1 - TOLERANCE) <= scale <= high * (1 + TOLERANCE):
        return RequestError(
            f"guidance scale is {seen.scale_in_words(float(f'{scale:.3g}'))}{where}: {wanted}: pass one of those, or "
            "compile for a wider range"
        )
    return None


def measure_scale(outputs: list[Tensor], guided: Tensor) -> float | None:
    """The scale s with which guided ∝ (1 − s) · negative + s · positive; None for a single branch, NaN for two equal
    ones.

    The larger of the two weights is the positive branch's, and only their ratio counts, so that a norm that is kept or
    rescaled afterwards (Qwen-Image, `guidance_rescale`) does not matter. Least squares along the last axis, then the
    median over those vectors where the branches are furthest apart: half of them, at most `MOST_VECTORS`.
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
    chosen = apart.topk(min((len(apart) + 1) // 2, MOST_VECTORS)).indices
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
