"""What is held of each class: from the real pipeline to an artifact, and from the artifact to the pipeline's own latents."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from otcache.compiler.baselines import uniform_reuse_program, uniform_schedule
from otcache.compiler.calling import CallOptions, call_options, prepare_scheduler
from otcache.compiler.capture import capture
from otcache.compiler.coverage import Row
from otcache.compiler.cut import cut
from otcache.compiler.decode import decoded
from otcache.compiler.denoiser import denoiser_of
from otcache.compiler.emit import emit
from otcache.compiler.encoders import FAMILIES
from otcache.compiler.export import TOLERANCES, ExportedStage, end_to_end_error, export_stages
from otcache.compiler.exported import ENGINES, stage_fields
from otcache.compiler.interface import Interface, probe
from otcache.compiler.lower import SolverTable, lower, program_from_table
from otcache.compiler.models import transformer_of
from otcache.compiler.prompt import latent_decoder
from otcache.compiler.residual import residual_program
from otcache.compiler.rollout import roll_out
from otcache.compiler.sizes import Sizes, own_point, see, stages_for
from otcache.compiler.stages import Stages, run_stages
from otcache.compiler.wanted import Wanted, spanned
from otcache.runtime import Sampler
from otcache.schemas import manifest as schema
from otcache.schemas.digest import digest_of_value
from otcache.schemas.errors import OTCacheError
from otcache.schemas.program import Program

STEPS, BUDGET, SCALE = 5, 2, 4.0
EXACT = 1e-5
"""Relative error of latents: the pipeline's arithmetic is done in another order."""


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


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
    stages = cut(transformer, example, constants=interface.constants, output=interface.output)  # proven bit for bit
    exported = export_stages(stages, example, folder / "work" / ENGINES)
    chain = end_to_end_error(exported, example, run_stages(stages, example))
    assert chain < TOLERANCES[torch.float32]

    programs = {"output": uniform_reuse_program(table, uniform_schedule(BUDGET, STEPS))}
    if stages.features:
        programs["residual"] = residual_program(table, uniform_schedule(BUDGET, STEPS), "reuse", np.eye(STEPS))
    full, errors = 0.0, {}
    for payload, program in programs.items():
        artifact = folder / payload
        write_artifact(artifact, folder / "work", pipeline, options, interface, table, stages, exported, program)
        with Sampler.load(artifact, "onnxruntime", 1) as sampler:
            wanted = {tensor.name for tensor in sampler.manifest.conditioning}
            request = {key: value.numpy() for key, value in trajectory.conditioning.items() if key in wanted}
            full = relative(sampler.sample(request, budget="full", seed=[5, 6]), final)
            found = sampler.sample(request, budget=BUDGET, seed=[5, 6])
        expected = roll_out(program, denoiser, trajectory.latents[0], stages).numpy()
        errors[payload] = relative(found, expected)
    assert full < 10 * EXACT and max(errors.values()) < 10 * EXACT

    sizes = symbolic_sizes(pipeline, interface, options, prompts, example)
    latents = trajectory.latents[-1]
    pictures = decoded(pipeline, options, latents)
    decoder = latent_decoder(pipeline, latents, pictures, options.height, options.width)
    return Row(
        transformer=type(transformer).__name__, pipeline=name, supported=True, guidance=interface.guidance_kind,
        payloads=tuple(programs), stages=len(stages.stages), prompt=name in FAMILIES, decoder=decoder is not None,
        stage_error=max(stage.max_relative_error for stage in exported), full_error=full,
        program_error=max(errors.values()), symbolic=("batch", *(axis.name for axis in sizes.wanted.axes)),
        fixed=dict(sizes.fixed),
    )  # fmt: skip


def symbolic_sizes(
    pipeline: Any, interface: Interface, options: CallOptions, prompts: list[str], example: dict[str, torch.Tensor]
) -> Sizes:
    """What the exporter keeps symbolic of height, width, frames and text length; stages are compared with the model at other sizes."""
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
    wanted = Wanted(axes=tuple(spanned(taken)), listed=taken) if len(taken) > 1 else Wanted()
    wanted = replace(wanted, axes=tuple(axis for axis in wanted.axes if axis.minimum < axis.maximum))
    _, sizes = stages_for(transformer_of(pipeline, "the case"), interface, example, wanted, seen)
    return replace(sizes, fixed={**refused, **sizes.fixed})


def write_artifact(
    target: Path,
    work: Path,
    pipeline: Any,
    options: CallOptions,
    interface: Interface,
    table: SolverTable,
    stages: Stages,
    exported: tuple[ExportedStage, ...],
    program: Program,
) -> None:
    """An artifact of the trunk alone: conditioning in, latents out."""
    digest = digest_of_value("coverage")
    policy = {"schedule": [0], "num_inference_steps": STEPS, "source": "coverage"}
    fields = {
        "schema_version": schema.SCHEMA_VERSION, "producer": {},
        "model": {
            "name": "coverage", "pipeline": type(pipeline).__name__, "transformer": "any", "config_digest": digest,
            "weights_digest": digest,
        },
        "sampler": {"scheduler": type(pipeline.scheduler).__name__, "config": {}, "num_inference_steps": STEPS},
        "conditions": {
            "height": options.height, "width": options.width, "num_frames": options.num_frames, "max_sequence_length": 1,
            "dtype": "float32", "objective": "none", "prompts_digest": digest, "calibration_prompts": 0,
            "evaluation_prompts": 0, "seed": 0,
        },
        "latents": {
            "noise_shape": interface.noise_shape, "split": interface.noise_split,
            "permutation": interface.noise_permutation, "shape": interface.latents_shape,
            "initial_scale": table.initial_scale,
        },
        "timestep_scale": interface.timestep_scale, "latents_input": interface.latents_input,
        "timestep_input": interface.timestep_input, "output": stages.output,
        "guidance": {"kind": interface.guidance_kind, "scale": SCALE, "minimum": SCALE, "maximum": SCALE},
        "stages": [stage_fields(stage) for stage in exported],
        "features": [{"source": source, "result": result} for source, result in stages.features],
        "tokenizers": [], "reference": policy, "anchor": policy,
        "programs": [
            {"budget": "full", "program": program_from_table(table).model_dump()},
            {"budget": str(BUDGET), "program": program.model_dump()},
        ],
    }  # fmt: skip

    def fill(folder: Path) -> None:
        (folder / ENGINES).mkdir(parents=True)
        for stage in exported:
            for file in stage.files:
                (folder / ENGINES / file.name).hardlink_to(file)

    emit(target, fill, fields, force=True, attachments=frozenset())
