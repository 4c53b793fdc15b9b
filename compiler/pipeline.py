"""The order of the passes: options → artifact. Each pass lives in a module of its name; what they pass on is frozen."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from otcache.schemas import manifest as schema
from otcache.schemas.digest import digest_of_value
from otcache.schemas.errors import ModelError, UsageError
from otcache.schemas.manifest import FULL
from otcache.schemas.program import Program
from otcache.schemas.shapes import Symbol, described

from . import metrics
from .attempts import NAME as ATTEMPT
from .attempts import Attempts
from .baselines import baseline_programs
from .calibrate import Calibration
from .calling import CallOptions, call_options, prepare_scheduler
from .capture import Trajectory, capture
from .decode import decoded
from .denoiser import denoiser_of
from .emit import check_target, emit, recover
from .encoders import Encoders, text_encoders
from .evaluate import Evaluation, eight_bits, quality_of
from .evidence import WORST, PassEvidence, Recorder, gather
from .export import NONE, ExportedStage, TensorInfo, end_to_end_error, export_module, export_stages
from .golden import golden_record, write_golden
from .guidance import calibration_scales
from .identity import plain_options
from .interface import Interface, probe
from .lower import SolverTable, lower, program_from_table
from .models import Model, load_model, read_prompts
from .options import CompileOptions, split_prompts
from .precision import stages_in
from .progress import Pass, Reporter
from .prompt import latent_decoder
from .report import ATTACHMENTS, write_report
from .search import Found, found_from_json, json_from_found, refitted, search
from .sized_parts import constant_files, decoder_at, encoders_at, manifest_shapes, trunk_at
from .sizes import Seen, Sizes, own_point, programs_differ, see, stages_for
from .stages import Stages, run_stages
from .symbols import SymbolBook
from .varying import SpecialisedError
from .wanted import Wanted, wanted
from .workspace import Workspace, default_workspace

EVALUATION_SEED = 1_000_000
"""Distance of the held-out seeds from those of calibration."""
GUIDANCE_MARGIN = 1.125
"""Of guided models every fourth calibration prompt is run at so many times the scale that is served.

Guided outputs are stiffer there, as those of a few prompts in a hundred are at the scale itself: what is fitted to both holds for
those as well (the changelog has the figures).
"""
SHOWN = 6
"""Held-out prompts whose pictures go into the report."""
DECODE_BATCH = 16
ENGINES = "engines/onnx"
EXPORTS = ("export", "export-text", "export-decoder")
"""What is exported and kept one by one: the transformer's stages, text encoders with tokenizers, decoder."""
DESCRIPTION = "stages.json"
"""Beside exported stages in the workspace."""
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


def compile_model(
    options: CompileOptions, reporter: Reporter | None = None, live: Model | None = None
) -> tuple[Path, schema.Manifest]:
    """Compile a model into an artifact. Returns its folder and manifest.

    live: the model where it is in memory, rather than to be loaded as `options.model` says.

    Raises OTCacheError (UsageError, ModelError, ArtifactError, HostError) and then leaves no artifact behind; what was
    computed stays in the workspace, so that the same options go on where they stopped.
    """
    recorder = Recorder(reporter or Reporter())
    target = target_of(options)
    recover(target)
    check_target(target, force=options.force)
    with contextlib.ExitStack() as held:
        return target, _compiled(prepare(options, recorder, held, live), target, recorder.passes)


def target_of(options: CompileOptions) -> Path:
    """Where the artifact goes."""
    return options.output or Path("artifacts") / Path(options.model).name


def _compiled(prepared: Prepared, target: Path, passes: Sequence[PassEvidence]) -> schema.Manifest:
    """The passes after `prepare`; `passes` grows with them."""
    session, table = prepared.session, prepared.table
    options, reporter = session.options, session.reporter
    found = searched(prepared)
    evaluated = _evaluated(prepared, found)
    programs = {described(seen.point): _programs_at(prepared, found, seen) for seen in prepared.sizes.own_samplers()}
    exported = _exported(prepared)
    fields = _manifest_fields(prepared, found, evaluated, exported, programs)

    def fill(folder: Path) -> None:
        for exported_folder in exported.folders:
            shutil.copytree(exported_folder, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(DESCRIPTION))
        for path, content in constant_files(prepared.sizes).items():
            (folder / path).parent.mkdir(exist_ok=True)
            (folder / path).write_bytes(content)
        if session.encoders is not None:
            write_golden(folder, evaluated.golden)
        evidence, shown = gather(
            evaluated.outcomes, evaluated.references, prompts=prepared.held_out, seeds=prepared.held_out_seeds,
            timesteps=table.timesteps.tolist(), sigmas=None if table.sigmas is None else table.sigmas.tolist(), passes=passes,
        )  # fmt: skip
        write_report(folder, fields, evidence, shown)

    with reporter.on("emit", str(target)):
        return emit(target, fill, fields, force=options.force, attachments=ATTACHMENTS)


def begin(
    options: CompileOptions, reporter: Reporter, live: Model | None = None
) -> tuple[Session, list[str], list[str]]:
    """The passes that are never kept: load and probe. Returns the prompts of calibration and held-out ones as well."""
    own = read_prompts(options.prompts) if isinstance(options.prompts, Path) else options.prompts
    if options.objective == "lpips":
        metrics.lpips_metric()  # where it is missing, say so before anything is loaded
    with reporter.on("load", options.model):
        model = live or load_model(
            options.model, revision=options.revision, trust_remote_code=options.trust_remote_code, lora=options.lora
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
    trajectory = _captured(session, "capture", prompts, options.seed, session.margin)
    with reporter.on("lower", type(model.pipeline.scheduler).__name__):
        prepare_scheduler(model.pipeline, session.call, model.pipeline.scheduler, options.num_inference_steps)
        table = lower(model.pipeline.scheduler)
    stages, sizes = (like.stages, like.sizes) if like else _cut(session, trajectory)
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
    transformer, example = session.model.transformer, _example(session, trajectory)
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
    """Versions of everything that has a say in the result."""
    names = ("otcache", "torch", "diffusers", "transformers", "numpy", "onnx", "onnxscript", "optuna", "POT")
    return {name: importlib.metadata.version(name) for name in names}


def capture_key(session: Session, prompts: Sequence[str], seed: int, scales: Sequence[float]) -> Any:
    """What a chunk of full runs depends on, for the workspace."""
    return [session.key, list(prompts), seed, list(scales)]


def capture_chunks(count: int) -> list[slice]:
    """How full runs are cut into chunks that are kept one by one."""
    return [slice(start, min(start + CAPTURE_CHUNK, count)) for start in range(0, count, CAPTURE_CHUNK)]


def _captured(session: Session, name: str, prompts: Sequence[str], seed: int, margin: float = 1.0) -> Trajectory:
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


def _example(session: Session, trajectory: Trajectory) -> dict[str, Tensor]:
    """Transformer inputs with a batch of 2 · branches (4 for guided models), taken from the calibration set."""
    part = trajectory.rows(slice(2))
    denoiser = denoiser_of(session.model.transformer, session.interface, part)
    middle = len(trajectory.timesteps) // 2
    return denoiser.inputs(part.latents[middle], trajectory.timesteps[middle], 1.0)


def searched(prepared: Prepared) -> Found:
    """The searches' result, from the workspace where it is known."""
    session, calibration, options = prepared.session, prepared.calibration, prepared.session.options
    storage = anchor_storage(session)

    def compute() -> dict[str, Any]:
        return json_from_found(search(calibration, options, session.reporter, storage))

    return found_from_json(session.workspace.json("search", search_key(session), compute))


def search_key(session: Session) -> Any:
    """What all searches together depend on, for the workspace; what they try is kept one by one as well."""
    options = session.options
    return [
        session.key, session.margin, list(options.budgets), options.reference, options.anchor, options.trials, options.objective,
        options.payload, options.edge_costs,
    ]  # fmt: skip


def anchor_storage(session: Session) -> Path:
    """Optuna's database of the anchor search."""
    options = session.options
    key = [
        session.key, session.margin, options.reference, options.anchor, options.objective, options.payload,
        options.edge_costs,
    ]  # fmt: skip
    return session.workspace.path("anchor", key, ".db")


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """Fidelity on held-out prompts."""

    full: Program
    quality: dict[str, schema.Quality]
    """Of each budget."""
    baselines: dict[str, list[schema.Baseline]]
    outcomes: dict[int, dict[str, np.ndarray]]
    """Of each budget, for the report (`evaluate.Outcome.arrays`)."""
    references: np.ndarray
    """Pictures of the full runs, uint8 (n, height, width, 3)."""
    golden: np.ndarray
    """Final latents of the first held-out prompt at the smallest budget, float32."""


def held_out_trajectory(prepared: Prepared) -> Trajectory:
    """Full runs of the prompts and seeds that calibration has not seen."""
    session = prepared.session
    return _captured(session, "evaluate", prepared.held_out, session.options.seed + EVALUATION_SEED)


def nominal_calibration(prepared: Prepared) -> Calibration:
    """The calibration set without the margin, for methods that are compared with ours: each is fitted to what is served."""
    session, attempts = prepared.session, Attempts()
    trajectory = _captured(session, "capture", prepared.prompts, session.options.seed)
    return replace(
        prepared.calibration, denoiser=denoiser_of(session.model.transformer, session.interface, trajectory),
        trajectory=trajectory, references=session.decode(trajectory.latents[-1]), fitted={}, attempts=attempts,
    )  # fmt: skip


def _evaluated(prepared: Prepared, found: Found) -> Evaluated:
    """Run every budget's program, and its peers, on prompts and seeds that calibration has not seen."""
    session, table, stages, prompts = prepared.session, prepared.table, prepared.stages, prepared.held_out
    trajectory = held_out_trajectory(prepared)
    evaluation = Evaluation(
        denoiser=denoiser_of(session.model.transformer, session.interface, trajectory), trajectory=trajectory,
        decode=session.decode, references=session.decode(trajectory.latents[-1]), stages=stages,
    )  # fmt: skip
    programs = {budget: trials[0].program for budget, trials in found.trials.items()}
    pipeline = session.model.pipeline

    def roll(program: Program) -> dict[str, np.ndarray]:
        return evaluation.outcome(program).arrays(SHOWN, WORST)

    def measure(budget: int, kept: dict[str, np.ndarray]) -> dict[str, Any]:
        peers = baseline_programs(pipeline.scheduler, table, budget, prepared.set_timesteps)
        return {
            "quality": quality_of(kept["psnr_db"], kept["ssim"], kept["errors"][-1]).model_dump(),
            "baselines": [
                schema.Baseline(name=name, nfe=peer.nfe, quality=evaluation.quality(peer)).model_dump()
                for name, peer in peers.items()
            ],
        }

    measured: dict[str, Any] = {}
    outcomes: dict[int, dict[str, np.ndarray]] = {}
    with session.reporter.on("evaluate", f"budgets {', '.join(map(str, programs))} and peers") as advance:
        for position, (budget, program) in enumerate(programs.items()):
            key = evaluation_key(session, prompts, budget, program)
            outcomes[budget] = session.workspace.arrays("pictures", key, partial(roll, program))
            measured[str(budget)] = session.workspace.json("measured", key, partial(measure, budget, outcomes[budget]))
            advance(position + 1, len(programs))
        advance.facts["evaluations"] = evaluation.denoiser.evaluations[0]
    return Evaluated(
        full=program_from_table(table),
        quality={budget: schema.Quality.model_validate(value["quality"]) for budget, value in measured.items()},
        baselines={b: [schema.Baseline.model_validate(peer) for peer in v["baselines"]] for b, v in measured.items()},
        outcomes=outcomes,
        references=eight_bits(evaluation.references),
        golden=outcomes[min(outcomes)]["latents"],
    )


def evaluation_key(session: Session, prompts: Sequence[str], budget: int, program: Program) -> Any:
    """What the evaluation of one budget depends on, for the workspace."""
    return [session.key, list(prompts), budget, program.model_dump(mode="json"), "one roll-out"]


def _programs_at(prepared: Prepared, found: Found, seen: Seen) -> list[schema.BudgetProgram]:
    """Programs of a size whose sampler is another: the schedules that were found, with coefficients fitted and measured there."""
    own = prepared.session
    session = replace(
        own, call=seen.call, interface=seen.interface, decoder=None, key={**own.key, "served at": seen.point}
    )  # pictures are the pipeline's own: its decoder is for the size that is compiled
    trajectory = _captured(session, "capture", prepared.prompts, session.options.seed, session.margin)
    calibration = replace(
        prepared.calibration, denoiser=denoiser_of(session.model.transformer, seen.interface, trajectory), trajectory=trajectory,
        table=seen.table, decode=session.decode, references=session.decode(trajectory.latents[-1]), fitted={},
        attempts=Attempts(session.workspace, [session.key, session.margin, session.options.objective]),
    )  # fmt: skip
    with session.reporter.on("fit", f"schedules at {described(seen.point)}"):
        here = refitted(found, calibration)
    at_size = replace(prepared, session=session, trajectory=trajectory, table=seen.table, calibration=calibration)
    return _budget_programs(here, _evaluated(at_size, here))


@dataclass(frozen=True, kw_only=True)
class Exported:
    """Files of the artifact's stages in folders of the workspace, and what the manifest says of them."""

    folders: list[Path]
    """Each beside its files with a `DESCRIPTION`, which is no part of the artifact."""
    stages: list[schema.Stage]
    max_relative_error: float
    """Of embed, blocks and head one after the other, against torch."""
    tokenizers: list[schema.Tokenizer]
    symbols: list[Symbol]
    """Of all dimensions that follow a request's size."""
    decoded_as: Literal["latents", "noise"]


def _exported(prepared: Prepared) -> Exported:
    """Export the trunk, text encoders and decoder to ONNX, each checked against torch at every size."""
    session, stages, trajectory, sizes = prepared.session, prepared.stages, prepared.trajectory, prepared.sizes
    encoders, decoder, pipeline = session.encoders, session.decoder, session.model.pipeline
    encoders_there, text_sizes = encoders_at(pipeline, sizes)
    general, decoder_sizes = decoder_at(pipeline, sizes) if decoder is not None and sizes.pictures > 1 else (None, NONE)

    def trunk(folder: Path) -> None:
        with session.reporter.on("export", f"{len(stages.stages)} stages of the transformer") as advance:
            held = {name: session.interface.constants[name] for name in sizes.constants}
            example, others = {**_example(session, trajectory), **held}, trunk_at(sizes)
            served, inputs = stages, example
            if session.options.dtype != "float32":
                dtype, transformer = getattr(torch, session.options.dtype), session.model.transformer
                served, inputs, elsewhere = stages_in(dtype, transformer, session.interface, example, sizes)
                others = replace(others, inputs=tuple(elsewhere))
            written = list(export_stages(served, inputs, folder / ENGINES, progress=advance, others=others))
            chain = end_to_end_error(written, inputs, run_stages(stages, example))
            _describe(folder, written, sizes.book, chain)

    def text(folder: Path, encoders: Encoders) -> None:
        (folder / "tokenizers").mkdir()
        for specification in encoders.tokenizers:
            path = folder / "tokenizers" / f"{specification.input_name}.json"
            path.write_text(specification.tokenizer_json, encoding="utf-8")
        path = folder / ENGINES / "text_encoder.onnx"
        with session.reporter.on("export", "text encoders"):
            names = encoders.output_names
            written = export_module(
                encoders.module, encoders.example, names, path, kind="text_encoder", others=text_sizes
            )
            _describe(folder, [written], sizes.book)

    def pictures(folder: Path, decoder: torch.nn.Module) -> None:
        path = folder / ENGINES / "vae_decoder.onnx"
        with session.reporter.on("export", "decoder"):
            if general is not None:
                with contextlib.suppress(SpecialisedError):
                    example = dict(decoder_sizes.inputs[0])
                    written = export_module(general, example, ("images",), path, kind="decoder", others=decoder_sizes)
                    _describe(folder, [written], sizes.book)
                    return
            if sizes.pictures > 1:
                session.reporter.note("the decoder knows one size: other sizes give latents")
            written = export_module(decoder, session.decoder_example, ("images",), path, kind="decoder")
            _describe(folder, [written], sizes.book)

    parts: dict[str, Callable[[Path], None]] = {"export": trunk}
    if encoders is not None:
        parts["export-text"] = partial(text, encoders=encoders)
    if decoder is not None:
        parts["export-decoder"] = partial(pictures, decoder=decoder)
    folders = [session.workspace.tree(name, export_key(session, name), compute) for name, compute in parts.items()]
    written = [json.loads((folder / DESCRIPTION).read_text(encoding="utf-8")) for folder in folders]
    found = [schema.Stage.model_validate(value) for part in written for value in part["stages"]]
    tokenizers = [
        schema.Tokenizer(
            input_name=value.input_name, path=f"tokenizers/{value.input_name}.json", length=value.length,
            pad_id=value.pad_id, template=value.template,
            length_symbol=_length_symbol([each.tokenizers[position].length for each in encoders_there], sizes),
        )
        for position, value in enumerate(encoders.tokenizers if encoders else ())
    ]  # fmt: skip
    symbols = {value["name"]: Symbol.model_validate(value) for part in written for value in part["symbols"]}
    as_noise = bool(found[-1].inputs[0].symbols) and found[-1].kind == "decoder"
    return Exported(
        folders=folders, stages=found, max_relative_error=written[0]["chain"], tokenizers=tokenizers,
        symbols=list(symbols.values()), decoded_as="noise" if as_noise else "latents",
    )  # fmt: skip


def _length_symbol(lengths: Sequence[int], sizes: Sizes) -> str | None:
    symbol = sizes.book.of(lengths, "a tokenizer's length") if lengths else None
    return symbol.name if symbol else None


def export_key(session: Session, name: str) -> Any:
    """What exported stages (one of `EXPORTS`) depend on, for the workspace."""
    dtype = session.options.dtype if name == EXPORTS[0] else "float32"
    return [session.key, session.call.height, session.call.width, dtype, repr(session.wanted)]


def _describe(folder: Path, written: Sequence[ExportedStage], book: SymbolBook, chain: float | None = None) -> None:
    """Write what the manifest says of exported stages; `chain` is the error of all of them one after the other."""
    value = {
        "stages": [stage_fields(stage) for stage in written], "chain": chain,
        "symbols": [symbol.model_dump() for symbol in book.symbols],
    }  # fmt: skip
    (folder / DESCRIPTION).write_text(json.dumps(value), encoding="utf-8")


def stage_fields(stage: ExportedStage) -> dict[str, Any]:
    """What the manifest says of an exported stage."""
    return {
        "name": stage.name, "kind": stage.kind, "onnx": f"{ENGINES}/{stage.path.name}",
        "max_relative_error": stage.max_relative_error,
        "inputs": _tensors(stage.inputs), "outputs": _tensors(stage.outputs),
    }  # fmt: skip


def _tensors(tensors: Sequence[TensorInfo]) -> list[dict[str, Any]]:
    return [
        {"name": tensor.name, "dtype": tensor.dtype, "shape": list(tensor.shape), "symbols": list(tensor.symbols)}
        for tensor in tensors
    ]


def _budget_programs(found: Found, evaluated: Evaluated) -> list[schema.BudgetProgram]:
    """The full sampler, then what was chosen for each budget and what else was tried."""
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
    return programs


def _manifest_fields(
    prepared: Prepared,
    found: Found,
    evaluated: Evaluated,
    exported: Exported,
    programs_at: Mapping[str, list[schema.BudgetProgram]],
) -> dict[str, Any]:
    """The manifest but for files and digest, as a JSON value. programs_at: of sizes with a sampler of their own."""
    session, table, stages, sizes = prepared.session, prepared.table, prepared.stages, prepared.sizes
    prompts, held_out = prepared.prompts, prepared.held_out
    options, call, interface, model = session.options, session.call, session.interface, session.model
    total = options.num_inference_steps
    low, high = options.guidance_scale
    scheduler = model.pipeline.scheduler
    layouts = [seen.interface for seen in sizes.seen] or [interface]
    if len({layout.noise_permutation for layout in layouts}) > 1:
        raise ModelError(f"{type(model.pipeline).__name__} arranges noise otherwise at other sizes: leave --sizes out")
    latents: dict[str, Any] = {
        "noise_symbols": sizes.book.shape([layout.noise_shape for layout in layouts], "the noise's shape"),
        "split_symbols": sizes.book.shape([layout.noise_split for layout in layouts], "the noise's split"),
        "shape_symbols": sizes.book.shape([layout.latents_shape for layout in layouts], "the latents' shape"),
    }
    symbols = {symbol.name: symbol for symbol in (*exported.symbols, *sizes.book.symbols)}
    parts: dict[str, Any] = {
        "schema_version": schema.SCHEMA_VERSION,
        "producer": versions(),
        "model": schema.Model(
            name=model.name, pipeline=type(model.pipeline).__name__, transformer=type(model.transformer).__name__,
            config_digest=model.config_digest, weights_digest=model.weights_digest, denoiser_digest=model.denoiser_digest,
        ),
        "sampler": schema.Sampler(
            scheduler=type(scheduler).__name__, num_inference_steps=total,
            config=plain_options(scheduler),
        ),
        "conditions": schema.Conditions(
            height=call.height, width=call.width, num_frames=call.num_frames, max_sequence_length=call.max_sequence_length or 1, dtype=options.dtype,
            objective=options.objective, prompts_digest=digest_of_value([list(prompts), list(held_out)]),
            calibration_prompts=len(prompts), evaluation_prompts=len(held_out), seed=options.seed,
        ),
        "latents": schema.Latents(
            noise_shape=interface.noise_shape, split=interface.noise_split, permutation=interface.noise_permutation,
            shape=interface.latents_shape, initial_scale=table.initial_scale, decoded_as=exported.decoded_as, **latents,
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
        "programs": _budget_programs(found, evaluated),
        "shapes": manifest_shapes(sizes, list(symbols.values()), programs_at),
        "golden": None if session.encoders is None else golden_record(
            prompt=held_out[0], budget=min(found.trials), seed=options.seed + EVALUATION_SEED,
            guidance_scale=None if interface.guidance_kind == "none" else calibration_scales(low, high, 1)[0],
            max_relative_error=exported.max_relative_error,
        ),
        "costs": [schema.Cost(name="capture", full_runs=1.0)] + [
            schema.Cost(name=name, full_runs=round(value, 4)) for name, value in found.costs.items()
        ],
        "engines": [
            schema.Engine(backend="onnx", version="opset 20", target="any", stages={s.name: s.onnx for s in exported.stages})
        ],
    }  # fmt: skip
    return {name: _dumped(value) for name, value in parts.items()}


def _dumped(value: Any) -> Any:
    """Models inside lists and on their own as JSON values."""
    if isinstance(value, list):
        return [_dumped(item) for item in value]
    return value.model_dump(mode="json") if hasattr(value, "model_dump") else value
