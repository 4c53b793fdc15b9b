"""Pass `capture`: pipeline + prompts → Interface, Trajectory and Denoiser.

The pipeline itself runs; the calls to its transformer and its scheduler are recorded. From two short probe runs follows
how the pipeline calls the transformer (`Interface`): which argument carries the latents, which the time, which are
conditioning, which are constants, and how the outputs of several branches become one. With that the transformer can be
called at any point (`Denoiser`), with no knowledge of the model's class.

Shapes: T steps, n samples, latents (n, …) as the scheduler sees them. Latents and outputs are float32.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from otcache.schemas.errors import ModelError

PROBE_SAMPLES = 3
"""Samples of a probe run: a number that no other axis of a model is likely to have."""
Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class CallOptions:
    """How the pipeline is called: its own keyword arguments, resolved from the options and its signature."""

    height: int
    width: int
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
    max_sequence_length: int | None = None,
    negative_prompt: str = "",
) -> CallOptions:
    """Fill in what the user left out: the size that the autoencoder was trained at, the tokenizer's own length."""
    parameters = inspect.signature(type(pipeline).__call__).parameters
    vae = getattr(pipeline, "vae", None)
    side = getattr(getattr(vae, "config", None), "sample_size", None)
    side = (
        side
        if isinstance(side, int)
        else getattr(pipeline, "default_sample_size", 64) * getattr(pipeline, "vae_scale_factor", 8)
    )
    if max_sequence_length is None and "max_sequence_length" in parameters:
        default = parameters["max_sequence_length"].default
        lengths = [t.model_max_length for t in pipeline.components.values() if hasattr(t, "model_max_length")]
        max_sequence_length = min([default, *lengths[-1:]]) if isinstance(default, int) else None
    embedded = (
        getattr(pipeline.transformer.config, "guidance_embeds", False) if hasattr(pipeline, "transformer") else False
    )
    guidance = None
    if "true_cfg_scale" in parameters and not embedded:
        guidance = "true_cfg_scale"
    elif "guidance_scale" in parameters:
        guidance = "guidance_scale"
    return CallOptions(
        height=height or side, width=width or side, num_inference_steps=num_inference_steps,
        max_sequence_length=max_sequence_length, negative_prompt=negative_prompt, guidance_argument=guidance,
        accepted=frozenset(parameters),
    )  # fmt: skip


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
    transformer = getattr(pipeline, "transformer", None) or pipeline.unet
    signature = inspect.signature(transformer.forward)
    scheduler = pipeline.scheduler
    original_step = scheduler.step

    def after_forward(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if len(tape.guided) < keep_calls:
            tape.calls[-1].append(dict(signature.bind(*args, **kwargs).arguments))
            tape.call_outputs[-1].append(output[0] if isinstance(output, tuple) else output.sample)

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


@dataclass(frozen=True, kw_only=True)
class Interface:
    """How a pipeline calls its transformer."""

    latents_input: str
    timestep_input: str
    timestep_scale: float
    conditioning: tuple[str, ...]
    """Tensor arguments that belong to a request, with the samples along their first axis."""
    constants: dict[str, Any]
    """Arguments that are the same for every prompt, step and seed."""
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
    from dataclasses import replace

    prompts = list(prompts)[: 2 * PROBE_SAMPLES]
    prompts += [f"probe {i}" for i in range(2 * PROBE_SAMPLES - len(prompts))]
    short = replace(options, num_inference_steps=3)
    with _recorded_noise() as drawn:
        first = _run(pipeline, short, guidance_scale, prompts[:PROBE_SAMPLES], range(PROBE_SAMPLES))
        second = _run(pipeline, short, guidance_scale, prompts[PROBE_SAMPLES:], range(100, 100 + PROBE_SAMPLES))
    name = type(pipeline).__name__
    calls = first.calls[0]
    if len(calls) not in (1, 2):
        raise ModelError(
            f"{name} calls its transformer {len(calls)} times a step: one or two (guidance) can be compiled"
        )
    sample = first.samples[0]
    stacked = False
    latents_input = None
    for key, value in calls[0].items():
        if isinstance(value, Tensor) and value.shape[1:] == sample.shape[1:] and value.numel() % sample.numel() == 0:
            ratio = value.shape[0] // sample.shape[0]
            if ratio in (1, 2) and _proportional(value[: sample.shape[0]].float(), sample):
                latents_input, stacked = key, ratio == 2
                break
    if latents_input is None:
        raise ModelError(f"{name} does not hand the scheduler's latents to its transformer as they are: not supported")
    timestep_input, scale = _find_timestep(first, name)
    rows = PROBE_SAMPLES * (2 if stacked else 1)
    conditioning, constants = [], {}
    for key, value in calls[0].items():
        if key in (latents_input, timestep_input):
            continue
        if isinstance(value, Tensor) and value.ndim and value.shape[0] == rows:
            conditioning.append(key)
            if not _same(value, first.calls[1][0][key]):
                raise ModelError(f"{name} changes {key} from step to step: only latents and time may change")
        elif not _same(value, second.calls[0][0][key]):
            raise ModelError(
                f"{name} passes {key} with {type(value).__name__} that depends on the prompt: not supported"
            )
        else:
            constants[key] = value
    outputs = list(first.call_outputs[0][0].float().chunk(2)) if stacked else [o.float() for o in first.call_outputs[0]]
    guided, positive_first, keep_norm = _find_guidance(
        outputs, first.guided[0], guidance_scale, name, exact=first.call_outputs[0][0].dtype == torch.float32
    )
    split, permutation = _find_layout(drawn[0][1:], tuple(sample.shape[1:]), first, drawn)
    return Interface(
        latents_input=latents_input, timestep_input=timestep_input, timestep_scale=scale, conditioning=tuple(conditioning),
        constants=constants, guided=guided, stacked=stacked, positive_first=positive_first,
        keep_norm=keep_norm, noise_shape=drawn[0][1:],
        noise_split=split, noise_permutation=permutation, latents_shape=tuple(sample.shape[1:]),
    )  # fmt: skip


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
        output = self.transformer(**inputs, **self.interface.constants)
        self.evaluations[0] += latents.shape[0]
        return self.guide(output[0] if isinstance(output, tuple) else output.sample)


def denoiser_of(transformer: Any, interface: Interface, trajectory: Trajectory) -> Denoiser:
    """The denoiser for a trajectory's samples."""
    return Denoiser(
        transformer=transformer, interface=interface, conditioning=trajectory.conditioning, guidance=trajectory.guidance
    )


def calibration_scales(minimum: float, maximum: float, count: int) -> list[float]:
    """Guidance scales of `count` samples: one value, or three that cover the range in turn."""
    if minimum == maximum:
        return [minimum] * count
    levels = [minimum, (minimum + maximum) / 2, maximum]
    return [levels[i % 3] for i in range(count)]


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
        pipeline(list(prompts), generator=generators, **options.arguments(guidance_scale, len(prompts)))
    return tape


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
    parts = list(tape.calls[0][0][name].chunk(2)) if interface.stacked else [call[name] for call in tape.calls[0]]
    if interface.guided and interface.positive_first:
        parts.reverse()
    return torch.stack(parts)


def _proportional(value: Tensor, sample: Tensor) -> bool:
    scale = (value * sample).sum() / sample.square().sum()
    return bool((value - scale * sample).abs().max() <= 1e-3 * value.abs().max())


def _same(value: Any, other: Any) -> bool:
    if isinstance(value, Tensor):
        return isinstance(other, Tensor) and value.shape == other.shape and torch.equal(value, other)
    return bool(value == other)


def _find_timestep(tape: Tape, name: str) -> tuple[str, float]:
    """The argument that follows the scheduler's time, and its ratio to it."""
    for key, value in tape.calls[0][0].items():
        later = tape.calls[1][0][key]
        if not isinstance(value, Tensor) or value.ndim > 1 or _same(value, later):
            continue
        ratios = [
            float(call[key].float().flatten()[0]) / time
            for call, time in ((tape.calls[0][0], tape.timesteps[0]), (tape.calls[1][0], tape.timesteps[1]))
        ]
        if abs(ratios[0] - ratios[1]) <= 1e-4 * abs(ratios[0]):
            return key, float(f"{ratios[0]:.6g}")
    raise ModelError(f"{name} passes no argument that is proportional to the scheduler's timestep: not supported")


def _with_norm_of(positive: Tensor, combined: Tensor) -> Tensor:
    """`combined` with vectors along the last axis as long as those of `positive`."""
    return combined * (positive.norm(dim=-1, keepdim=True) / combined.norm(dim=-1, keepdim=True).clamp(min=1e-30))


def _find_guidance(
    outputs: list[Tensor], guided: Tensor, scale: float, name: str, *, exact: bool
) -> tuple[bool, bool, bool]:
    """Whether two branches are guidance, whether the positive one comes first, and whether its norm is kept.

    exact: the pipeline computed in float32.
    """
    if len(outputs) == 1:
        if not torch.allclose(outputs[0], guided, rtol=1e-4, atol=1e-5):
            raise ModelError(f"{name} changes the transformer's output before the scheduler's step: not supported")
        return False, False, False
    found: dict[tuple[bool, bool], float] = {}
    for positive_first, (positive, negative) in ((True, outputs), (False, outputs[::-1])):
        combined = negative + scale * (positive - negative)
        for keep_norm, expected in ((False, combined), (True, _with_norm_of(positive, combined))):
            found[positive_first, keep_norm] = float((expected - guided).norm() / guided.norm())
    positive_first, keep_norm = min(found, key=lambda way: found[way])
    if found[positive_first, keep_norm] < (1e-3 if exact else 3e-2):
        return True, positive_first, keep_norm
    basis = torch.stack([output.flatten() for output in outputs], dim=1).double()
    weights = torch.linalg.lstsq(basis, guided.flatten().double()[:, None]).solution.flatten()
    listed = ", ".join(f"{weight:.3f}" for weight in weights)
    raise ModelError(f"{name} combines its branches with weights {listed}: expected {scale} and {1 - scale}")


def _find_layout(
    noise_shape: tuple[int, ...], latents_shape: tuple[int, ...], tape: Tape, drawn: list[tuple[int, ...]]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """How noise is packed into latents: as it is, or in 2 × 2 patches along the last two axes."""
    noise = torch.cat(
        [torch.randn(1, *noise_shape, generator=torch.Generator().manual_seed(seed)) for seed in range(PROBE_SAMPLES)]
    )
    candidates: list[tuple[tuple[int, ...], tuple[int, ...]]] = [(noise_shape, tuple(range(len(noise_shape))))]
    if len(noise_shape) >= 3:
        *lead, channels, height, width = noise_shape
        if height % 2 == 0 and width % 2 == 0:
            k = len(lead)
            split = (*lead, channels, height // 2, 2, width // 2, 2)
            candidates.append((split, (*range(k), k + 1, k + 3, k, k + 2, k + 4)))
            swapped = (*lead, channels, height // 2, 2, width // 2, 2)
            candidates.append((swapped, (*range(k), k + 1, k + 3, k + 2, k + 4, k)))
    for split, permutation in candidates:
        arranged = noise.view(-1, *split).permute(0, *[axis + 1 for axis in permutation])
        if arranged.numel() == tape.samples[0].numel() and _proportional(
            arranged.reshape(tape.samples[0].shape), tape.samples[0]
        ):
            return split, permutation
    raise ModelError(f"the pipeline arranges noise {noise_shape} as latents {latents_shape} in a way that is not known")


class _Prepared(Exception):
    """Raised at the first model call of a pipeline whose scheduler is to be prepared and nothing else."""


def prepare_scheduler(pipeline: Any, options: CallOptions, scheduler: Any, num_inference_steps: int) -> None:
    """Have the pipeline itself call `scheduler.set_timesteps`, with its own sigmas and shift; no model evaluation."""
    from dataclasses import replace

    transformer = getattr(pipeline, "transformer", None) or pipeline.unet

    def stop(*_: Any) -> None:
        raise _Prepared

    handle = transformer.register_forward_pre_hook(stop)
    original, pipeline.scheduler = pipeline.scheduler, scheduler
    arguments = replace(options, num_inference_steps=num_inference_steps).arguments(1.0, 1)
    try:
        with contextlib.suppress(_Prepared), torch.no_grad():
            pipeline([""], generator=[torch.Generator().manual_seed(0)], **arguments)
    finally:
        handle.remove()
        pipeline.scheduler = original
