"""How a pipeline calls its transformer, found from two short probe runs, with no knowledge of the model's class.

Which argument carries the latents, which the time, which are conditioning and which are constants, and how the outputs
of several branches become one. With that the transformer can be called at any point (`denoiser`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from otcache.schemas.errors import ModelError

from .arguments import PLAIN, Adjusted, Behind, Listed, Offset, Output, PerSample
from .call import CallOptions, short_call
from .guidance import find_guidance
from .interface import Interface, Text
from .listed_arguments import as_tensors, extra_axis, lists_of
from .noise_layout import find_layout, proportional
from .prompts import probe_prompts
from .record import Tape, record_noise, record_run

PROBE_SAMPLES = 3
"""Samples of a probe run: a number that no other axis of a model is likely to have."""


def probe(pipeline: Any, options: CallOptions, guidance_scale: float, prompts: Sequence[str]) -> Interface:
    """Tell the arguments of a pipeline's transformer apart by two short runs on different prompts and seeds.

    Args:
        pipeline: a diffusers pipeline, wherever it runs.
        options: how it is called.
        guidance_scale: above 1, if guidance is to be seen.
        prompts: some to run on; others are added where there are fewer than the runs take.

    Raises:
        ModelError: the pipeline does something that cannot be compiled.
    """
    name = type(pipeline).__name__
    first, second, listed, noise_shape = _record_probes(pipeline, options, guidance_scale, prompts)
    call, sample = first.calls[0][0], first.samples[0]
    latents_input, stacked, behind = _find_latents(first, second, name)
    timestep_input, scale, offset = _find_timestep(first, name)
    conditioning, constants, text = _find_conditioning(
        first, second, (latents_input, timestep_input), listed, PROBE_SAMPLES * (2 if stacked else 1), options, name
    )
    if offset:
        constants[timestep_input] = Offset(offset)
    if behind:
        constants[latents_input] = Behind(behind)
    outputs = list(first.call_outputs[0][0].float().chunk(2)) if stacked else [o.float() for o in first.call_outputs[0]]
    exact = first.call_outputs[0][0].dtype == torch.float32
    output = _find_output(outputs, first.guided[0])
    guided, positive_first, keep_norm, sign = find_guidance(
        [output(each) for each in outputs], first.guided[0], guidance_scale, name, exact=exact
    )
    split, permutation = find_layout(noise_shape, sample, name, call[latents_input].dtype)
    return Interface(
        latents_input=latents_input,
        timestep_input=timestep_input,
        timestep_scale=scale,
        conditioning=tuple(conditioning),
        constants=constants,
        text=text,
        output=dataclasses.replace(output, scale=sign),
        guided=guided,
        stacked=stacked,
        positive_first=positive_first,
        keep_norm=keep_norm,
        noise_shape=noise_shape,
        noise_split=split,
        noise_permutation=permutation,
        latents_shape=tuple(sample.shape[1:]),
        dtype=call[latents_input].dtype,
        step_options=first.step_options,
    )


def _record_probes(
    pipeline: Any, options: CallOptions, guidance_scale: float, prompts: Sequence[str]
) -> tuple[Tape, Tape, dict[str, Listed], tuple[int, ...]]:
    """Two short runs, arguments that are lists (tensors on the tapes), and the shape of one sample's noise."""
    name = type(pipeline).__name__
    if getattr(pipeline, "transformer_2", None) is not None:
        raise ModelError(
            f"{name} has two transformers that take turns (transformer, transformer_2): expected one, because an "
            "artifact has one trunk; compile a pipeline with a single expert"
        )
    prompts = probe_prompts(pipeline, prompts, 2 * PROBE_SAMPLES)
    short = short_call(pipeline, options, at_least=3)
    with record_noise() as drawn:
        first, second = (
            record_run(pipeline, short, guidance_scale, own, range(seed, seed + PROBE_SAMPLES), keep_steps=1)
            for own, seed in ((prompts[:PROBE_SAMPLES], 0), (prompts[PROBE_SAMPLES:], 100))
        )
    count = len(first.calls[0])
    if count not in (1, 2):
        raise ModelError(f"{name} calls its transformer {count} times a step: one or two (guidance) can be compiled")
    listed = lists_of(first.calls[0][0], first.samples[0])
    for tape in (first, second):
        tape.calls = [[as_tensors(call, listed) for call in calls] for calls in tape.calls]
    return first, second, listed, drawn[0][1:]


def _find_conditioning(
    first: Tape,
    second: Tape,
    varying: tuple[str, ...],
    listed: Mapping[str, Listed],
    rows: int,
    options: CallOptions,
    name: str,
) -> tuple[list[str], dict[str, Any], Text | None]:
    """The arguments that are not `varying` as conditioning and constants, and the text that is padded among them.

    Args:
        first, second: the two runs.
        varying: names of the latents and the time.
        listed: arguments that list one tensor a sample.
        rows: batch of a call.
        options: how the pipeline is called.
        name: its class.
    """
    conditioning, constants = _sort_arguments(first, second, varying, rows, name)
    calls, padded = [*first.calls[0], *second.calls[0]], [key for key, how in listed.items() if how.mask]
    text = _find_text(calls, conditioning, constants, padded, options.max_sequence_length, name)
    if text and text.mask not in conditioning:
        conditioning.append(text.mask)
        constants.pop(text.mask, None)
    return conditioning, {**constants, **listed}, text


def interface_at(
    pipeline: Any, options: CallOptions, interface: Interface, guidance_scale: float, prompts: Sequence[str]
) -> Interface:
    """The interface at another size of the request: other constants, latents and noise, everything else the same."""
    short, repeated = short_call(pipeline, options), (list(prompts) * PROBE_SAMPLES)[:PROBE_SAMPLES]
    with record_noise() as drawn:
        tape = record_run(pipeline, short, guidance_scale, repeated, range(PROBE_SAMPLES), keep_steps=1)
    sample, call = tape.samples[0], tape.calls[0][0]

    def constant(name: str, value: Any) -> Any:
        if isinstance(value, Adjusted):
            return value
        return PerSample(call[name][:1]) if isinstance(value, PerSample) else call[name]

    split, permutation = find_layout(drawn[0][1:], sample, type(pipeline).__name__, interface.dtype)
    text = interface.text
    if text is not None and options.max_sequence_length is not None:
        text = dataclasses.replace(text, length=options.max_sequence_length)
    return dataclasses.replace(
        interface,
        constants={name: constant(name, value) for name, value in interface.constants.items()},
        text=text,
        noise_shape=drawn[0][1:],
        noise_split=split,
        noise_permutation=permutation,
        latents_shape=tuple(sample.shape[1:]),
    )


def _find_latents(tape: Tape, other: Tape, name: str) -> tuple[str, bool, tuple[float, ...]]:
    """The argument that is proportional to the scheduler's sample, whether it holds both branches, and constant
    channels behind.
    """
    sample = tape.samples[0]
    count, channels = sample.shape[:2]
    for key, value in tape.calls[0][0].items():
        if not isinstance(value, Tensor) or value.shape[2:] != sample.shape[2:] or value.ndim != sample.ndim:
            continue
        if value.shape[0] in (count, 2 * count) and value.shape[1] >= channels:
            behind = value[:1, channels:].flatten(2)[..., 0].flatten()
            calls = [call[0][key][:, channels:] for each in (tape, other) for call in each.calls[:2]]
            like = behind.view(1, -1, *[1] * (sample.ndim - 2))
            constant = all(torch.equal(rest, like.expand_as(rest)) for rest in calls)
            half = value.is_floating_point() and value.dtype.itemsize < 4
            if constant and proportional(value[:count, :channels].float(), sample, 1e-2 if half else 1e-3):
                return key, value.shape[0] == 2 * count, tuple(behind.tolist())
    shapes = {key: tuple(value.shape) for key, value in tape.calls[0][0].items() if isinstance(value, Tensor)}
    raise ModelError(
        f"{name} does not hand the scheduler's latents {tuple(sample.shape)} to its transformer as they are "
        f"({shapes}): not supported"
    )


def _sort_arguments(
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
            if not same(value, first.calls[1][0][key]):
                raise ModelError(f"{name} changes {key} from step to step: only latents and time may change")
            if "mask" not in key and all(same(value[:1].expand_as(value), call[key]) for call in calls):
                constants[key] = PerSample(value[:1])
            else:
                conditioning.append(key)
        elif "mask" not in key and not same(value, other := second.calls[0][0][key]):
            if isinstance(value, Tensor) and value.shape != other.shape:
                raise ModelError(
                    f"{name} passes {key} as long as the longest prompt of a call, {tuple(value.shape)} and "
                    f"{tuple(other.shape)}, for all samples alike: not supported, because a prompt's result would "
                    "depend on those beside it"
                )
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
    padded: Sequence[str],
    length: int | None,
    name: str,
) -> Text | None:
    """The tensors that are as long as the longest prompt of a call, and the mask that hides what is padded.

    padded: those of `conditioning` that were lists, of any lengths.
    """
    if len(padded) > 1:
        raise ModelError(
            f"{name} passes {' and '.join(padded)} as lists of text: expected one, which one mask can hide"
        )
    values = {key: [call[key] for call in calls if call[key] is not None] for key in conditioning}
    ragged = [
        key
        for key in conditioning
        if "mask" not in key and (key in padded or len({value.shape[1:] for value in values[key]}) > 1)
    ]
    masks = [key for key in (*conditioning, *constants) if "mask" in key]
    optional = [key for key in masks if any(call[key] is None for call in calls)]
    if not ragged and not (optional and any(key in conditioning for key in optional)):
        return None
    if not masks:
        raise ModelError(
            f"{name} makes {ragged[0]} as long as the longest prompt of a call and passes no mask: not supported, "
            "because prompts could not be padded to one length"
        )
    if length is None:
        raise ModelError(f"{name} makes {ragged[0]} as long as the longest prompt: give --max-sequence-length")
    return Text(
        names=tuple(ragged or [key for key in conditioning if values[key][0].ndim == 3]), mask=masks[0], length=length
    )


def _find_timestep(tape: Tape, name: str) -> tuple[str, float, float]:
    """The argument that follows the scheduler's time, with scale and offset: argument = scale · time + offset."""
    times = tape.timesteps[:2]
    for key, value in tape.calls[0][0].items():
        later = tape.calls[1][0][key]
        if not isinstance(value, Tensor) or value.ndim > 1 or same(value, later):
            continue
        found = [float(call[0][key].float().flatten()[0]) for call in tape.calls[:2]]
        if value.is_floating_point() and value.dtype.itemsize < 4:
            scale, offset = _fit_rounded_line(times, found)
            misses = [abs(scale * time + offset - seen) for time, seen in zip(times, found, strict=True)]
            if max(misses) <= 1e-2 * max(map(abs, found)):
                return key, scale, offset
            continue
        scale = (found[1] - found[0]) / (times[1] - times[0])
        offset = found[0] - scale * times[0]
        if abs(offset) <= 1e-4 * max(map(abs, found)):
            largest = max((0, 1), key=lambda index: abs(times[index]))
            return key, float(f"{found[largest] / times[largest]:.6g}"), 0.0
        if abs(offset - round(offset)) <= 1e-4 * max(1.0, abs(offset)):
            return key, float(f"{scale:.4g}"), float(round(offset))
    raise ModelError(f"{name} passes no argument that follows the scheduler's timestep: not supported")


def _fit_rounded_line(times: Sequence[float], found: Sequence[float]) -> tuple[float, float]:
    """Scale and offset of a line through values that were rounded to half precision: round numbers that explain them.

    >>> _fit_rounded_line([1000.0, 857.0], [1.0, 0.8554])
    (0.001, 0.0)
    >>> _fit_rounded_line([1000.0, 500.0], [0.0, 0.5])
    (-0.001, 1.0)
    """
    lines = [(sign * scale, offset) for sign in (1.0, -1.0) for scale in (1.0, 1e-3) for offset in (0.0, 1.0)]

    def miss(line: tuple[float, float]) -> float:
        return max(abs(line[0] * time + line[1] - seen) for time, seen in zip(times, found, strict=True))

    return min(lines, key=miss)


def _find_output(outputs: list[Tensor], guided: Tensor) -> Output:
    """Fewer channels than the model makes are its first ones; an axis of size one may be left out."""
    shape = outputs[0].shape
    if outputs[0].ndim == guided.ndim + 1 and (axis := extra_axis(shape[1:], guided.shape[1:])) is not None:
        return Output(axis=1 + axis)
    if shape[2:] == guided.shape[2:] and shape[1] > guided.shape[1]:
        return Output(channels=guided.shape[1])
    return PLAIN


def same(value: Any, other: Any) -> bool:
    if isinstance(value, Tensor):
        return isinstance(other, Tensor) and value.shape == other.shape and torch.equal(value, other)
    if isinstance(value, (list, tuple)):
        return type(value) is type(other) and len(value) == len(other) and all(map(same, value, other))
    return bool(value == other)
