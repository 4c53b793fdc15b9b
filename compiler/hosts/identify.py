"""Whether a live pipeline is the one that a program was calibrated on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from diffusers.utils.torch_utils import unwrap_module

from otcache.schemas.errors import ModelError

from ..models.digests import active_adapters, denoiser_digest, own_options
from ..models.model import transformer_of
from .recipe import Recipe


def model_fault(pipeline: Any, recipe: Recipe, source: Any) -> Iterator[ModelError]:
    """Every way in which the pipeline differs from the compiled model. The same transformer in another pipeline is no
    fault.

    source: the scheduler that was compiled.
    """
    transformer = unwrap_module(transformer_of(pipeline, "the pipeline"))
    scheduler = pipeline.scheduler
    of_ours = "recipe" in scheduler.config
    if not of_ours and (type(scheduler) is not type(source) or own_options(scheduler) != own_options(source)):
        yield ModelError(
            f"the pipeline's scheduler is {_named(scheduler)}: expected {_named(source)}, from which {recipe} was "
            "compiled: set that one, or compile with this one"
        )
    if type(transformer).__name__ != recipe.model.transformer:
        yield ModelError(
            f"the pipeline's model is a {type(transformer).__name__}: expected a {recipe.model.transformer}, which {recipe} "
            "was calibrated on: take its artifact, or compile this model"
        )
    elif adapters := active_adapters(transformer):
        yield ModelError(
            f"the pipeline's model has LoRA {', '.join(adapters)}: expected none, as {recipe} was calibrated without: "
            "compile the model with it, or use strict=False"
        )
    elif recipe.model.denoiser_digest is None:
        yield ModelError(
            f"the artifact of {recipe} does not say which weights it was calibrated on, as compiles since schema 1.2 do: "
            "compile it again, or use strict=False"
        )
    elif (found := denoiser_digest(transformer)) != recipe.model.denoiser_digest:
        yield ModelError(
            f"the pipeline's {recipe.model.transformer} has digest {found}: expected {recipe.model.denoiser_digest}, weights "
            f"and options which {recipe} was calibrated on: take its artifact, or compile this model"
        )


def _named(scheduler: Any) -> str:
    options = ", ".join(f"{key}={value!r}" for key, value in sorted(own_options(scheduler).items()))
    return f"{type(scheduler).__name__}({options})"
