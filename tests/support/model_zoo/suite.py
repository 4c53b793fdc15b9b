"""What is held of each class: from the real pipeline to an artifact, and from the artifact to the pipeline's own
latents.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from otcache.compiler.calibration.rollout import roll_out
from otcache.compiler.export.at_sizes import constant_files, layout_symbols, manifest_shapes, trunk_at
from otcache.compiler.export.decoder import make_latent_decoder
from otcache.compiler.export.onnx_stages import TOLERANCES, ExportedStage, end_to_end_error, export_stages
from otcache.compiler.export.text_encoders import FAMILIES
from otcache.compiler.graph.stages import Stages, run_in_turn
from otcache.compiler.models.coverage import Row
from otcache.compiler.models.model import transformer_of
from otcache.compiler.passes.emit import emit
from otcache.compiler.passes.export import ENGINES, stage_fields
from otcache.compiler.pipelines.call import CallOptions, call_options, prepare_scheduler
from otcache.compiler.pipelines.decode import decode_latents
from otcache.compiler.pipelines.denoiser import denoiser_of
from otcache.compiler.pipelines.full_run import capture
from otcache.compiler.pipelines.interface import Interface
from otcache.compiler.pipelines.probe import probe
from otcache.compiler.pipelines.trajectory import Trajectory
from otcache.compiler.programs.baselines import uniform_reuse_program
from otcache.compiler.programs.lower import lower
from otcache.compiler.programs.residual import residual_program
from otcache.compiler.programs.schedule import uniform_schedule
from otcache.compiler.programs.solver_table import SolverTable, program_from_table
from otcache.compiler.sizes.requested import Wanted, span_axes
from otcache.compiler.sizes.served import Sizes, own_point, see, stages_for
from otcache.runtime import Sampler
from otcache.schemas import manifest as schema
from otcache.schemas.digest import digest_of_value
from otcache.schemas.errors import OTCacheError
from otcache.schemas.program import Program
from otcache.schemas.shapes import describe_size

STEPS, BUDGET, SCALE = 5, 2, 4.0
EXACT = 1e-5
"""Relative error of latents: the pipeline's arithmetic is done in another order."""


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """A pipeline that was compiled without searches."""

    pipeline: Any
    options: CallOptions
    interface: Interface
    table: SolverTable
    stages: Stages
    sizes: Sizes
    exported: tuple[ExportedStage, ...]


def cover(pipeline: Any, call: dict[str, int], prompts: list[str], folder: Path) -> Row:
    """Compile a pipeline without its searches, serve the result, and compare. Asserts what has to hold."""
    name, transformer = type(pipeline).__name__, transformer_of(pipeline, "the case")
    options = call_options(pipeline, num_inference_steps=STEPS, **call)
    interface = probe(pipeline, options, SCALE, prompts)
    trajectory = capture(pipeline, interface, options, prompts[:2], [5, 6], [SCALE] * 2)
    prepare_scheduler(pipeline, options, pipeline.scheduler, STEPS)
    table = lower(pipeline.scheduler)
    denoiser = denoiser_of(transformer, interface, trajectory)
    final = trajectory.latents[-1].numpy()
    assert relative(roll_out(program_from_table(table), denoiser, trajectory.latents[0]).numpy(), final) < EXACT

    example = denoiser.inputs(trajectory.latents[2], trajectory.timesteps[2], 1.0)
    stages, sizes = symbolic_stages(pipeline, interface, options, prompts, example)  # proven bit for bit
    example |= sizes.constants_at(0)
    exported = export_stages(stages, example, folder / "work" / ENGINES, others=trunk_at(sizes))
    chain = end_to_end_error(exported, example, run_in_turn(stages, example)[stages.output])
    assert chain < TOLERANCES[torch.float32]

    interface = replace(interface, tables=sizes.own_tables)
    compiled = Compiled(
        pipeline=pipeline,
        options=options,
        interface=interface,
        table=table,
        stages=stages,
        sizes=sizes,
        exported=exported,
    )
    denoiser, programs = denoiser_of(transformer, interface, trajectory), short_programs(compiled, table)
    full, errors = [], {}
    for payload, program in programs.items():
        artifact = folder / payload
        write_artifact(artifact, folder / "work", compiled, payload)
        with Sampler.load(artifact, "onnxruntime", 1) as sampler:
            request = conditioning_for(sampler, trajectory)
            full.append(relative(sampler.sample(request, budget="full", seed=[5, 6]), final))
            found = sampler.sample(request, budget=BUDGET, seed=[5, 6])
            if payload == "output" and sizes.wanted.axes:
                full.append(error_elsewhere(sampler, compiled, prompts))
        expected = roll_out(program, denoiser, trajectory.latents[0], stages).numpy()
        errors[payload] = relative(found, expected)
    assert max(full) < 10 * EXACT and max(errors.values()) < 10 * EXACT

    latents = trajectory.latents[-1]
    pictures = decode_latents(pipeline, options, latents)
    decoder = make_latent_decoder(pipeline, latents, pictures, options.height, options.width)
    return Row(
        transformer=type(transformer).__name__,
        pipeline=name,
        supported=True,
        guidance=interface.guidance_kind,
        payloads=tuple(programs),
        stages=len(stages.stages),
        prompt=name in FAMILIES,
        decoder=decoder is not None,
        stage_error=max(stage.max_relative_error for stage in exported),
        full_error=max(full),
        program_error=max(errors.values()),
        symbolic=("batch", *(axis.name for axis in sizes.wanted.axes)),
        fixed=dict(sizes.fixed),
    )


def short_programs(compiled: Compiled, table: SolverTable) -> dict[str, Program]:
    """A program of a small budget for each payload that the stages can serve."""
    programs = {"output": uniform_reuse_program(table, uniform_schedule(BUDGET, STEPS))}
    if compiled.stages.features:
        programs["residual"] = residual_program(table, uniform_schedule(BUDGET, STEPS), "reuse", np.eye(STEPS))
    return programs


def conditioning_for(sampler: Sampler, trajectory: Trajectory) -> dict[str, np.ndarray]:
    wanted = {tensor.name for tensor in sampler.manifest.conditioning}
    return {key: value.numpy() for key, value in trajectory.conditioning.items() if key in wanted}


def error_elsewhere(sampler: Sampler, compiled: Compiled, prompts: list[str]) -> float:
    """Of budget `full` from the pipeline's own latents at another size, the one that differs in most axes."""
    seen = compiled.sizes.served()[-1]
    trajectory = capture(compiled.pipeline, seen.interface, seen.call, prompts[:2], [5, 6], [SCALE] * 2)
    size = {axis.name: seen.point[axis.name] for axis in compiled.sizes.wanted.axes}
    found = sampler.sample(conditioning_for(sampler, trajectory), budget="full", seed=[5, 6], **size)
    return relative(found, trajectory.latents[-1].numpy())


def symbolic_stages(
    pipeline: Any, interface: Interface, options: CallOptions, prompts: list[str], example: dict[str, torch.Tensor]
) -> tuple[Stages, Sizes]:
    """With what the exporter keeps symbolic of height, width, frames and text length: each is doubled, then all
    together.
    """
    own = own_point(options)
    others = {name: 2 * value - (name == "num_frames") for name, value in own.items()}
    points = [{**own, name: value} for name, value in others.items()] + [others]
    seen, refused = [see(pipeline, interface, options, SCALE, prompts, own)], {}
    for point in points:
        try:
            seen.append(see(pipeline, interface, options, SCALE, prompts, point))
        except OTCacheError as error:
            for name in [name for name in own if point[name] != own[name]] if point is not others else []:
                refused[name] = str(error)
    taken = tuple(each.point for each in seen if all(each.point[name] == own[name] for name in refused))
    wanted = Wanted(axes=tuple(span_axes(taken)), listed=taken) if len(taken) > 1 else Wanted()
    wanted = replace(wanted, axes=tuple(axis for axis in wanted.axes if axis.minimum < axis.maximum))
    stages, sizes = stages_for(transformer_of(pipeline, "the case"), interface, example, wanted, seen)
    return stages, replace(sizes, fixed={**refused, **sizes.fixed})


def write_artifact(target: Path, work: Path, compiled: Compiled, payload: str) -> None:
    """An artifact of the trunk alone, with the short program of one payload: conditioning in, latents out."""
    pipeline, options, interface, sizes = compiled.pipeline, compiled.options, compiled.interface, compiled.sizes
    digest = digest_of_value("coverage")
    policy = {"schedule": [0], "num_inference_steps": STEPS, "source": "coverage"}

    def programs(table: SolverTable) -> list[schema.BudgetProgram]:
        made = {"full": program_from_table(table), str(BUDGET): short_programs(compiled, table)[payload]}
        return [schema.BudgetProgram(budget=budget, program=program) for budget, program in made.items()]

    layout = layout_symbols(sizes, type(pipeline).__name__)
    shapes = manifest_shapes(
        sizes, sizes.book.symbols, {describe_size(seen.point): programs(seen.table) for seen in sizes.own_samplers()}
    )
    fields = {
        "schema_version": schema.SCHEMA_VERSION,
        "producer": {},
        "model": {
            "name": "coverage",
            "pipeline": type(pipeline).__name__,
            "transformer": "any",
            "config_digest": digest,
            "weights_digest": digest,
        },
        "sampler": {"scheduler": type(pipeline.scheduler).__name__, "config": {}, "num_inference_steps": STEPS},
        "conditions": {
            "height": options.height,
            "width": options.width,
            "num_frames": options.num_frames,
            "max_sequence_length": options.max_sequence_length or 1,
            "dtype": "float32",
            "objective": "none",
            "prompts_digest": digest,
            "calibration_prompts": 0,
            "evaluation_prompts": 0,
            "seed": 0,
        },
        "latents": {
            "noise_shape": interface.noise_shape,
            "split": interface.noise_split,
            "permutation": interface.noise_permutation,
            "shape": interface.latents_shape,
            "initial_scale": compiled.table.initial_scale,
            **layout,
        },
        "timestep_scale": interface.timestep_scale,
        "latents_input": interface.latents_input,
        "timestep_input": interface.timestep_input,
        "output": compiled.stages.output,
        "guidance": {"kind": interface.guidance_kind, "scale": SCALE, "minimum": SCALE, "maximum": SCALE},
        "stages": [stage_fields(stage) for stage in compiled.exported],
        "features": [{"source": source, "result": result} for source, result in compiled.stages.features],
        "tokenizers": [],
        "reference": policy,
        "anchor": policy,
        "programs": [entry.model_dump(mode="json") for entry in programs(compiled.table)],
        "shapes": shapes.model_dump(mode="json") if shapes else None,
    }

    def fill(folder: Path) -> None:
        (folder / ENGINES).mkdir(parents=True)
        for stage in compiled.exported:
            for file in stage.files:
                (folder / ENGINES / file.name).hardlink_to(file)
        for path, content in constant_files(sizes).items():
            (folder / path).parent.mkdir(exist_ok=True)
            (folder / path).write_bytes(content)

    emit(target, fill, fields, force=True, attachments=frozenset())
