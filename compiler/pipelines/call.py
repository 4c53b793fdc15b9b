"""How a pipeline is called: its own keyword arguments, resolved from the options and its signature; its scheduler
prepared.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
from dataclasses import dataclass
from typing import Any

import torch

from otcache.schemas.errors import ModelError, UsageError

from ..models.model import transformer_of
from .invoke import invoke, stopping_at_the_model
from .own_size import AXES, own_size
from .prompts import any_prompts

ABOVE_ONE = 1 + 1e-8
"""A guidance scale that pipelines take for guidance, and that float32 takes for 1.

At 1 they run the positive branch alone. Here they run both, and the result is the positive one's: so samples at 1 are
recorded beside those at other scales.
"""


@dataclass(frozen=True, kw_only=True)
class CallOptions:
    """How the pipeline is called: its own keyword arguments, resolved from the options and its signature."""

    height: int
    width: int
    num_frames: int | None
    """None for a pipeline of pictures."""
    num_inference_steps: int
    max_sequence_length: int | None
    negative_prompt: str | None
    """None leaves it out, which may be what no text gives: zeros, in SDXL."""
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
            if "negative_prompt" in self.accepted and self.negative_prompt is not None:
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
    negative_prompt: str | None = None,
) -> CallOptions:
    """Fill in what the user left out with the pipeline's own: its size, its text length and its negative prompt.

    Args:
        pipeline: a diffusers pipeline.
        num_inference_steps: of the full sampler.
        height, width: pixels.
        num_frames: of a video.
        max_sequence_length: tokens of a prompt.
        negative_prompt: None for what the pipeline takes when it is given none. One whose guidance has an argument of
            its own, `true_cfg_scale`, guides only where there is a negative prompt: the empty text.

    Raises:
        UsageError: frames of a pipeline that draws pictures.
        ModelError: the pipeline refuses the call, or does not say its size.
    """
    parameters = inspect.signature(type(pipeline).__call__).parameters
    defaults = {key: parameter.default for key, parameter in parameters.items() if isinstance(parameter.default, int)}
    check_frames(pipeline, num_frames)
    guidance = _guidance_argument(pipeline, parameters)
    if guidance == "true_cfg_scale" and negative_prompt is None:
        negative_prompt = ""
    options = CallOptions(
        height=height or defaults.get("height", 0),
        width=width or defaults.get("width", 0),
        num_frames=num_frames or defaults.get("num_frames"),
        num_inference_steps=num_inference_steps,
        max_sequence_length=max_sequence_length or defaults.get("max_sequence_length"),
        negative_prompt=negative_prompt,
        guidance_argument=guidance,
        scale_offset=scale_offset(pipeline),
        accepted=frozenset(parameters),
    )
    return _with_own_size(pipeline, options)


def check_frames(pipeline: Any, num_frames: int | None) -> None:
    """Raise UsageError for frames of a pipeline, with or without weights, that draws pictures."""
    if num_frames is not None and "num_frames" not in inspect.signature(type(pipeline).__call__).parameters:
        raise UsageError(f"--num-frames is {num_frames}, but {type(pipeline).__name__} draws pictures: leave it out")


def _guidance_argument(pipeline: Any, parameters: Any) -> str | None:
    embedded = getattr(transformer_of(pipeline, type(pipeline).__name__).config, "guidance_embeds", False)
    if "true_cfg_scale" in parameters and not embedded:
        return "true_cfg_scale"
    return "guidance_scale" if "guidance_scale" in parameters else None


def _with_own_size(pipeline: Any, options: CallOptions) -> CallOptions:
    """The options with the pipeline's own size in place of what neither the user nor the call's signature says."""
    missing = [name for name in ("height", "width") if not getattr(options, name)]
    if "num_frames" in options.accepted and options.num_frames is None:
        missing.append("num_frames")
    if not missing:
        return options
    call = {name: value for name, value in options.arguments(1.0, 1).items() if name not in missing}
    told = own_size(pipeline, {**any_prompts(pipeline, 1), "generator": [torch.Generator().manual_seed(0)], **call})
    sizes: dict[str, Any] = {name: told[name] for name in missing if name in told}
    if unknown := [name for name in missing if name not in sizes and name in AXES[:2]]:
        raise ModelError(
            f"{type(pipeline).__name__} does not say its own {' and '.join(unknown)}: give --height and --width"
        )
    changed: dict[str, Any] = {**sizes}
    return dataclasses.replace(options, **changed)


def scale_offset(pipeline: Any) -> float:
    """−1 for a pipeline that guides at scale 1 already, where others run one branch; `probe` proves what it guides
    with.
    """
    at_one = copy.copy(pipeline)
    at_one._guidance_scale = 1.0
    return -1.0 if getattr(at_one, "do_classifier_free_guidance", False) else 0.0


def short_call(pipeline: Any, options: CallOptions, at_least: int = 2) -> CallOptions:
    """The call with as few steps as the pipeline's scheduler takes, `at_least` or more: PNDM's start takes four."""
    for num_steps in range(at_least, at_least + 8):
        with contextlib.suppress(Exception):
            copy.deepcopy(pipeline.scheduler).set_timesteps(num_steps)
            return dataclasses.replace(options, num_inference_steps=num_steps)
    return dataclasses.replace(options, num_inference_steps=at_least)  # one that is given more than a number of steps


def prepare_scheduler(pipeline: Any, options: CallOptions, scheduler: Any, num_inference_steps: int) -> None:
    """Have the pipeline itself call `scheduler.set_timesteps`, with its own sigmas and shift; no model evaluation."""
    original, pipeline.scheduler = pipeline.scheduler, scheduler
    call = dataclasses.replace(options, num_inference_steps=num_inference_steps).arguments(1.0, 1)
    try:
        with stopping_at_the_model(pipeline):
            invoke(pipeline, {**any_prompts(pipeline, 1), "generator": [torch.Generator().manual_seed(0)], **call})
    finally:
        pipeline.scheduler = original
