"""Whether a live pipeline is the one that a program was calibrated on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils.torch_utils import unwrap_module
from torch import nn

from otcache.schemas.errors import ModelError

from ..models.digests import active_adapters, denoiser_digest, own_options, weights_sample
from ..models.model import transformer_of
from .recipe import Recipe

WHOLE = (torch.float32, torch.bfloat16, torch.float16)
"""Types that hold weights as they are, rather than quantised."""


def model_faults(pipeline: Any, recipe: Recipe, source: Any) -> Iterator[ModelError]:
    """Every way in which the pipeline differs from the compiled model. The same transformer in another pipeline is no
    fault.

    source: the scheduler that was compiled.
    """
    transformer = unwrap_module(transformer_of(pipeline, "the pipeline"))
    scheduler = pipeline.scheduler
    of_ours = "recipe" in scheduler.config
    if not of_ours and (type(scheduler) is not type(source) or own_options(scheduler) != own_options(source)):
        yield ModelError(
            f"the pipeline's scheduler is {_in_words(scheduler)}: expected {_in_words(source)}, from which {recipe} "
            "was compiled: set that one, or compile with this one"
        )
    if type(transformer).__name__ != recipe.model.transformer:
        yield ModelError(
            f"the pipeline's model is a {type(transformer).__name__}: expected a {recipe.model.transformer}, which "
            f"{recipe} was calibrated on: take its artifact, or compile this model"
        )
        return
    if adapters := active_adapters(transformer):
        yield ModelError(
            f"the pipeline's model has LoRA {', '.join(adapters)}: expected none, as {recipe} was calibrated without: "
            "compile the model with it, switch it off, or use strict=False"
        )
    yield from _weights_fault(transformer, recipe)


def _weights_fault(transformer: nn.Module, recipe: Recipe) -> Iterator[ModelError]:
    """Other weights or options than were compiled, whatever they were cast to."""
    model = recipe.model
    if model.denoiser_digest is None:
        yield ModelError(
            f"the artifact of {recipe} does not say which weights it was calibrated on, as compiles since schema 1.2 "
            "do: compile it again, or use strict=False"
        )
        return
    held = {value.dtype for value in transformer.state_dict().values() if value.is_floating_point()}
    expected = {torch.bfloat16: model.denoiser_digest, torch.float16: model.denoiser_digest_float16}
    order = sorted(expected, key=lambda dtype: (dtype not in held, dtype != torch.bfloat16))
    found = {}
    for dtype in order:
        if expected[dtype] is not None:
            found[dtype] = denoiser_digest(transformer, dtype)
            if found[dtype] == expected[dtype]:
                return
    if torch.float16 in held and model.denoiser_digest_float16 is None:
        yield ModelError(
            f"the pipeline's {model.transformer} is held in float16: expected float32 or bfloat16, in which alone the "
            f"artifact of {recipe} says what its weights are, as it is older than schema 1.8: load it so, or compile "
            "it again"
        )
        return
    odd = sorted(str(dtype).removeprefix("torch.") for dtype in held - set(WHOLE))
    dtype = next(iter(found))
    yield ModelError(
        f"the pipeline's {model.transformer} has digest {found[dtype]}: expected {expected[dtype]}, weights and "
        f"options which {recipe} was calibrated on: take its artifact, or compile this model"
        + (f"; where it is the same and quantised here ({', '.join(odd)}), use strict=False" if odd else "")
    )


@dataclass(frozen=True, kw_only=True)
class ModelState:
    """What shows whether a pipeline's transformer has become another, cheap enough to look at in every request."""

    identity: int
    adapters: tuple[str, ...]
    sample: str | None
    """A few elements of its weights; None where they cannot be seen, which tells nothing."""

    def is_still(self, earlier: ModelState) -> bool:
        """Whether nothing shows that the model has changed since."""
        seen = self.sample is not None and earlier.sample is not None
        same = (self.identity, self.adapters) == (earlier.identity, earlier.adapters)
        return same and (not seen or self.sample == earlier.sample)


def model_state(pipeline: Any) -> ModelState:
    """The state of a pipeline's transformer now."""
    transformer = unwrap_module(transformer_of(pipeline, "the pipeline"))
    adapters = tuple(active_adapters(transformer))
    return ModelState(identity=id(transformer), adapters=adapters, sample=weights_sample(transformer))


def _in_words(scheduler: Any) -> str:
    options = ", ".join(f"{key}={value!r}" for key, value in sorted(own_options(scheduler).items()))
    return f"{type(scheduler).__name__}({options})"
