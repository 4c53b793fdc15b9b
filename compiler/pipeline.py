"""The order of the passes: options → artifact. Each pass lives in a module of its name; what they pass on is frozen."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from otcache.schemas import manifest as schema
from otcache.schemas.digest import digest_of_value
from otcache.schemas.errors import UsageError
from otcache.schemas.manifest import FULL
from otcache.schemas.program import Program

from . import metrics
from .baselines import baseline_programs
from .calibrate import Calibration
from .capture import (
    CallOptions,
    Interface,
    Trajectory,
    calibration_scales,
    call_options,
    capture,
    denoiser_of,
    prepare_scheduler,
    probe,
)
from .cut import Stages, cut, run_stages
from .emit import check_target, emit
from .evaluate import Evaluation
from .export import TensorInfo, end_to_end_error, export_module, export_stages
from .lower import SolverTable, lower, program_from_table
from .models import Model, load_model, read_prompts
from .options import CompileOptions, split_prompts
from .progress import Reporter
from .prompt import TokenizerSpec, latent_decoder, text_encoders
from .report import ATTACHMENTS, write_report
from .search import Found, found_from_json, json_from_found, search
from .workspace import Workspace, default_workspace

EVALUATION_SEED = 1_000_000
"""Distance of the held-out seeds from those of calibration."""
SHOWN = 6
"""Held-out prompts whose pictures go into the report."""
DECODE_BATCH = 16


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
    decoder: torch.nn.Module
    decoder_example: dict[str, Tensor]
    encoders: tuple[Any, dict[str, Tensor], tuple[TokenizerSpec, ...]]
    """Text encoders with example inputs, and their tokenizers."""

    @torch.no_grad()
    def decode(self, latents: Tensor) -> np.ndarray:
        """Latents (n, …) → pictures float32 (n, height, width, 3) in [0, 1]."""
        dtype = next(self.decoder.parameters()).dtype
        return torch.cat([self.decoder(part.to(dtype)).float() for part in latents.split(DECODE_BATCH)]).numpy()


def compile_model(options: CompileOptions, reporter: Reporter | None = None) -> tuple[Path, schema.Manifest]:
    """Compile a model into an artifact. Returns its folder and manifest.

    Raises OTCacheError (UsageError, ModelError, ArtifactError, HostError) and then leaves no artifact behind; what was
    computed stays in the workspace, so that the same options go on where they stopped.
    """
    reporter = reporter or Reporter()
    target = options.output or Path("artifacts") / Path(options.model).name
    check_target(target, force=options.force)
    own = read_prompts(options.prompts) if options.prompts else None
    lpips = metrics.lpips_metric() if options.objective == "lpips" else None
    with reporter.on("load", options.model):
        model = load_model(options.model, revision=options.revision)
    prompts, held_out = split_prompts(
        own or model.prompts or default_prompts(), options.calibration_prompts, options.evaluation_prompts
    )
    with reporter.on("probe", type(model.pipeline).__name__):
        session = _session(options, model, prompts, reporter)
    trajectory = _captured(session, "capture", prompts, options.seed)
    with reporter.on("lower", type(model.pipeline.scheduler).__name__):
        prepare_scheduler(model.pipeline, session.call, model.pipeline.scheduler, options.num_inference_steps)
        table = lower(model.pipeline.scheduler)
    with reporter.on("cut", type(model.transformer).__name__):
        stages = cut(model.transformer, _example(session, trajectory), constants=session.interface.constants)
    calibration = Calibration(
        denoiser=denoiser_of(model.transformer, session.interface, trajectory), trajectory=trajectory, table=table,
        decode=session.decode, references=session.decode(trajectory.latents[-1]), objective=options.objective,
        stages=stages, lpips=lpips,
    )  # fmt: skip
    found = _searched(session, calibration)
    evaluated = _evaluated(session, found, table, stages, held_out)
    exported = _exported(session, stages, trajectory)
    fields = _manifest_fields(session, table, stages, found, evaluated, exported, prompts, held_out)

    def fill(folder: Path) -> None:
        for name in ("engines", "tokenizers"):
            shutil.copytree(exported.folder / name, folder / name)
        write_report(folder, fields, evaluated.pictures)

    with reporter.on("emit", str(target)):
        manifest = emit(target, fill, fields, force=options.force, attachments=ATTACHMENTS)
    return target, manifest


def default_prompts() -> list[str]:
    """Prompts for models that bring none of their own."""
    return read_prompts(Path(__file__).parent / "prompts.txt")


def _session(options: CompileOptions, model: Model, prompts: Sequence[str], reporter: Reporter) -> Session:
    call = call_options(
        model.pipeline, num_inference_steps=options.num_inference_steps, height=options.height, width=options.width,
        max_sequence_length=options.max_sequence_length, negative_prompt=options.negative_prompt,
    )  # fmt: skip
    decoder, decoder_example = latent_decoder(model.pipeline, call.height, call.width)
    encoders = text_encoders(model.pipeline, call.max_sequence_length or 0)
    interface = probe(model.pipeline, call, options.nominal_scale, prompts)
    if not interface.guided and options.guidance_scale[0] != options.guidance_scale[1]:
        raise UsageError(
            f"--guidance-scale is a range, but {type(model.pipeline).__name__} runs one branch here: expected one number"
        )
    key = {
        "config": model.config_digest, "weights": model.weights_digest, "versions": versions(), "prompts": list(prompts),
        "steps": call.num_inference_steps, "size": [call.height, call.width], "length": call.max_sequence_length,
        "negative": call.negative_prompt, "guidance": list(options.guidance_scale), "seed": options.seed,
    }  # fmt: skip
    workspace = Workspace((options.workspace or default_workspace()) / digest_of_value(key)[7:23])
    return Session(
        options=options, model=model, call=call, interface=interface, workspace=workspace, reporter=reporter, key=key,
        decoder=decoder, decoder_example=decoder_example, encoders=encoders,
    )  # fmt: skip


def versions() -> dict[str, str]:
    """Versions of everything that has a say in the result."""
    names = ("otcache", "torch", "diffusers", "transformers", "numpy", "onnx", "onnxscript", "optuna", "POT")
    return {name: importlib.metadata.version(name) for name in names}


def _captured(session: Session, name: str, prompts: Sequence[str], seed: int) -> Trajectory:
    """Full runs of `prompts` at consecutive seeds, from the workspace where they were made before."""
    scales = calibration_scales(*session.options.guidance_scale, len(prompts))

    def compute() -> dict[str, np.ndarray]:
        seeds = [seed + i for i in range(len(prompts))]
        found = capture(
            session.model.pipeline, session.interface, session.call, prompts, seeds, scales, progress=advance
        )
        arrays = {f"conditioning.{key}": value.float().numpy() for key, value in found.conditioning.items()}
        return arrays | {
            "latents": found.latents.numpy(), "outputs": found.outputs.numpy(), "timesteps": np.asarray(found.timesteps)
        }  # fmt: skip

    with session.reporter.on(name, f"{len(prompts)} full runs") as advance:
        arrays = session.workspace.arrays(name, [session.key, list(prompts), seed], compute)
    dtype = next(session.model.transformer.parameters()).dtype
    conditioning = {
        name: torch.from_numpy(arrays[f"conditioning.{name}"]).to(dtype) for name in session.interface.conditioning
    }
    return Trajectory(
        latents=torch.from_numpy(arrays["latents"]), outputs=torch.from_numpy(arrays["outputs"]), conditioning=conditioning,
        guidance=torch.tensor(scales), timesteps=tuple(arrays["timesteps"].tolist()),
    )  # fmt: skip


def _example(session: Session, trajectory: Trajectory) -> dict[str, Tensor]:
    """Transformer inputs with a batch of 2 · branches (4 for guided models), taken from the calibration set."""
    part = Trajectory(
        latents=trajectory.latents[:, :2], outputs=trajectory.outputs[:, :2], timesteps=trajectory.timesteps,
        conditioning={name: value[:, :2] for name, value in trajectory.conditioning.items()},
        guidance=trajectory.guidance[:2],
    )  # fmt: skip
    denoiser = denoiser_of(session.model.transformer, session.interface, part)
    middle = len(trajectory.timesteps) // 2
    return denoiser.inputs(part.latents[middle], trajectory.timesteps[middle], 1.0)


def _searched(session: Session, calibration: Calibration) -> Found:
    options = session.options
    key = [
        session.key, list(options.budgets), options.reference, options.anchor, options.trials, options.objective,
        options.payload, options.edge_costs,
    ]  # fmt: skip
    anchor = [session.key, options.reference, options.anchor, options.objective, options.payload, options.edge_costs]
    storage = session.workspace.path("anchor", anchor, ".db")
    return found_from_json(
        session.workspace.json(
            "search", key, lambda: json_from_found(search(calibration, options, session.reporter, storage))
        )
    )


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """Fidelity on held-out prompts, and pictures of the first few."""

    full: Program
    quality: dict[str, schema.Quality]
    """Of each budget."""
    baselines: dict[str, list[schema.Baseline]]
    pictures: dict[str, np.ndarray]
    """Of each budget and `full`: uint8 (SHOWN, height, width, 3)."""


def _evaluated(session: Session, found: Found, table: SolverTable, stages: Stages, prompts: Sequence[str]) -> Evaluated:
    """Run every budget's program, and its peers, on prompts and seeds that calibration has not seen."""
    options = session.options
    trajectory = _captured(session, "evaluate", prompts, options.seed + EVALUATION_SEED)
    evaluation = Evaluation(
        denoiser=denoiser_of(session.model.transformer, session.interface, trajectory), trajectory=trajectory,
        decode=session.decode, references=session.decode(trajectory.latents[-1]), stages=stages,
    )  # fmt: skip
    programs = {budget: trials[0].program for budget, trials in found.trials.items()}
    pipeline = session.model.pipeline

    def set_timesteps(scheduler: Any, steps: int) -> None:
        prepare_scheduler(pipeline, session.call, scheduler, steps)

    def measure() -> dict[str, Any]:
        measured: dict[str, Any] = {}
        with session.reporter.on("evaluate", f"budgets {', '.join(map(str, programs))} and peers") as advance:
            for position, (budget, program) in enumerate(programs.items()):
                peers = baseline_programs(pipeline.scheduler, table, budget, set_timesteps)
                measured[str(budget)] = {
                    "quality": evaluation.quality(program).model_dump(),
                    "baselines": [
                        schema.Baseline(name=name, nfe=peer.nfe, quality=evaluation.quality(peer)).model_dump()
                        for name, peer in peers.items()
                    ],
                }
                advance(position + 1, len(programs))
        return measured

    shown = Evaluation(
        denoiser=denoiser_of(session.model.transformer, session.interface, first := _first(trajectory, SHOWN)),
        trajectory=first, decode=session.decode, references=evaluation.references[:SHOWN], stages=stages,
    )  # fmt: skip
    key = [
        session.key,
        list(prompts),
        {str(budget): program.model_dump(mode="json") for budget, program in programs.items()},
    ]
    measured = session.workspace.json("measured", key, measure)
    pictures = {
        FULL: shown.references,
        **{str(budget): shown.pictures(program)[0] for budget, program in programs.items()},
    }
    return Evaluated(
        full=program_from_table(table),
        quality={budget: schema.Quality.model_validate(value["quality"]) for budget, value in measured.items()},
        baselines={b: [schema.Baseline.model_validate(peer) for peer in v["baselines"]] for b, v in measured.items()},
        pictures={name: (255 * value).round().astype(np.uint8) for name, value in pictures.items()},
    )


def _first(trajectory: Trajectory, count: int) -> Trajectory:
    """The first samples of a trajectory."""
    return Trajectory(
        latents=trajectory.latents[:, :count], outputs=trajectory.outputs[:, :count], timesteps=trajectory.timesteps,
        conditioning={name: value[:, :count] for name, value in trajectory.conditioning.items()},
        guidance=trajectory.guidance[:count],
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Exported:
    """Files of the artifact's stages in a folder of the workspace, and what the manifest says of them."""

    folder: Path
    stages: list[schema.Stage]
    max_relative_error: float
    """Of embed, blocks and head one after the other, against torch."""
    tokenizers: list[schema.Tokenizer]


def _exported(session: Session, stages: Stages, trajectory: Trajectory) -> Exported:
    """Export the trunk, text encoders and decoder to ONNX, each checked against torch."""
    options = session.options
    encoders, encoder_example, specifications = session.encoders

    def compute(folder: Path) -> None:
        engines = folder / "engines" / "onnx"
        engines.mkdir(parents=True)
        (folder / "tokenizers").mkdir()
        for specification in specifications:
            (folder / "tokenizers" / f"{specification.input_name}.json").write_text(
                specification.tokenizer_json, encoding="utf-8"
            )
        with session.reporter.on("export", f"{len(stages.stages) + 2} stages") as advance:
            example = _example(session, trajectory)
            written = list(export_stages(stages, example, engines, progress=advance))
            chain = end_to_end_error(written, example, run_stages(stages, example))
        with session.reporter.on("export", "text encoders and decoder"):
            written.append(
                export_module(
                    encoders, encoder_example, encoders.output_names, engines / "text_encoder.onnx", kind="text_encoder"
                )
            )
            written.append(
                export_module(
                    session.decoder, session.decoder_example, ("images",), engines / "vae_decoder.onnx", kind="decoder"
                )
            )
        described = [
            {
                "name": stage.name, "kind": stage.kind, "onnx": f"engines/onnx/{stage.path.name}",
                "max_relative_error": stage.max_relative_error,
                "inputs": _tensors(stage.inputs), "outputs": _tensors(stage.outputs),
            }
            for stage in written
        ]  # fmt: skip
        (folder / "stages.json").write_text(json.dumps({"stages": described, "chain": chain}))

    key = [session.key, options.height, options.width]
    folder = session.workspace.tree("export", key, compute)
    written = json.loads((folder / "stages.json").read_text())
    return Exported(
        folder=folder,
        stages=[schema.Stage.model_validate(value) for value in written["stages"]],
        max_relative_error=written["chain"],
        tokenizers=[
            schema.Tokenizer(
                input_name=value.input_name, path=f"tokenizers/{value.input_name}.json", length=value.length, pad_id=value.pad_id
            )
            for value in specifications
        ],
    )  # fmt: skip


def _tensors(tensors: Sequence[TensorInfo]) -> list[dict[str, Any]]:
    return [{"name": tensor.name, "dtype": tensor.dtype, "shape": list(tensor.shape)} for tensor in tensors]


def _manifest_fields(
    session: Session,
    table: SolverTable,
    stages: Stages,
    found: Found,
    evaluated: Evaluated,
    exported: Exported,
    prompts: Sequence[str],
    held_out: Sequence[str],
) -> dict[str, Any]:
    """The manifest but for files and digest, as a JSON value."""
    options, call, interface, model = session.options, session.call, session.interface, session.model
    total = options.num_inference_steps
    low, high = options.guidance_scale
    scheduler = model.pipeline.scheduler
    programs = [schema.BudgetProgram(budget=FULL, program=evaluated.full)]
    for budget, trials in found.trials.items():
        programs.append(
            schema.BudgetProgram(
                budget=str(budget),
                program=trials[0].program,
                quality=evaluated.quality[str(budget)],
                baselines=tuple(evaluated.baselines[str(budget)]),
                candidates=tuple(trial.candidate(chosen=position == 0) for position, trial in enumerate(trials)),
            )
        )
    parts: dict[str, Any] = {
        "schema_version": schema.SCHEMA_VERSION,
        "producer": versions(),
        "model": schema.Model(
            name=model.name, pipeline=type(model.pipeline).__name__, transformer=type(model.transformer).__name__,
            config_digest=model.config_digest, weights_digest=model.weights_digest,
        ),
        "sampler": schema.Sampler(
            scheduler=type(scheduler).__name__, num_inference_steps=total,
            config={key: value for key, value in scheduler.config.items() if not key.startswith("_") and _plain(value)},
        ),
        "conditions": schema.Conditions(
            height=call.height, width=call.width, max_sequence_length=call.max_sequence_length or 1, dtype="float32",
            objective=options.objective, prompts_digest=digest_of_value([list(prompts), list(held_out)]),
            calibration_prompts=len(prompts), evaluation_prompts=len(held_out), seed=options.seed,
        ),
        "latents": schema.Latents(
            noise_shape=interface.noise_shape, split=interface.noise_split, permutation=interface.noise_permutation,
            shape=interface.latents_shape, initial_scale=table.initial_scale,
        ),
        "timestep_scale": interface.timestep_scale,
        "latents_input": interface.latents_input,
        "timestep_input": interface.timestep_input,
        "output": stages.output,
        "guidance": schema.Guidance(
            kind=interface.guidance_kind, scale=options.nominal_scale, minimum=low, maximum=high,
            negative_prompt=call.negative_prompt,
        ),
        "max_relative_error": exported.max_relative_error,
        "stages": exported.stages,
        "features": [schema.Feature(source=source, result=result) for source, result in stages.features],
        "tokenizers": exported.tokenizers,
        "reference": schema.Policy(schedule=found.reference.schedule, num_inference_steps=total, source=found.reference.name),
        "anchor": schema.Policy(schedule=found.anchor.schedule, num_inference_steps=total, source=found.anchor.name),
        "programs": programs,
        "costs": [schema.Cost(name="capture", full_runs=1.0)] + [
            schema.Cost(name=name, full_runs=round(value, 4)) for name, value in found.costs.items()
        ],
        "engines": [
            schema.Engine(backend="onnx", version="opset 20", target="any", stages={s.name: s.onnx for s in exported.stages})
        ],
    }  # fmt: skip
    return {name: _dumped(value) for name, value in parts.items()}


def _plain(value: Any) -> bool:
    """Whether a scheduler's option is a plain JSON value."""
    return value is None or isinstance(value, (bool, int, float, str))


def _dumped(value: Any) -> Any:
    """Models inside lists and on their own as JSON values."""
    if isinstance(value, list):
        return [_dumped(item) for item in value]
    return value.model_dump(mode="json") if hasattr(value, "model_dump") else value
