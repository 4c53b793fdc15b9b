"""Artifacts without engines: the manifest of a tiny pipeline, with real programs from its own scheduler."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from host_cases import Case

from otcache.compiler.models.digests import denoiser_digest, plain_options
from otcache.compiler.models.model import transformer_of
from otcache.compiler.pipelines.record import Tape, record
from otcache.compiler.programs.baselines import extrapolated_program
from otcache.compiler.programs.lower import lower
from otcache.compiler.programs.schedule import uniform_schedule
from otcache.compiler.programs.solver_table import SolverTable, program_from_table
from otcache.schemas.manifest import MANIFEST_NAME, Manifest, core_digest
from otcache.schemas.program import Program

ZEROS = "sha256:" + "0" * 64
BUDGET = 3


def full_run(case: Case, pipeline: Any) -> tuple[Tape, SolverTable]:
    """A run with all steps, and the pipeline's sampler as it prepared it."""
    with record(pipeline, keep_calls=0) as tape:
        case(pipeline)
    return tape, lower(pipeline.scheduler, step_options=tape.step_options)


def write_manifest(
    folder: Path, case: Case, pipeline: Any, tape: Tape, table: SolverTable, programs: dict[str, Program] | None = None
) -> Path:
    """`folder`/manifest.json with `programs`, or with the budgets `BUDGET` and `full`; stages are named and not
    there.
    """
    shape = list(tape.samples[0].shape[1:])
    transformer = transformer_of(pipeline, "pipeline")
    few = banded(extrapolated_program(table, uniform_schedule(BUDGET, table.num_inference_steps), order=1))
    programs = programs or {"full": program_from_table(table), str(BUDGET): few}
    stages = _stages(["batch", *shape], case.blocks)
    total = table.num_inference_steps
    policy = {"schedule": [0], "num_inference_steps": total, "source": "test"}
    value = {
        "producer": {},
        "model": {
            "name": "tiny",
            "pipeline": type(pipeline).__name__,
            "transformer": type(transformer).__name__,
            "config_digest": ZEROS,
            "weights_digest": ZEROS,
            "denoiser_digest": denoiser_digest(transformer),
            "denoiser_digest_float16": denoiser_digest(transformer, torch.float16),
        },
        "sampler": {
            "scheduler": type(pipeline.scheduler).__name__,
            "num_inference_steps": total,
            "config": plain_options(pipeline.scheduler),
        },
        "conditions": {
            "height": 16,
            "width": 16,
            "max_sequence_length": 6,
            "dtype": "float32",
            "objective": "ssim",
            "prompts_digest": ZEROS,
            "calibration_prompts": 1,
            "evaluation_prompts": 1,
            "seed": 0,
        },
        "latents": {
            "noise_shape": shape,
            "split": shape,
            "permutation": list(range(len(shape))),
            "shape": shape,
            "initial_scale": table.initial_scale,
        },
        "timestep_scale": 1.0,
        "latents_input": "latents",
        "timestep_input": "timestep",
        "output": "head_out",
        "guidance": {"kind": case.guidance_kind, **dict.fromkeys(("scale", "minimum", "maximum"), case.guidance)},
        "stages": stages,
        "features": [{"source": "embed_out", "result": stages[-2]["outputs"][0]["name"]}],
        "tokenizers": [],
        "reference": policy,
        "anchor": policy,
        "programs": [
            {"budget": budget, "program": program.model_dump(mode="json")} for budget, program in programs.items()
        ],
        "files": [{"path": stage["onnx"], "size_bytes": 0, "digest": ZEROS} for stage in stages],
        "digest": ZEROS,
    }
    value = Manifest.model_validate(value).model_dump(mode="json")
    value["digest"] = core_digest(value)
    folder.mkdir(parents=True)
    (folder / MANIFEST_NAME).write_text(json.dumps(value))
    return folder


def banded(program: Program) -> Program:
    """The program with a few per cent of slope wherever it weighs two outputs or more, and of means everywhere."""
    value = program.model_dump(mode="json")
    for step in value["steps"]:
        if len(coefs := step["output_coefs"]) > 1:
            slopes = [0.05 * coef for coef in coefs]
            step["slopes"] = {"centre": -0.5, "spread": 0.5, "latent_coef": 0.01, "output_coefs": slopes}
        step["means"] = {"latent_coef": 0.01, "output_coefs": [0.03 * coef for coef in coefs]}
        if step.get("slopes"):
            step["means"]["output_slopes"] = step["slopes"]["output_coefs"]
    return Program.model_validate({**value, "payload": "banded"})


def _stages(shape: list[Any], blocks: int) -> list[dict[str, Any]]:
    """Embed, blocks and head in a row."""
    names = ["embed", *(f"block_{place}" for place in range(blocks)), "head"]
    tensors = [
        {"name": name, "dtype": "float32", "shape": shape} for name in ("latents", *(f"{name}_out" for name in names))
    ]
    time = {"name": "timestep", "dtype": "float32", "shape": ["batch"]}
    return [
        {
            "name": name,
            "kind": name.split("_")[0],
            "onnx": f"{name}.onnx",
            "max_relative_error": 0.0,
            "inputs": [tensors[place], *([time] if name == "embed" else [])],
            "outputs": [tensors[place + 1]],
        }
        for place, name in enumerate(names)
    ]
