"""How a pipeline is called: its own keyword arguments, resolved from the options and its signature; its scheduler
prepared.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from otcache.schemas.errors import ModelError, UsageError

from ..models.model import transformer_of


@dataclass(frozen=True, kw_only=True)
class CallOptions:
    """How the pipeline is called: its own keyword arguments, resolved from the options and its signature."""

    height: int
    width: int
    num_frames: int | None
    """None for a pipeline of pictures."""
    num_inference_steps: int
    max_sequence_length: int | None
    negative_prompt: str
    guidance_argument: str | None
    """`true_cfg_scale`, `guidance_scale`, or None for a pipeline without guidance."""
    scale_offset: float = 0.0
    """Of that argument from the scale: −1 for a pipeline that adds so much guidance to the positive branch (Z-Image).
    """
    accepted: frozenset[str]
    """Names of the pipeline's call arguments."""

    def arguments(self, guidance_scale: float, count: int) -> dict[str, Any]:
        """Keyword arguments for a call with `count` prompts that returns latents.

        guidance_scale: s in (1 − s) · negative + s · positive, whatever the pipeline counts from.
        """
        arguments: dict[str, Any] = {"num_inference_steps": self.num_inference_steps, "output_type": "latent"}
        if "height" in self.accepted:
            arguments |= {"height": self.height, "width": self.width}
        if "clean_caption" in self.accepted:
            arguments["clean_caption"] = False  # it takes packages that a server would need as well
        if "use_resolution_binning" in self.accepted:
            arguments["use_resolution_binning"] = False  # else another size is drawn and then resized
        if self.num_frames is not None:
            arguments["num_frames"] = self.num_frames
        if self.max_sequence_length is not None and "max_sequence_length" in self.accepted:
            arguments["max_sequence_length"] = self.max_sequence_length
        if self.guidance_argument:
            arguments[self.guidance_argument] = guidance_scale + self.scale_offset
            if "negative_prompt" in self.accepted:
                arguments["negative_prompt"] = [self.negative_prompt] * count
        return arguments


def call_options(
    pipeline: Any,
    *,
    num_inference_steps: int,
    height: int | None = None,
    width: int | None = None,
    num_frames: int | None = None,
    max_sequence_length: int | None = None,
    negative_prompt: str = "",
) -> CallOptions:
    """Fill in what the user left out: the pipeline's own size, else the autoencoder's; the tokenizer's length.

    Raises UsageError for frames of a pipeline that draws pictures.
    """
    name, parameters = type(pipeline).__name__, inspect.signature(type(pipeline).__call__).parameters
    defaults = {key: parameter.default for key, parameter in parameters.items() if isinstance(parameter.default, int)}
    if num_frames is not None and "num_frames" not in parameters:
        raise UsageError(f"--num-frames is {num_frames}, but {name} draws pictures: leave it out")
    if max_sequence_length is None and "max_sequence_length" in defaults:
        tokenizers = [part for part in pipeline.components.values() if hasattr(part, "model_max_length")]
        sequence = [part for part in tokenizers if "CLIP" not in type(part).__name__]  # beside others, CLIP is pooled
        lengths = [part.model_max_length for part in (sequence or tokenizers)[-1:]]
        max_sequence_length = min([defaults["max_sequence_length"], *lengths])
    embedded = getattr(transformer_of(pipeline, name).config, "guidance_embeds", False)
    guidance = None
    if "true_cfg_scale" in parameters and not embedded:
        guidance = "true_cfg_scale"
    elif "guidance_scale" in parameters:
        guidance = "guidance_scale"
    side = _default_side(pipeline)
    return CallOptions(
        height=height or defaults.get("height", side),
        width=width or defaults.get("width", side),
        num_frames=num_frames or defaults.get("num_frames"),
        num_inference_steps=num_inference_steps,
        max_sequence_length=max_sequence_length,
        negative_prompt=negative_prompt,
        guidance_argument=guidance,
        scale_offset=scale_offset(pipeline),
        accepted=frozenset(parameters),
    )


def scale_offset(pipeline: Any) -> float:
    """−1 for a pipeline that guides at scale 1 already, where others run one branch; `probe` proves what it guides
    with.
    """
    at_one = copy.copy(pipeline)
    at_one._guidance_scale = 1.0
    return -1.0 if getattr(at_one, "do_classifier_free_guidance", False) else 0.0


def _default_side(pipeline: Any) -> int:
    """Pixels that the autoencoder was trained at, or that the pipeline names."""
    side = getattr(getattr(getattr(pipeline, "vae", None), "config", None), "sample_size", None)
    if isinstance(side, int):
        return side
    default = getattr(pipeline, "default_sample_size", 64)
    return int(default if isinstance(default, int) else 64) * int(getattr(pipeline, "vae_scale_factor", 8))


def prompt_arguments(pipeline: Any, prompts: Sequence[str]) -> dict[str, list[Any]]:
    """Prompts as the pipeline's call takes them: texts, or the numbers of the labels that they name."""
    labels = getattr(pipeline, "labels", None)
    if not isinstance(labels, dict):
        return {"prompt": list(prompts)}
    if unknown := [prompt for prompt in prompts if prompt not in labels]:
        raise ModelError(
            f"{type(pipeline).__name__} has no label {unknown[0]!r}: expected one of {len(labels)}, such as "
            f"{', '.join(map(repr, list(labels)[:3]))}"
        )
    return {"class_labels": [labels[prompt] for prompt in prompts]}


def any_prompts(pipeline: Any, count: int) -> dict[str, list[Any]]:
    """For a call whose result does not depend on its prompts."""
    labels = getattr(pipeline, "labels", None)
    return prompt_arguments(pipeline, [next(iter(labels)) if isinstance(labels, dict) else ""] * count)


def short_call(pipeline: Any, options: CallOptions, at_least: int = 2) -> CallOptions:
    """The call with as few steps as the pipeline's scheduler takes, `at_least` or more: PNDM's start takes four."""
    for num_steps in range(at_least, at_least + 8):
        with contextlib.suppress(Exception):
            copy.deepcopy(pipeline.scheduler).set_timesteps(num_steps)
            return dataclasses.replace(options, num_inference_steps=num_steps)
    return dataclasses.replace(options, num_inference_steps=at_least)  # one that is given more than a number of steps


class _Prepared(Exception):
    """Raised at the first model call of a pipeline whose scheduler is to be prepared and nothing else."""


def prepare_scheduler(pipeline: Any, options: CallOptions, scheduler: Any, num_inference_steps: int) -> None:
    """Have the pipeline itself call `scheduler.set_timesteps`, with its own sigmas and shift; no model evaluation."""
    transformer = transformer_of(pipeline, type(pipeline).__name__)

    def stop(*_: Any) -> None:
        raise _Prepared

    handle = transformer.register_forward_pre_hook(stop)
    original, pipeline.scheduler = pipeline.scheduler, scheduler
    call = dataclasses.replace(options, num_inference_steps=num_inference_steps).arguments(1.0, 1)
    try:
        with contextlib.suppress(_Prepared), torch.no_grad():
            pipeline(**any_prompts(pipeline, 1), generator=[torch.Generator().manual_seed(0)], **call)
    finally:
        handle.remove()
        pipeline.scheduler = original
