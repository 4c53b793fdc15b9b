"""Pass `capture`: pipeline + prompts → Interface, Trajectory and Denoiser.

The pipeline itself runs; the calls to its transformer and its scheduler are recorded. From two short probe runs follows
how the pipeline calls the transformer (`Interface`): which argument carries the latents, which the time, which are
conditioning, which are constants, and how the outputs of several branches become one. With that the transformer can be
called at any point (`Denoiser`), with no knowledge of the model's class.

Shapes: T steps, n samples, latents (n, …) as the scheduler sees them. Latents and outputs are float32.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from otcache.schemas.errors import ModelError, UsageError

from .models import transformer_of
from .wiring import PLAIN, Offset, Output, PerSample, arguments, flattened

PROBE_SAMPLES = 3
"""Samples of a probe run: a number that no other axis of a model is likely to have."""
Progress = Callable[[int, int], None]


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
    accepted: frozenset[str]
    """Names of the pipeline's call arguments."""

    def arguments(self, guidance_scale: float, count: int) -> dict[str, Any]:
        """Keyword arguments for a call with `count` prompts that returns latents."""
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
            arguments[self.guidance_argument] = guidance_scale
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
        height=height or defaults.get("height", side), width=width or defaults.get("width", side),
        num_frames=num_frames or defaults.get("num_frames"), num_inference_steps=num_inference_steps,
        max_sequence_length=max_sequence_length, negative_prompt=negative_prompt, guidance_argument=guidance,
        accepted=frozenset(parameters),
    )  # fmt: skip


def _default_side(pipeline: Any) -> int:
    """Pixels that the autoencoder was trained at, or that the pipeline names."""
    side = getattr(getattr(getattr(pipeline, "vae", None), "config", None), "sample_size", None)
    if isinstance(side, int):
        return side
    default = getattr(pipeline, "default_sample_size", 64)
    return int(default if isinstance(default, int) else 64) * int(getattr(pipeline, "vae_scale_factor", 8))


@dataclass
class Tape:
    """What one run of a pipeline did: per step the transformer's calls, the scheduler's sample and model output."""

    calls: list[list[dict[str, Any]]] = field(default_factory=lambda: [[]])
    call_outputs: list[list[Tensor]] = field(default_factory=lambda: [[]])
    timesteps: list[float] = field(default_factory=list)
    samples: list[Tensor] = field(default_factory=list)
    guided: list[Tensor] = field(default_factory=list)
    final: list[Tensor] = field(default_factory=list)
    """The latents after the last step."""
    noise_shapes: list[tuple[int, ...]] = field(default_factory=list)


@contextlib.contextmanager
def record(pipeline: Any, *, keep_calls: int = 2, progress: Progress | None = None) -> Iterator[Tape]:
    """Record what a pipeline does while the context lasts. The calls of the first `keep_calls` steps are kept."""
    tape = Tape()
    transformer = transformer_of(pipeline, type(pipeline).__name__)
    signature = inspect.signature(transformer.forward)
    scheduler = pipeline.scheduler
    original_step = scheduler.step

    def after_forward(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if len(tape.guided) < keep_calls:
            call = flattened(_bound(signature, args, kwargs))
            tape.calls[-1].append({key: _kept(value) for key, value in call.items()})
            tape.call_outputs[-1].append(PLAIN(output))

    def step(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        result = original_step(model_output, timestep, sample, *args, **kwargs)
        tape.timesteps.append(float(timestep))
        tape.samples.append(sample.detach().float().clone())
        tape.guided.append(model_output.detach().float().clone())
        tape.final = [(result[0] if isinstance(result, tuple) else result.prev_sample).detach().float().clone()]
        tape.calls.append([])
        tape.call_outputs.append([])
        if progress:
            progress(len(tape.guided), len(scheduler.timesteps))
        return result

    handle = transformer.register_forward_hook(after_forward, with_kwargs=True)
    scheduler.step = step
    try:
        yield tape
    finally:
        handle.remove()
        del scheduler.step


def _kept(value: Any) -> Any:
    """A tensor as it is now: some pipelines change their latents in place afterwards."""
    return value.detach().clone() if isinstance(value, Tensor) else value


def _bound(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, those of a `**kwargs` parameter among them."""
    found = dict(signature.bind(*args, **kwargs).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            found |= found.pop(name, {})
    return found


@dataclass(frozen=True, kw_only=True)
class Text:
    """Tensors whose second axis is as long as the longest prompt of a call: padded to `length`, which a mask hides."""

    names: tuple[str, ...]
    mask: str
    length: int

    def padded(self, call: dict[str, Any], name: str) -> Tensor:
        """One argument of a recorded call; a mask that the pipeline left out is made of ones."""
        value = call[name]
        if value is None:
            value = torch.ones(call[self.names[0]].shape[:2], dtype=torch.int64)
        if name not in (*self.names, self.mask):
            return value
        return nn.functional.pad(value, (*[0, 0] * (value.ndim - 2), 0, self.length - value.shape[1]))


@dataclass(frozen=True, kw_only=True)
class Interface:
    """How a pipeline calls its transformer."""

    latents_input: str
    timestep_input: str
    timestep_scale: float
    conditioning: tuple[str, ...]
    """Tensor arguments that belong to a request, with the samples along their first axis."""
    constants: dict[str, Any]
    """Arguments that are the same for every prompt, step and seed, as `wiring` takes them."""
    text: Text | None = None
    """Of a pipeline that pads prompts to the longest one of a call."""
    output: Output = PLAIN
    guided: bool
    """Two branches, negative and positive, combined as (1 − s) · negative + s · positive."""
    keep_norm: bool = False
    """The combination is then multiplied so that its vectors along the last axis are as long as the positive's."""
    stacked: bool
    """The branches come in one call along the batch axis, rather than in two calls."""
    positive_first: bool
    noise_shape: tuple[int, ...]
    """One sample's noise, as the pipeline draws it."""
    noise_split: tuple[int, ...]
    noise_permutation: tuple[int, ...]
    latents_shape: tuple[int, ...]

    @property
    def branches(self) -> int:
        return 2 if self.guided else 1

    @property
    def guidance_kind(self) -> Literal["none", "cfg", "cfg_norm"]:
        """As the manifest names it."""
        if not self.guided:
            return "none"
        return "cfg_norm" if self.keep_norm else "cfg"


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """A full run: latents X (T+1, n, …), guided outputs V (T, n, …), conditioning and guidance of its n samples."""

    latents: Tensor
    outputs: Tensor
    conditioning: dict[str, Tensor]
    """Each (branches, n, …), branches in the order negative, positive."""
    guidance: Tensor
    """Scale of each sample, float32 (n,)."""
    timesteps: tuple[float, ...]

    @property
    def count(self) -> int:
        return self.latents.shape[1]

    def rows(self, rows: slice) -> Trajectory:
        """The same for some of the samples."""
        return Trajectory(
            latents=self.latents[:, rows], outputs=self.outputs[:, rows], timesteps=self.timesteps,
            conditioning={name: value[:, rows] for name, value in self.conditioning.items()},
            guidance=self.guidance[rows],
        )  # fmt: skip


def probe(pipeline: Any, options: CallOptions, guidance_scale: float, prompts: Sequence[str]) -> Interface:
    """Two short runs on different prompts and seeds tell arguments apart. Raises ModelError for what cannot be compiled."""
    name = type(pipeline).__name__
    if getattr(pipeline, "transformer_2", None) is not None:
        raise ModelError(
            f"{name} has two transformers that take turns (transformer, transformer_2): expected one, because an artifact has "
            "one trunk; compile a pipeline with a single expert"
        )
    prompts = list(dict.fromkeys(prompts))[: 2 * PROBE_SAMPLES]
    prompts += [f"probe {i}" for i in range(2 * PROBE_SAMPLES - len(prompts))]
    short = dataclasses.replace(options, num_inference_steps=3)
    with _recorded_noise() as drawn:
        first = _run(pipeline, short, guidance_scale, prompts[:PROBE_SAMPLES], range(PROBE_SAMPLES))
        second = _run(pipeline, short, guidance_scale, prompts[PROBE_SAMPLES:], range(100, 100 + PROBE_SAMPLES))
    calls = first.calls[0]
    if len(calls) not in (1, 2):
        raise ModelError(
            f"{name} calls its transformer {len(calls)} times a step: one or two (guidance) can be compiled"
        )
    sample = first.samples[0]
    latents_input, stacked = _find_latents(first, name)
    timestep_input, scale, offset = _find_timestep(first, name)
    rows = PROBE_SAMPLES * (2 if stacked else 1)
    conditioning, constants = _sorted_arguments(first, second, (latents_input, timestep_input), rows, name)
    text = _find_text([*first.calls[0], *second.calls[0]], conditioning, constants, options.max_sequence_length, name)
    if text and text.mask not in conditioning:
        conditioning.append(text.mask)
        constants.pop(text.mask, None)
    if offset:
        constants[timestep_input] = Offset(offset)
    outputs = list(first.call_outputs[0][0].float().chunk(2)) if stacked else [o.float() for o in first.call_outputs[0]]
    exact = first.call_outputs[0][0].dtype == torch.float32
    output = _find_output(outputs, first.guided[0])
    guided, positive_first, keep_norm, sign = _find_guidance(
        [output(each) for each in outputs], first.guided[0], guidance_scale, name, exact=exact
    )
    split, permutation = _find_layout(drawn[0][1:], sample, name)
    return Interface(
        latents_input=latents_input, timestep_input=timestep_input, timestep_scale=scale, conditioning=tuple(conditioning),
        constants=constants, text=text, output=dataclasses.replace(output, scale=sign), guided=guided, stacked=stacked,
        positive_first=positive_first, keep_norm=keep_norm, noise_shape=drawn[0][1:], noise_split=split,
        noise_permutation=permutation, latents_shape=tuple(sample.shape[1:]),
    )  # fmt: skip


def _find_latents(tape: Tape, name: str) -> tuple[str, bool]:
    """The argument that is proportional to the scheduler's sample, and whether it holds both branches."""
    sample = tape.samples[0]
    for key, value in tape.calls[0][0].items():
        if isinstance(value, Tensor) and value.shape[1:] == sample.shape[1:] and value.numel() % sample.numel() == 0:
            ratio = value.shape[0] // sample.shape[0]
            if ratio in (1, 2) and _proportional(value[: sample.shape[0]].float(), sample):
                return key, ratio == 2
    for key, value in tape.calls[0][0].items():
        if isinstance(value, list) and any(
            torch.is_tensor(each) and each.numel() == sample[0].numel() for each in value
        ):
            raise ModelError(
                f"{name} passes {key} as a list of one tensor a sample: expected one tensor for all, because a list fixes the "
                "batch that stages are made for"
            )
    shapes = {key: tuple(value.shape) for key, value in tape.calls[0][0].items() if isinstance(value, Tensor)}
    raise ModelError(
        f"{name} does not hand the scheduler's latents {tuple(sample.shape)} to its transformer as they are ({shapes}): "
        "not supported"
    )


def _sorted_arguments(
    first: Tape, second: Tape, varying: tuple[str, ...], rows: int, name: str
) -> tuple[list[str], dict[str, Any]]:
    """The arguments that are not `varying` as conditioning and constants. `rows`: batch of a call."""
    conditioning: list[str] = []
    constants: dict[str, Any] = {}
    calls = [*first.calls[0], *second.calls[0]]
    for key, value in first.calls[0][0].items():
        if key in varying:
            continue
        if isinstance(value, Tensor) and value.ndim and value.shape[0] == rows:
            if not _same(value, first.calls[1][0][key]):
                raise ModelError(f"{name} changes {key} from step to step: only latents and time may change")
            if "mask" not in key and all(_same(value[:1].expand_as(value), call[key]) for call in calls):
                constants[key] = PerSample(value[:1])
            else:
                conditioning.append(key)
        elif "mask" not in key and not _same(value, second.calls[0][0][key]):
            raise ModelError(
                f"{name} passes {key} with {type(value).__name__} that depends on the prompt: not supported"
            )
        else:
            constants[key] = value
    return conditioning, constants


def _find_text(
    calls: Sequence[dict[str, Any]],
    conditioning: Sequence[str],
    constants: dict[str, Any],
    length: int | None,
    name: str,
) -> Text | None:
    """The tensors that are as long as the longest prompt of a call, and the mask that hides what is padded."""
    values = {key: [call[key] for call in calls if call[key] is not None] for key in conditioning}
    ragged = [key for key in conditioning if len({value.shape[1:] for value in values[key]}) > 1 and "mask" not in key]
    masks = [key for key in (*conditioning, *constants) if "mask" in key]
    optional = [key for key in masks if any(call[key] is None for call in calls)]
    if not ragged and not (optional and any(key in conditioning for key in optional)):
        return None
    if not masks:
        raise ModelError(
            f"{name} makes {ragged[0]} as long as the longest prompt of a call and passes no mask: not supported, because "
            "prompts could not be padded to one length"
        )
    if length is None:
        raise ModelError(f"{name} makes {ragged[0]} as long as the longest prompt: give --max-sequence-length")
    return Text(
        names=tuple(ragged or [key for key in conditioning if values[key][0].ndim == 3]), mask=masks[0], length=length
    )


def capture(
    pipeline: Any,
    interface: Interface,
    options: CallOptions,
    prompts: Sequence[str],
    seeds: Sequence[int],
    guidance_scales: Sequence[float],
    *,
    progress: Progress | None = None,
) -> Trajectory:
    """One full run of the pipeline per prompt. Samples of equal guidance run as one batch."""
    parts: list[tuple[list[int], Tape]] = []
    groups = sorted(set(guidance_scales))
    for position, scale in enumerate(groups):
        rows = [i for i, value in enumerate(guidance_scales) if value == scale]

        def report(done: int, total: int, position: int = position) -> None:
            if progress:
                progress(position * total + done, len(groups) * total)

        tape = _run(pipeline, options, scale, [prompts[i] for i in rows], [seeds[i] for i in rows], progress=report)
        parts.append((rows, tape))
    order = torch.tensor([row for rows, _ in parts for row in rows]).argsort()
    latents = torch.cat([torch.stack([*tape.samples, *tape.final]) for _, tape in parts], dim=1)[:, order]
    outputs = torch.cat([torch.stack(tape.guided) for _, tape in parts], dim=1)[:, order]
    conditioning = {
        name: torch.cat([_branches(interface, tape, name) for _, tape in parts], dim=1)[:, order]
        for name in interface.conditioning
    }
    if not (torch.isfinite(latents).all() and torch.isfinite(outputs).all()):
        raise ModelError(
            f"{type(pipeline).__name__}: a full run of {options.num_inference_steps} steps gave values that are not finite: "
            "check that the pipeline itself draws pictures with these options"
        )
    scales = torch.tensor([float(value) for value in guidance_scales])
    return Trajectory(
        latents=latents,
        outputs=outputs,
        conditioning=conditioning,
        guidance=scales,
        timesteps=tuple(parts[0][1].timesteps),
    )


def conditioning_of(
    pipeline: Any, interface: Interface, options: CallOptions, guidance_scale: float, prompts: Sequence[str]
) -> dict[str, Tensor]:
    """What the pipeline makes of prompts: each tensor (branches, n, …), branches in the order negative, positive."""
    short = dataclasses.replace(options, num_inference_steps=2)
    tape = _run(pipeline, short, guidance_scale, prompts, range(len(prompts)))
    return {name: _branches(interface, tape, name) for name in interface.conditioning}


@dataclass(frozen=True, kw_only=True)
class Denoiser:
    """The guided model output at any latents and time, for the samples of one trajectory. Counts its evaluations."""

    transformer: Any
    interface: Interface
    conditioning: dict[str, Tensor]
    guidance: Tensor
    evaluations: list[int] = field(default_factory=lambda: [0])
    """Sample evaluations so far (a guided one counts once), in a list so that it can grow."""

    def inputs(self, latents: Tensor, timestep: float, input_scale: float) -> dict[str, Tensor]:
        """Tensor arguments with the branches along the batch axis: (branches · n, …)."""
        interface, count = self.interface, latents.shape[0]
        dtype = next(self.transformer.parameters()).dtype
        rows = interface.branches * count
        scaled = (latents * input_scale).to(dtype)
        return {
            interface.latents_input: scaled.repeat(interface.branches, *[1] * (latents.ndim - 1)),
            interface.timestep_input: torch.full((rows,), timestep * interface.timestep_scale, dtype=dtype),
            **{name: value.flatten(0, 1) for name, value in self.conditioning.items()},
        }

    def guide(self, output: Tensor) -> Tensor:
        """(branches · n, …) → (n, …), float32."""
        output = output.float()
        if not self.interface.guided:
            return output
        negative, positive = output.chunk(2)
        scale = self.guidance.view(-1, *[1] * (output.ndim - 1))
        combined = negative + scale * (positive - negative)
        return _with_norm_of(positive, combined) if self.interface.keep_norm else combined

    @torch.no_grad()
    def __call__(self, latents: Tensor, timestep: float, input_scale: float = 1.0) -> Tensor:
        inputs = self.inputs(latents, timestep, input_scale)
        output = self.transformer(**arguments(inputs, self.interface.constants))
        self.evaluations[0] += latents.shape[0]
        return self.guide(self.interface.output(output))


def denoiser_of(transformer: Any, interface: Interface, trajectory: Trajectory) -> Denoiser:
    """The denoiser for a trajectory's samples."""
    return Denoiser(
        transformer=transformer, interface=interface, conditioning=trajectory.conditioning, guidance=trajectory.guidance
    )


def calibration_scales(minimum: float, maximum: float, count: int, margin: float = 1.0) -> list[float]:
    """Guidance scales of `count` samples: one value, or three that cover the range in turn; every fourth one times `margin`."""
    levels = [minimum] if minimum == maximum else [minimum, (minimum + maximum) / 2, maximum]
    return [levels[i % len(levels)] * (margin if i % 4 == 3 else 1.0) for i in range(count)]


def _run(
    pipeline: Any,
    options: CallOptions,
    guidance_scale: float,
    prompts: Sequence[str],
    seeds: Sequence[int],
    progress: Progress | None = None,
) -> Tape:
    generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
    with record(pipeline, progress=progress) as tape, torch.no_grad():
        arguments = options.arguments(guidance_scale, len(prompts))
        pipeline(**_prompts(pipeline, prompts), generator=generators, **arguments)
    if len(tape.samples[0]) == 2 * len(prompts):  # both branches, with the same latents, went to the scheduler
        for steps in (tape.samples, tape.guided, tape.final):
            steps[:] = [step[: len(prompts)] for step in steps]
    return tape


def _prompts(pipeline: Any, prompts: Sequence[str]) -> dict[str, list[Any]]:
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


def _any_prompts(pipeline: Any, count: int) -> dict[str, list[Any]]:
    """For a call whose result does not depend on its prompts."""
    labels = getattr(pipeline, "labels", None)
    return _prompts(pipeline, [next(iter(labels)) if isinstance(labels, dict) else ""] * count)


def decoded(pipeline: Any, options: CallOptions, latents: Tensor) -> Tensor:
    """Final latents (n, …) → the pipeline's own pictures, float32 (n, [frames,] height, width, 3) in [0, 1].

    The pipeline runs one step, whose result is replaced by the latents: it decodes them in whatever way it has.
    """
    count, scheduler = len(latents), pipeline.scheduler

    def step(model_output: Tensor, timestep: Any, sample: Tensor, *_: Any, return_dict: bool = True, **__: Any) -> Any:
        final = latents.repeat(len(sample) // count, *[1] * (latents.ndim - 1)).to(sample.dtype)
        return SimpleNamespace(prev_sample=final) if return_dict else (final,)

    arguments = dataclasses.replace(options, num_inference_steps=1).arguments(1.0, count) | {"output_type": "np"}
    scheduler.step = step
    try:
        with torch.no_grad():
            made = pipeline(
                **_any_prompts(pipeline, count), generator=[torch.Generator() for _ in range(count)], **arguments
            )
    finally:
        del scheduler.step
    return torch.from_numpy(np.asarray(made[0], np.float32))


@contextlib.contextmanager
def _recorded_noise() -> Iterator[list[tuple[int, ...]]]:
    """Shapes (n, …) of the noise that pipelines draw through diffusers' `randn_tensor`."""
    import sys

    from diffusers.utils import torch_utils

    original, shapes = torch_utils.randn_tensor, []

    def randn_tensor(shape: Any, *args: Any, **kwargs: Any) -> Tensor:
        shapes.append(tuple(int(size) for size in shape))
        return original(shape, *args, **kwargs)

    holders = [
        m
        for n, m in list(sys.modules.items())
        if n.startswith("diffusers") and getattr(m, "__dict__", {}).get("randn_tensor") is original
    ]
    for module in holders:
        setattr(module, "randn_tensor", randn_tensor)  # noqa: B010
    try:
        yield shapes
    finally:
        for module in holders:
            setattr(module, "randn_tensor", original)  # noqa: B010


def _branches(interface: Interface, tape: Tape, name: str) -> Tensor:
    """One argument as (branches, n, …), in the order negative, positive."""
    values = [interface.text.padded(call, name) if interface.text else call[name] for call in tape.calls[0]]
    parts = list(values[0].chunk(2)) if interface.stacked else values
    if interface.guided and interface.positive_first:
        parts.reverse()
    return torch.stack(parts)


def _proportional(value: Tensor, sample: Tensor) -> bool:
    scale = (value * sample).sum() / sample.square().sum()
    return bool((value - scale * sample).abs().max() <= 1e-3 * value.abs().max())


def _same(value: Any, other: Any) -> bool:
    if isinstance(value, Tensor):
        return isinstance(other, Tensor) and value.shape == other.shape and torch.equal(value, other)
    if isinstance(value, (list, tuple)):
        return type(value) is type(other) and len(value) == len(other) and all(map(_same, value, other))
    return bool(value == other)


def _find_timestep(tape: Tape, name: str) -> tuple[str, float, float]:
    """The argument that follows the scheduler's time, with scale and offset: argument = scale · time + offset."""
    times = tape.timesteps[:2]
    for key, value in tape.calls[0][0].items():
        later = tape.calls[1][0][key]
        if not isinstance(value, Tensor) or value.ndim > 1 or _same(value, later):
            continue
        found = [float(call[0][key].float().flatten()[0]) for call in tape.calls[:2]]
        scale = (found[1] - found[0]) / (times[1] - times[0])
        offset = found[0] - scale * times[0]
        if abs(offset) <= 1e-4 * max(map(abs, found)):
            largest = max((0, 1), key=lambda index: abs(times[index]))
            return key, float(f"{found[largest] / times[largest]:.6g}"), 0.0
        if abs(offset - round(offset)) <= 1e-4 * max(1.0, abs(offset)):
            return key, float(f"{scale:.4g}"), float(round(offset))
    raise ModelError(f"{name} passes no argument that follows the scheduler's timestep: not supported")


def _with_norm_of(positive: Tensor, combined: Tensor) -> Tensor:
    """`combined` with vectors along the last axis as long as those of `positive`."""
    return combined * (positive.norm(dim=-1, keepdim=True) / combined.norm(dim=-1, keepdim=True).clamp(min=1e-30))


def _find_output(outputs: list[Tensor], guided: Tensor) -> Output:
    """Fewer channels than the model makes are its first ones."""
    shape = outputs[0].shape
    if shape[2:] == guided.shape[2:] and shape[1] > guided.shape[1]:
        return Output(channels=guided.shape[1])
    return PLAIN


def _find_guidance(
    outputs: list[Tensor], guided: Tensor, scale: float, name: str, *, exact: bool
) -> tuple[bool, bool, bool, float]:
    """Whether two branches are guidance, whether the positive one comes first, whether its norm is kept; and the sign.

    The sign is −1 for a pipeline that negates its model's output. exact: the pipeline computed in float32.
    """
    found: dict[tuple[bool, bool, bool, float], float] = {}
    guided_by_two = len(outputs) == 2
    for sign in (1.0, -1.0):
        if not guided_by_two:
            found[False, False, False, sign] = _distance(sign * outputs[0], guided)
            continue
        for positive_first, (positive, negative) in ((True, outputs), (False, outputs[::-1])):
            combined = negative + scale * (positive - negative)
            for keep_norm, expected in ((False, combined), (True, _with_norm_of(positive, combined))):
                found[True, positive_first, keep_norm, sign] = _distance(sign * expected, guided)
    best = min(found, key=lambda way: found[way])
    if found[best] < (1e-3 if exact else 3e-2):
        return best
    if not guided_by_two:
        raise ModelError(f"{name} changes the transformer's output before the scheduler's step: not supported")
    if outputs[0].shape != guided.shape:
        raise ModelError(
            f"{name} hands the scheduler {tuple(guided.shape)} of the model's {tuple(outputs[0].shape)}: not supported"
        )
    basis = torch.stack([output.flatten() for output in outputs], dim=1).double()
    weights = torch.linalg.lstsq(basis, guided.flatten().double()[:, None]).solution.flatten()
    listed = ", ".join(f"{weight:.3f}" for weight in weights)
    raise ModelError(f"{name} combines its branches with weights {listed}: expected {scale} and {1 - scale}")


def _distance(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖; infinite where shapes differ."""
    return float((found - expected).norm() / expected.norm()) if found.shape == expected.shape else math.inf


def _find_layout(noise_shape: tuple[int, ...], samples: Tensor, name: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """How noise is packed into latents: sizes that it is split into, and their order.

    A packing is a walk through the noise in nested loops. They are read off, the innermost first: the loop's stride is where
    the next value of the latents stands in the noise, its size is how far the walk goes on like that.
    """
    seeds = range(len(samples))
    noise = torch.cat([torch.randn(1, *noise_shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    flat, latents = noise.flatten(1).double(), samples.flatten(1).double()
    unknown = ModelError(
        f"{name} arranges noise {noise_shape} as latents {tuple(samples.shape[1:])} in a way that is not known"
    )
    if flat.shape != latents.shape:
        raise unknown
    latents = latents * (flat.norm() / latents.norm())
    loops: list[tuple[int, int]] = []  # (stride, size), innermost first
    done, count = 1, flat.shape[1]
    while done < count:
        stride = int((flat - latents[:, done : done + 1]).abs().sum(0).argmin())
        if not stride:
            raise unknown
        heads, walked = latents[:, ::done], flat[:, ::stride]
        both = min(heads.shape[1], walked.shape[1])
        agrees = (heads[:, :both] - walked[:, :both]).abs().amax(0) < 1e-3
        size = both if bool(agrees.all()) else int(agrees.int().argmin())
        if size < 2 or count % (done * size):
            raise unknown
        loops.append((stride, size))
        done *= size
    order = sorted(loops, reverse=True)
    split = tuple(size for _, size in order)
    permutation = tuple(order.index(loop) for loop in reversed(loops))
    arranged = (
        noise.view(-1, *split).permute(0, *[axis + 1 for axis in permutation]) if math.prod(split) == count else None
    )
    if arranged is None or not _proportional(arranged.reshape(samples.shape), samples):
        raise unknown
    return split, permutation


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
            pipeline(**_any_prompts(pipeline, 1), generator=[torch.Generator().manual_seed(0)], **call)
    finally:
        handle.remove()
        pipeline.scheduler = original
