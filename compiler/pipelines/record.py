"""What one run of a pipeline does: the calls to its transformer and its scheduler, recorded while the pipeline itself
runs.

Shapes: n samples, latents (n, …) as the scheduler sees them. Recorded latents and guided outputs are float32.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..models.model import transformer_of
from .arguments import PLAIN, flatten_values
from .call import CallOptions
from .invoke import Stop, invoke
from .prompts import prompt_arguments

Progress = Callable[[int, int], None]
OnStep = Callable[[int, float, Tensor, Tensor, Tensor], None]
"""Called after each step with its index and timestep, the latents before it, the guided output, and the latents after
it, (n, …) float32 each."""


@dataclass
class Tape:
    """What one run of a pipeline did: per step the transformer's calls, the scheduler's sample and model output.

    Everything that was recorded is on the CPU, wherever the pipeline runs.
    """

    calls: list[list[dict[str, Any]]] = field(default_factory=lambda: [[]])
    call_outputs: list[list[Tensor]] = field(default_factory=lambda: [[]])
    timesteps: list[float] = field(default_factory=list)
    samples: list[Tensor] = field(default_factory=list)
    guided: list[Tensor] = field(default_factory=list)
    final: list[Tensor] = field(default_factory=list)
    """The latents after the last step."""
    step_options: dict[str, float] = field(default_factory=dict)
    """Numbers that the pipeline passed to `scheduler.step` beside the tensors."""


@contextlib.contextmanager
def record(
    pipeline: Any,
    *,
    keep_calls: int = 2,
    keep_steps: int | None = None,
    progress: Progress | None = None,
    on_step: OnStep | None = None,
) -> Iterator[Tape]:
    """Record what a pipeline does while the context lasts.

    Args:
        pipeline: that is called in the context.
        keep_calls: steps, the first ones, whose calls of the transformer are kept.
        keep_steps: steps, the first ones, whose latents and outputs are kept; None for all.
        progress: told of every step.
        on_step: takes latents and outputs of every step in the place of the tape, which then keeps none.
    """
    tape = Tape()
    transformer = transformer_of(pipeline, type(pipeline).__name__)
    signature = inspect.signature(transformer.forward)
    scheduler = pipeline.scheduler
    original_step, latents = scheduler.step, _Latents()

    def after_forward(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if len(tape.timesteps) < keep_calls:
            call = flatten_values(_bound(signature, args, kwargs))
            tape.calls[-1].append({key: _kept(value) for key, value in call.items()})
            tape.call_outputs[-1].append(_kept(PLAIN(output)))

    @functools.wraps(original_step)  # pipelines look at its signature for what to pass, such as eta
    def step(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        exact, predicted = latents.before(sample), _in_float32(model_output)
        before, output = _kept(exact).float(), _kept(predicted).float()
        result, exact = latents.after(original_step(predicted, timestep, exact, *args, **kwargs), sample.dtype)
        after = _kept(exact).float()
        tape.step_options = {
            name: value for name, value in kwargs.items() if name != "return_dict" and isinstance(value, int | float)
        }
        if on_step:
            on_step(len(tape.timesteps), float(timestep), before, output, after)
        else:
            if keep_steps is None or len(tape.samples) < keep_steps:
                tape.samples.append(before)
                tape.guided.append(output)
            tape.final = [after]
        tape.timesteps.append(float(timestep))
        if len(tape.timesteps) < keep_calls:
            tape.calls.append([])
            tape.call_outputs.append([])
        if progress:
            progress(len(tape.timesteps), len(scheduler.timesteps))
        return result

    handle = transformer.register_forward_hook(after_forward, with_kwargs=True)
    scheduler.step = step
    try:
        yield tape
    finally:
        handle.remove()
        del scheduler.step


class _Latents:
    """Latents of a run, in float32 from step to step, also where a pipeline hands them round in half precision.

    What the model takes is rounded; what steps add up is not, so that a run of few long steps and one of many short
    ones differ by what they compute.
    """

    def __init__(self) -> None:
        self._known: Tensor | None = None

    def before(self, sample: Tensor) -> Tensor:
        """What a step starts from: unrounded, if the pipeline left as it was what the last step gave."""
        known = self._known
        if known is not None and known.shape == sample.shape and torch.equal(known.to(sample.dtype), sample):
            return known
        return _in_float32(sample)

    def after(self, result: Any, dtype: torch.dtype) -> tuple[Any, Tensor]:
        """A step's result as the pipeline expects it, and its latents unrounded."""
        listed = isinstance(result, tuple)
        exact: Tensor = result[0] if listed else result.prev_sample
        if dtype.itemsize >= torch.float32.itemsize:
            return result, exact
        self._known = exact
        if listed:
            return (exact.to(dtype), *result[1:]), exact
        result.prev_sample = exact.to(dtype)
        return result, exact


def _in_float32(value: Tensor) -> Tensor:
    """Half precision as float32; other tensors as they are."""
    return value.float() if value.is_floating_point() and value.dtype.itemsize < torch.float32.itemsize else value


def _kept(value: Any) -> Any:
    """A copy on the CPU of a tensor or a list of them: some pipelines change their latents in place afterwards."""
    if isinstance(value, list):
        return [_kept(each) for each in value]
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value


def _bound(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, those of a `**kwargs` parameter among them."""
    found = dict(signature.bind(*args, **kwargs).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            found |= found.pop(name, {})
    return found


def record_run(
    pipeline: Any,
    options: CallOptions,
    guidance_scale: float,
    prompts: Sequence[str],
    seeds: Sequence[int],
    progress: Progress | None = None,
    on_step: OnStep | None = None,
    keep_steps: int | None = None,
) -> Tape:
    """Run a pipeline with a prompt and a seed for each of n samples, and record what it does. See `record`."""
    count = len(prompts)

    def first_branch(step_index: int, timestep: float, *tensors: Tensor) -> None:
        assert on_step is not None
        on_step(step_index, timestep, *(value[:count] for value in tensors))

    take = None if on_step is None else first_branch
    with record(pipeline, progress=progress, on_step=take, keep_steps=keep_steps) as tape:
        _run(pipeline, options, guidance_scale, prompts, seeds)
    both = tape.samples and len(tape.samples[0]) == 2 * count  # branches, with the same latents, went to the scheduler
    if both:
        for steps in (tape.samples, tape.guided, tape.final):
            steps[:] = [step[:count] for step in steps]
    return tape


def record_first_step(
    pipeline: Any, options: CallOptions, guidance_scale: float, prompts: Sequence[str]
) -> list[dict[str, Any]]:
    """The arguments of a pipeline's calls to its transformer in its first step, where the run ends."""

    def stop(*_: Any, **__: Any) -> None:
        raise Stop

    with record(pipeline, keep_calls=1) as tape:
        pipeline.scheduler.step = stop
        with contextlib.suppress(Stop):
            _run(pipeline, options, guidance_scale, prompts, range(len(prompts)))
    return tape.calls[0]


def record_first_call(
    pipeline: Any, options: CallOptions, prompts: Sequence[str], guidance_scale: float = 1.0
) -> dict[str, Any]:
    """The arguments of a pipeline's first call to its transformer, by default without guidance; nothing is
    evaluated.
    """
    transformer = transformer_of(pipeline, type(pipeline).__name__)
    signature = inspect.signature(transformer.forward)
    calls: list[dict[str, Any]] = []

    def keep(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = flatten_values(_bound(signature, args, kwargs))
        calls.append({key: _kept(value) for key, value in call.items()})
        raise Stop

    handle = transformer.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        with contextlib.suppress(Stop):
            _run(pipeline, options, guidance_scale, prompts, range(len(prompts)))
    finally:
        handle.remove()
    return calls[0]


def _run(
    pipeline: Any, options: CallOptions, guidance_scale: float, prompts: Sequence[str], seeds: Sequence[int]
) -> None:
    generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
    with guider_at(pipeline, guidance_scale):
        arguments = options.arguments(guidance_scale, len(prompts))
        invoke(pipeline, {**prompt_arguments(pipeline, prompts), "generator": generators, **arguments})


@contextlib.contextmanager
def guider_at(pipeline: Any, scale: float) -> Iterator[None]:
    """While it lasts, a pipeline that keeps the guidance scale in a `guider` has this one; others are given it when
    they are called.
    """
    guider = getattr(pipeline, "guider", None)
    if guider is None:
        yield
        return
    before, guider.guidance_scale = guider.guidance_scale, scale
    try:
        yield
    finally:
        guider.guidance_scale = before


@contextlib.contextmanager
def record_noise() -> Iterator[list[tuple[int, ...]]]:
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
