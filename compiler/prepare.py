"""The passes up to the searches: options → `Prepared`: load, probe, capture, lower and cut. What all passes share is a `Session`."""

from __future__ import annotations

import contextlib
import importlib.metadata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from otcache.schemas.digest import digest_of_value
from otcache.schemas.errors import UsageError
from otcache.schemas.shapes import described

from . import metrics
from .attempts import NAME as ATTEMPT
from .attempts import Attempts
from .calibrate import Calibration
from .calling import CallOptions, call_options, prepare_scheduler
from .capture import Trajectory, capture
from .decode import decoded
from .denoiser import denoiser_of
from .encoders import Encoders, text_encoders
from .guidance import calibration_scales
from .interface import Interface, probe
from .lower import SolverTable, lower
from .models import Model, load_model, read_prompts
from .options import CompileOptions, split_prompts
from .progress import Pass, Reporter
from .prompt import latent_decoder
from .sizes import Seen, Sizes, own_point, programs_differ, see, stages_for
from .stages import Stages
from .wanted import Wanted, wanted
from .workspace import Workspace, default_workspace

EVALUATION_SEED = 1_000_000
"""Distance of the held-out seeds from those of calibration."""
GUIDANCE_MARGIN = 1.125
"""Of guided models every fourth calibration prompt is run at so many times the scale that is served.

Guided outputs are stiffer there, as those of a few prompts in a hundred are at the scale itself: what is fitted to both holds for
those as well (the changelog has the figures).
"""
DECODE_BATCH = 16
CAPTURE_CHUNK = 8
"""Full runs that are kept together: an interrupted capture redoes at most these."""


@dataclass(frozen=True, kw_only=True)
class Session:
    """What all passes of one compile share."""

    options: CompileOptions
    model: Model
    call: CallOptions
    interface: Interface
    workspace: Workspace
    reporter: Reporter
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

    @property
    def margin(self) -> float:
        """Of the calibration set's guidance scales."""
        return GUIDANCE_MARGIN if self.interface.guided else 1.0

    @torch.no_grad()
    def decode(self, latents: Tensor) -> np.ndarray:
        """Latents (n, …) → pictures float32 (n, [frames,] height, width, 3) in [0, 1]."""
        return torch.cat([self._decoded(part) for part in latents.split(DECODE_BATCH)]).numpy()

    def _decoded(self, latents: Tensor) -> Tensor:
        if self.decoder is None:
            return decoded(self.model.pipeline, self.call, latents)
        pictures: Tensor = self.decoder(latents.to(next(self.decoder.parameters()).dtype))
        return pictures.float()


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A model with its sampler lowered, its transformer cut and its calibration set run: what searches start from."""

    session: Session
    trajectory: Trajectory
    """Of the calibration set."""
    table: SolverTable
    stages: Stages
    sizes: Sizes
    """Those of the session's that the stages take."""
    calibration: Calibration
    prompts: list[str]
    held_out: list[str]

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(self.session.options.seed + i for i in range(len(self.prompts)))

    @property
    def held_out_seeds(self) -> tuple[int, ...]:
        return tuple(self.session.options.seed + EVALUATION_SEED + i for i in range(len(self.held_out)))

    def set_timesteps(self, scheduler: Any, steps: int) -> None:
        """Prepare a scheduler as the pipeline prepares its own."""
        prepare_scheduler(self.session.model.pipeline, self.session.call, scheduler, steps)


def begin(
    options: CompileOptions, reporter: Reporter, live: Model | None = None
) -> tuple[Session, list[str], list[str]]:
    """The passes that are never kept: load and probe. Returns the prompts of calibration and held-out ones as well."""
    own = read_prompts(options.prompts) if isinstance(options.prompts, Path) else options.prompts
    if options.objective == "lpips":
        metrics.lpips_metric()  # where it is missing, say so before anything is loaded
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    with reporter.on("load", options.model):
        model = live or load_model(
            options.model,
            revision=options.revision,
            trust_remote_code=options.trust_remote_code,
            lora=options.lora,
            scratch=options.workspace,
        )
    prompts, held_out = split_prompts(
        own or model.prompts or default_prompts(), options.calibration_prompts, options.evaluation_prompts
    )
    with reporter.on("probe", type(model.pipeline).__name__):
        return _session(options, model, prompts, reporter), prompts, held_out


def prepare(
    options: CompileOptions,
    reporter: Reporter,
    held: contextlib.ExitStack | None = None,
    live: Model | None = None,
    *,
    like: Prepared | None = None,
) -> Prepared:
    """The passes up to the searches: load, probe, capture, lower, cut.

    held: keeps other compiles out of the workspace until it is closed; without it they may work at the same time.
    like: the same model at the same size, prepared for other guidance or other prompts: it is not loaded and cut again.
    """
    session, prompts, held_out = begin(options, reporter, like.session.model if like else live)
    model = session.model
    lpips = metrics.lpips_metric() if options.objective == "lpips" else None
    if held:
        folder = session.workspace.folder
        held.enter_context(
            session.workspace.held(
                lambda: reporter.note(f"another compile of this model is at work in {folder}: waiting until it ends")
            )
        )
    trajectory = full_runs(session, "capture", prompts, options.seed, session.margin)
    with reporter.on("lower", type(model.pipeline.scheduler).__name__):
        prepare_scheduler(model.pipeline, session.call, model.pipeline.scheduler, options.num_inference_steps)
        table = lower(model.pipeline.scheduler)
    stages, sizes = (like.stages, like.sizes) if like else _cut(session, trajectory)
    session = replace(session, interface=replace(session.interface, tables=sizes.own_tables))
    attempts = Attempts(session.workspace, [session.key, session.margin, options.objective])
    calibration = Calibration(
        denoiser=denoiser_of(model.transformer, session.interface, trajectory), trajectory=trajectory, table=table,
        decode=session.decode, references=session.decode(trajectory.latents[-1]), objective=options.objective,
        stages=stages, lpips=lpips, attempts=attempts,
    )  # fmt: skip
    return Prepared(
        session=session, trajectory=trajectory, table=table, stages=stages, sizes=sizes, calibration=calibration,
        prompts=prompts, held_out=held_out,
    )  # fmt: skip


def _cut(session: Session, trajectory: Trajectory) -> tuple[Stages, Sizes]:
    """The stages, with as many of the wanted sizes as they take."""
    transformer, example = session.model.transformer, example_of(session, trajectory)
    session.model.give_back()  # what the full runs have read
    with session.reporter.on("cut", type(transformer).__name__):
        stages, sizes = stages_for(transformer, session.interface, example, session.wanted, session.seen)
    for axis, reason in sizes.fixed.items():
        session.reporter.note(f"{axis} stays as compiled: {reason}")
    return stages, sizes


def default_prompts() -> list[str]:
    """Prompts for models that bring none of their own."""
    return read_prompts(Path(__file__).parent / "prompts.txt")


def _session(options: CompileOptions, model: Model, prompts: Sequence[str], reporter: Reporter) -> Session:
    own = model.call
    call = call_options(
        model.pipeline, num_inference_steps=options.num_inference_steps, height=options.height or own.height,
        width=options.width or own.width, num_frames=options.num_frames or own.num_frames,
        max_sequence_length=options.max_sequence_length or own.max_sequence_length,
        negative_prompt=own.negative_prompt if options.negative_prompt is None else options.negative_prompt,
    )  # fmt: skip
    others = wanted(
        own_point(call), sizes=options.sizes, frame_counts=options.frame_counts, text_lengths=options.text_lengths
    )
    encoders = text_encoders(model.pipeline, call.max_sequence_length or 0)
    interface = probe(model.pipeline, call, options.nominal_scale, prompts)
    if interface.guided and call.scale_offset:
        reporter.note(
            f"{type(model.pipeline).__name__} counts guidance from another number: scale {options.nominal_scale:g} is its "
            f"{call.guidance_argument} {options.nominal_scale + call.scale_offset:g}"
        )
    latents = torch.randn(2, *interface.latents_shape, generator=torch.Generator().manual_seed(0))
    pictures = decoded(model.pipeline, call, latents)
    name = type(model.pipeline).__name__
    expected = (*(() if call.num_frames is None else (call.num_frames,)), call.height, call.width, 3)
    if tuple(pictures.shape[1:]) != expected:
        raise UsageError(
            f"{name} draws {tuple(pictures.shape[1:])} where {expected} was asked for (frames, height, width, colours): "
            "give a --height, --width and --num-frames that it accepts as they are"
        )
    decoder = latent_decoder(model.pipeline, latents, pictures, call.height, call.width)
    if encoders is None:
        reporter.note(
            f"{name} has no export of its text encoders: the artifact takes what `otc encode` makes of prompts"
        )
    if decoder is None:
        reporter.note(f"{name} has no export of its decoder: the artifact makes latents")
    if not interface.guided and options.guidance_scale[0] != options.guidance_scale[1]:
        raise UsageError(
            f"--guidance-scale is a range, but {type(model.pipeline).__name__} runs one branch here: expected one number"
        )
    key = {
        "config": model.config_digest, "weights": model.weights_digest, "versions": versions(), "prompts": list(prompts),
        "steps": call.num_inference_steps, "size": [call.height, call.width, call.num_frames], "length": call.max_sequence_length,
        "negative": call.negative_prompt, "guidance": list(options.guidance_scale), "seed": options.seed,
    }  # fmt: skip
    workspace = Workspace(
        (options.workspace or default_workspace()) / digest_of_value(key)[7:23],
        on_reuse=lambda name: None if name in (ATTEMPT, "capture", "evaluate") else reporter.reused(name),
    )
    points = others.probed(own_point(call)) if others.axes else ()
    seen = tuple(see(model.pipeline, interface, call, options.nominal_scale, prompts, point) for point in points)
    if not others.listed and (odd := [each for each in seen if programs_differ(each.table, seen[0].table)]):
        raise UsageError(
            f"sizes are a range, but the sampler of {name} is another at {described(odd[0].point)}: expected a list, so that each "
            "size gets programs of its own"
        )
    return Session(
        options=options, model=model, call=call, interface=interface, workspace=workspace, reporter=reporter, key=key,
        decoder=decoder, decoder_example={"latents": latents}, encoders=encoders, wanted=others, seen=seen,
    )  # fmt: skip


def versions() -> dict[str, str]:
    """Versions of everything that has a say in the result, and torch's threads.

    A matrix product of a few rows is summed in another order where two threads share it: of `shapes` with three prompts outputs differ
    by 1e-6 between one thread and two.
    """
    names = ("otcache", "torch", "diffusers", "transformers", "numpy", "onnx", "onnxscript", "optuna", "POT")
    return {**{name: importlib.metadata.version(name) for name in names}, "torch threads": str(torch.get_num_threads())}


def capture_key(session: Session, prompts: Sequence[str], seed: int, scales: Sequence[float]) -> Any:
    """What a chunk of full runs depends on, for the workspace."""
    return [session.key, list(prompts), seed, list(scales)]


def capture_chunks(count: int) -> list[slice]:
    """How full runs are cut into chunks that are kept one by one."""
    return [slice(start, min(start + CAPTURE_CHUNK, count)) for start in range(0, count, CAPTURE_CHUNK)]


def full_runs(session: Session, name: str, prompts: Sequence[str], seed: int, margin: float = 1.0) -> Trajectory:
    """Full runs of `prompts` at consecutive seeds, from the workspace where they were made before."""
    scales = calibration_scales(*session.options.guidance_scale, len(prompts), margin)
    steps = session.call.num_inference_steps

    def chunk(rows: slice, advance: Pass) -> dict[str, np.ndarray]:
        own, seeds = prompts[rows], [seed + i for i in range(rows.start, rows.stop)]

        def progress(done: int, total: int) -> None:
            advance(steps * rows.start + steps * len(own) * done // total, steps * len(prompts))

        def compute() -> dict[str, np.ndarray]:
            advance.facts["evaluations"] += steps * len(own)
            model = session.model
            found = capture(
                model.pipeline, session.interface, session.call, own, seeds, scales[rows], progress=progress
            )
            arrays = {f"conditioning.{key}": _array(value) for key, value in found.conditioning.items()}
            return arrays | {
                "latents": found.latents.numpy(), "outputs": found.outputs.numpy(),
                "timesteps": np.asarray(found.timesteps),
            }  # fmt: skip

        return session.workspace.arrays(name, capture_key(session, own, seeds[0], scales[rows]), compute)

    with session.reporter.on(name, f"{len(prompts)} full runs") as advance:
        advance.facts["evaluations"] = 0
        parts = [chunk(rows, advance) for rows in capture_chunks(len(prompts))]
        names = [key for key in parts[0] if key != "timesteps"]
        if len({tuple(part[key].shape[2:] for key in names) for part in parts}) > 1:
            # A pipeline that pads prompts to the longest one of a call: they have to be in one call.
            parts = [chunk(slice(0, len(prompts)), advance)]
        advance.facts["evaluations_reused"] = steps * len(prompts) - min(
            advance.facts["evaluations"], steps * len(prompts)
        )
    arrays = {key: np.concatenate([part[key] for part in parts], axis=1) for key in names}
    arrays["timesteps"] = parts[0]["timesteps"]
    dtype = next(session.model.transformer.parameters()).dtype
    kept = {name: torch.from_numpy(arrays[f"conditioning.{name}"]) for name in session.interface.conditioning}
    conditioning = {name: value.to(dtype) if value.is_floating_point() else value for name, value in kept.items()}
    return Trajectory(
        latents=torch.from_numpy(arrays["latents"]), outputs=torch.from_numpy(arrays["outputs"]), conditioning=conditioning,
        guidance=torch.tensor(scales), timesteps=tuple(arrays["timesteps"].tolist()),
    )  # fmt: skip


def _array(value: Tensor) -> np.ndarray:
    """For the workspace, which has no bfloat16."""
    array: np.ndarray = (value.float() if value.is_floating_point() else value).numpy()
    return array


def example_of(session: Session, trajectory: Trajectory) -> dict[str, Tensor]:
    """Transformer inputs with a batch of 2 · branches (4 for guided models), taken from the calibration set."""
    part = trajectory.rows(slice(2))
    denoiser = denoiser_of(session.model.transformer, session.interface, part)
    middle = len(trajectory.timesteps) // 2
    return denoiser.inputs(part.latents[middle], trajectory.timesteps[middle], 1.0)


def nominal_calibration(prepared: Prepared) -> Calibration:
    """The calibration set without the margin, for methods that are compared with ours: each is fitted to what is served."""
    session, attempts = prepared.session, Attempts()
    trajectory = full_runs(session, "capture", prepared.prompts, session.options.seed)
    return replace(
        prepared.calibration, denoiser=denoiser_of(session.model.transformer, session.interface, trajectory),
        trajectory=trajectory, references=session.decode(trajectory.latents[-1]), fitted={}, attempts=attempts,
    )  # fmt: skip
