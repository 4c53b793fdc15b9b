"""What all passes of one compile share: `Session`, and the passes that are never kept, load and probe."""

from __future__ import annotations

import importlib.metadata
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from otcache.schemas.digest import digest_of_value
from otcache.schemas.errors import ModelError, UsageError
from otcache.schemas.shapes import describe_size

from ..calibration import metrics
from ..calibration.lpips import check_size, weights_digest
from ..calibration.micro_batch import MicroBatch
from ..calibration.scoring import DECODED_BYTES
from ..export.decoder import make_latent_decoder
from ..export.exportable import unexportable
from ..export.prompt_steps import with_prompt_steps
from ..export.text_encoders import Encoders, make_text_encoders
from ..models.load import load_model
from ..models.model import Model, read_prompts
from ..options import CompileOptions, split_prompts
from ..pipelines.call import CallOptions, call_options, short_call
from ..pipelines.decode import decode_latents, decode_with_tiles
from ..pipelines.denoiser import denoiser_of, place_constants
from ..pipelines.full_run import capture, conditioning_of, with_known_negative
from ..pipelines.interface import Interface
from ..pipelines.out_of_memory import release
from ..pipelines.placement import (
    PeakBytes,
    Placement,
    check_placement,
    choose_micro_batch,
    device_from_name,
    free_bytes,
    place,
    placement_of,
)
from ..pipelines.probe import probe
from ..pipelines.prompts import class_prompts, split_labels
from ..sizes.requested import Wanted, wanted_from_options
from ..sizes.served import Seen, own_point, programs_differ, see
from ..workspace.code import code_digest
from ..workspace.ledger import NAME as ATTEMPT
from ..workspace.progress import Reporter
from ..workspace.workspace import Workspace, default_workspace
from .before_loading import check_before_loading
from .crew import Crew

EVALUATION_SEED = 1_000_000
"""Distance of the held-out seeds from those of calibration."""

GUIDANCE_MARGIN = 1.125
"""Of guided models every fourth calibration prompt is run at so many times the scale that is served.

Guided outputs are stiffer there, as those of a few prompts in a hundred are at the scale itself: what is fitted to both
holds for those as well (the changelog has the figures).
"""


@dataclass(frozen=True, kw_only=True)
class Session:
    """What all passes of one compile share."""

    options: CompileOptions
    model: Model
    call: CallOptions
    interface: Interface
    workspace: Workspace
    reporter: Reporter
    placement: Placement
    micro_batch: MicroBatch
    key: dict[str, Any]
    """Everything that calibration depends on, for the workspace."""
    decoder: torch.nn.Module | None
    """None for a pipeline that decodes in a way of its own: the artifact then makes latents."""
    decoder_example: dict[str, Tensor]
    encoders: Encoders | None
    """None for a pipeline whose class has no export of them: the artifact then takes conditioning."""
    wanted: Wanted
    """Sizes to serve beside the one that is compiled."""
    seen: tuple[Seen, ...]
    """What the pipeline passes at them, the own size first; empty where no others are wanted."""
    crew: Crew | None = None
    """Who makes full runs and holds samples, if not this process."""

    @property
    def margin(self) -> float:
        """Of the calibration set's guidance scales."""
        return GUIDANCE_MARGIN if self.interface.guided else 1.0

    @property
    def negative_zeros(self) -> bool:
        """Whether the runtime puts zeros in the place of what encoders would write of a negative prompt."""
        return self.encoders is not None and self.call.negative_prompt is None

    @torch.no_grad()
    def decode(self, latents: Tensor) -> np.ndarray:
        """Latents (n, …) → pictures float32 (n, [frames,] height, width, 3) in [0, 1]."""
        at_once = self.micro_batch.size if self.placement.device.type == "cpu" else 1
        vae, note = getattr(self.model.pipeline, "vae", None), self.reporter.note
        parts = [decode_with_tiles(vae, part, self._decode, note).cpu() for part in latents.split(at_once)]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).numpy()

    def _decode(self, latents: Tensor) -> Tensor:
        if self.decoder is None:
            return decode_latents(self.model.pipeline, self.call, latents)
        pictures: Tensor = self.decoder(latents)
        return pictures.float()

    @property
    def objective(self) -> str:
        """What the searches maximise, for the workspace: LPIPS with the digest of its weights."""
        return f"lpips, {weights_digest()}" if self.options.objective == "lpips" else self.options.objective

    @property
    def measures_lpips(self) -> bool:
        """On held-out prompts."""
        return asks_for_lpips(self.options)

    @property
    def producer(self) -> dict[str, str]:
        """What the manifest says of where the model was evaluated, for all that have a say in the last digits."""
        return {name: str(value) for name, value in self.key["placement"].items()}

    @property
    def evaluator_interface(self) -> Interface:
        """The interface with its constants on the device."""
        return place_constants(self.interface, self.placement.device)


def begin(
    options: CompileOptions, reporter: Reporter, live: Model | None = None
) -> tuple[Session, list[str], list[str]]:
    """The passes that are never kept: load and probe. Returns the prompts of calibration and held-out ones as well."""
    listed_prompts(options)  # where they cannot be read, say so before anything is loaded
    if asks_for_lpips(options):
        metrics.lpips_metric()  # where it is missing, say so before anything is loaded
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    wanted = None if live else placement_from_options(options)
    with reporter.on("load", options.model):
        if wanted is not None:
            check_before_loading(options, wanted, reporter)
        model = live or load_model(
            options.model,
            dtype=options.precision,
            revision=options.revision,
            variant=options.variant,
            trust_remote_code=options.trust_remote_code,
            lora=options.lora,
            scratch=options.workspace,
        )
        placement = wanted or placement_of(model.pipeline, model.transformer)
        _check_parts(options, model, placement)
        if wanted is not None:
            place(model.pipeline, wanted)
    prompts, held_out = split_of(options, model)
    with reporter.on("probe", type(model.pipeline).__name__):
        session = _session(options, model, placement, prompts, reporter)
    if session.measures_lpips:
        check_size(session.call.height, session.call.width)
    return session, prompts, held_out


def asks_for_lpips(options: CompileOptions) -> bool:
    """Whether LPIPS is measured on held-out prompts."""
    return options.objective == "lpips" or any("lpips" in target.metrics for target in options.wanted)


def placement_from_options(options: CompileOptions) -> Placement:
    """Where a model that is to be loaded goes. Raises UsageError, HostError for what this host does not have."""
    precision: torch.dtype = getattr(torch, options.precision)
    placement = Placement(device=device_from_name(options.device), precision=precision, offload=options.offload)
    check_placement(placement)
    return placement


def _check_parts(options: CompileOptions, model: Model, placement: Placement) -> None:
    """Raise UsageError, ModelError where the options ask for parts of a model that does not come apart."""
    if options.payload == "residual" and placement.offload != "none":
        raise UsageError(
            f"--payload residual runs the model in parts, and {type(model.transformer).__name__} is offloaded by hooks "
            "on the whole: give --payload output, or leave offloading out"
        )
    if (options.engines == "onnx" or options.payload == "residual") and (
        reason := unexportable(model.transformer)
    ) is not None:
        also = " and --payload output" if options.payload == "residual" else ""
        raise ModelError(reason + also)


def listed_prompts(options: CompileOptions) -> Sequence[str] | None:
    """Prompts that the user gives."""
    return read_prompts(options.prompts) if isinstance(options.prompts, Path) else options.prompts


def split_of(options: CompileOptions, model: Model) -> tuple[list[str], list[str]]:
    """Prompts of calibration and held-out ones: the user's, else the model's own, its classes, or the default ones."""
    classes = class_prompts(model.pipeline)
    listed = listed_prompts(options) or model.prompts or classes or default_prompts()
    split = split_prompts if classes is None else split_labels
    return split(listed, options.calibration_prompts, options.evaluation_prompts)


def default_prompts() -> list[str]:
    """Prompts for models that bring none of their own."""
    return read_prompts(Path(__file__).parent / "prompts.txt")


def _session(
    options: CompileOptions, model: Model, placement: Placement, prompts: Sequence[str], reporter: Reporter
) -> Session:
    """Probe the pipeline, and put together what the passes share."""
    call = _call(options, model)
    others = wanted_from_options(
        own_point(call), sizes=options.sizes, frame_counts=options.frame_counts, text_lengths=options.text_lengths
    )
    options, call, interface = _probe(options, model, call, prompts, reporter)
    exports = options.engines == "onnx" and placement.exportable
    encoders = _find_encoders(options, model.pipeline, interface, call, prompts, reporter) if exports else None
    decoder, latents = _find_decoder(model, call, interface, placement, reporter)
    if exports and decoder is None:
        reporter.note(f"{type(model.pipeline).__name__} has no export of its decoder: the artifact makes latents")
    micro_batch = _micro_batch(options, model, call, interface, placement, prompts, reporter)
    key = _calibration_key(options, model, call, placement, micro_batch, prompts)
    untold = (ATTEMPT, "capture", "evaluate", "peer-pictures")
    workspace = Workspace(
        (options.workspace or default_workspace()) / digest_of_value(key)[7:23],
        on_reuse=lambda name: None if name in untold else reporter.report_reuse(name),
    )
    return Session(
        options=options,
        model=model,
        call=call,
        interface=interface,
        workspace=workspace,
        reporter=reporter,
        placement=placement,
        micro_batch=micro_batch,
        key=key,
        decoder=decoder,
        decoder_example={"latents": latents},
        encoders=encoders,
        wanted=others,
        seen=_see_sizes(options, model, call, interface, others, prompts),
    )


def _call(options: CompileOptions, model: Model) -> CallOptions:
    """How the pipeline is called: by the options, else by the model's own call, else by its class."""
    own = model.call
    return call_options(
        model.pipeline,
        num_inference_steps=options.num_inference_steps,
        height=options.height or own.height,
        width=options.width or own.width,
        num_frames=options.num_frames or own.num_frames,
        max_sequence_length=options.max_sequence_length or own.max_sequence_length,
        negative_prompt=own.negative_prompt if options.negative_prompt is None else options.negative_prompt,
    )


def _probe(
    options: CompileOptions, model: Model, call: CallOptions, prompts: Sequence[str], reporter: Reporter
) -> tuple[CompileOptions, CallOptions, Interface]:
    """How the pipeline calls its transformer; the options with the range of guidance that it has, and the call.

    Raises UsageError for a range of scales of a pipeline that runs one branch.
    """
    name, (low, high) = type(model.pipeline).__name__, options.guidance_scale
    scale = options.nominal_scale if options.nominal_scale > 1 or low == high else high
    interface = probe(model.pipeline, call, scale, prompts)
    if not interface.guided and low != high:
        raise UsageError(f"--guidance-scale is a range, but {name} runs one branch here: expected one number")
    if interface.guided and low < 1 < high:
        options = replace(options, guidance_scale=(1.0, high))
        reporter.note(f"{name} guides above scale 1 only: the range is 1:{high:g}")
    call = with_known_negative(model.pipeline, interface, call, options.nominal_scale, prompts)
    if interface.guided and call.scale_offset:
        reporter.note(
            f"{name} counts guidance from another number: scale {options.nominal_scale:g} is its "
            f"{call.guidance_argument} {options.nominal_scale + call.scale_offset:g}"
        )
    return options, call, interface


def _find_decoder(
    model: Model, call: CallOptions, interface: Interface, placement: Placement, reporter: Reporter
) -> tuple[torch.nn.Module | None, Tensor]:
    """The pipeline's decoder as a module, None for one of its own way; and latents (2, …) float32 to trace it with.

    Raises UsageError for a size that the pipeline does not draw as it is.
    """
    latents = torch.randn(2, *interface.latents_shape, generator=torch.Generator().manual_seed(0))
    on_device, name = latents.to(placement.device), type(model.pipeline).__name__
    expected = (*(() if call.num_frames is None else (call.num_frames,)), call.height, call.width, 3)
    if placement.device.type != "cpu" or 2 * 4 * math.prod(expected) > DECODED_BYTES:
        on_device = on_device[:1]  # such pictures are decoded one by one
    vae, decode = getattr(model.pipeline, "vae", None), partial(decode_latents, model.pipeline, call)
    pictures = decode_with_tiles(vae, on_device, decode, reporter.note)
    if tuple(pictures.shape[1:]) != expected:
        raise UsageError(
            f"{name} draws {tuple(pictures.shape[1:])} where {expected} was asked for (frames, height, width, "
            "colours): give a --height, --width and --num-frames that it accepts as they are"
        )
    return make_latent_decoder(model.pipeline, on_device, pictures, call.height, call.width), latents


def _calibration_key(
    options: CompileOptions,
    model: Model,
    call: CallOptions,
    placement: Placement,
    micro_batch: MicroBatch,
    prompts: Sequence[str],
) -> dict[str, Any]:
    """Everything that a calibration depends on, as a JSON value."""
    return {
        "config": model.config_digest,
        "weights": model.weights_digest,
        "versions": versions(),
        "code": code_digest(),
        "prompts": list(prompts),
        "steps": call.num_inference_steps,
        "size": [call.height, call.width, call.num_frames],
        "length": call.max_sequence_length,
        "negative": call.negative_prompt,
        "guidance": list(options.guidance_scale),
        "seed": options.seed,
        "placement": {
            "device": placement.device.type,
            "precision": str(placement.precision).removeprefix("torch."),
            "micro batch": micro_batch.size,
        },
    }


def _see_sizes(
    options: CompileOptions,
    model: Model,
    call: CallOptions,
    interface: Interface,
    others: Wanted,
    prompts: Sequence[str],
) -> tuple[Seen, ...]:
    """What the pipeline passes at the wanted sizes. Raises UsageError for a range across which its sampler changes."""
    points = others.probed(own_point(call)) if others.axes else ()
    seen = tuple(see(model.pipeline, interface, call, options.nominal_scale, prompts, point) for point in points)
    if not others.listed and (odd := [each for each in seen if programs_differ(each.table, seen[0].table)]):
        raise UsageError(
            f"sizes are a range, but the sampler of {type(model.pipeline).__name__} is another at "
            f"{describe_size(odd[0].point)}: expected a list, so that each size gets programs of its own"
        )
    return seen


def _micro_batch(
    options: CompileOptions,
    model: Model,
    call: CallOptions,
    interface: Interface,
    placement: Placement,
    prompts: Sequence[str],
    reporter: Reporter,
) -> MicroBatch:
    """As many samples at once as the options say, or as the device has room for after one was evaluated."""
    if options.micro_batch:
        return MicroBatch(options.micro_batch, reporter.note)
    device, short = placement.device, short_call(model.pipeline, call)
    one = capture(model.pipeline, interface, short, prompts[:1], [0], [options.nominal_scale])
    denoiser = denoiser_of(model.transformer, place_constants(interface, device), one.to(device))
    with PeakBytes([*model.transformer.parameters(), *model.transformer.buffers()]) as counted:
        started = time.perf_counter()
        denoiser(one.latents[0].to(device), one.timesteps[0])
    reporter.timed(time.perf_counter() - started)
    release(device)  # what the probe has taken counts as free
    return MicroBatch(choose_micro_batch(counted.peak, free_bytes(device)), reporter.note)


def _find_encoders(
    options: CompileOptions,
    pipeline: Any,
    interface: Interface,
    call: CallOptions,
    prompts: Sequence[str],
    reporter: Reporter,
) -> Encoders | None:
    """The text encoders, if the runtime can make of every prompt what the pipeline makes of it; else a note
    says why.
    """
    reason = "has no export of its text encoders"
    try:
        encoders = make_text_encoders(pipeline, call.max_sequence_length or 0)
    except ModelError as error:
        encoders, reason = None, f"{reason} ({error})"
    served = with_prompt_steps(encoders, pipeline, interface, call, prompts) if encoders else None
    if encoders is not None and served is None:
        reason = "changes prompts before it tokenizes them in a way that the runtime does not know"
    elif served is not None and call.negative_prompt is None:
        given = conditioning_of(pipeline, interface, call, options.nominal_scale, prompts[:1])
        if any(given[name][0].any() for name in served.output_names if name in given):
            served, reason = None, "takes something without a negative prompt that neither a text gives nor is zeros"
    if served is None:
        reporter.note(f"{type(pipeline).__name__} {reason}: the artifact takes what `otc encode` makes of prompts")
    return served


def versions() -> dict[str, str]:
    """Versions of everything that has a say in the result, and torch's threads.

    A matrix product of a few rows is summed in another order where two threads share it: of `shapes` with three prompts
    outputs differ by 1e-6 between one thread and two.
    """
    names = ("otcache", "torch", "diffusers", "transformers", "numpy", "onnx", "onnxscript", "optuna", "POT")
    return {**{name: importlib.metadata.version(name) for name in names}, "torch threads": str(torch.get_num_threads())}
