"""Speed-up of the drop-in scheduler in diffusers' own pipelines: 50 steps against budgets 11 and 8.

    python tests/benchmarks/hosts.py [flux | qwen-image | hunyuan-video] [--rounds 3]

With an NVIDIA GPU: the real architecture in bfloat16 with random weights, at 1024² (video: 33 frames of 544 × 960),
where the speed-up should reach 97 % of T/B. Without one: the same class at a reduced size on the CPU, which shows that
the script runs and nothing about large models. Prints JSON. Weights have no say in the time, nor in the coefficients,
which are extrapolated here.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import dataclass
from typing import Any

import diffusers
import torch

from otcache.compiler.hosts import OTCacheScheduler
from otcache.compiler.hosts.recipe import Recipe
from otcache.compiler.models.digests import plain_options
from otcache.compiler.programs.baselines import extrapolated_program
from otcache.compiler.programs.lower import lower
from otcache.compiler.programs.schedule import uniform_schedule
from otcache.compiler.programs.solver_table import program_from_table
from otcache.schemas import manifest as schema

STEPS, BUDGETS, TARGET = 50, (11, 8), 0.97


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A pipeline of text embeddings and a transformer alone."""

    pipeline: str
    transformer: str
    reduced: dict[str, Any]
    """Options of the transformer on the CPU; on a GPU the class's defaults, which are the real model's."""
    real: dict[str, Any]
    absent: tuple[str, ...]
    call: dict[str, Any]
    small_call: dict[str, Any]
    embeds: dict[str, tuple[int | str, ...]]
    """Shapes (1, …) of the embeddings; text names an option of the transformer."""


FLOW = {"use_dynamic_shifting": True, "shift": 3.0}
SMALL = {"num_attention_heads": 4, "num_layers": 4, "in_channels": 16}
SQUARE, SMALL_SQUARE = {"height": 1024, "width": 1024}, {"height": 128, "width": 128}
SUBJECTS = {
    "flux": Subject(
        pipeline="FluxPipeline",
        transformer="FluxTransformer2DModel",
        reduced={
            **SMALL,
            "attention_head_dim": 32,
            "num_single_layers": 4,
            "joint_attention_dim": 32,
            "pooled_projection_dim": 32,
            "axes_dims_rope": (8, 12, 12),
            "guidance_embeds": True,
        },
        real={"guidance_embeds": True},
        absent=("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"),
        call={**SQUARE, "guidance_scale": 3.5},
        small_call={**SMALL_SQUARE, "guidance_scale": 3.5},
        embeds={"prompt_embeds": (1, 512, "joint_attention_dim"), "pooled_prompt_embeds": (1, "pooled_projection_dim")},
    ),
    "qwen-image": Subject(
        pipeline="QwenImagePipeline",
        transformer="QwenImageTransformer2DModel",
        reduced={
            **SMALL,
            "out_channels": 4,
            "attention_head_dim": 32,
            "joint_attention_dim": 32,
            "axes_dims_rope": (8, 12, 12),
        },
        real={},
        absent=("vae", "text_encoder", "tokenizer"),
        call={**SQUARE, "true_cfg_scale": 4.0},
        small_call={**SMALL_SQUARE, "true_cfg_scale": 4.0},
        embeds={
            "prompt_embeds": (1, 256, "joint_attention_dim"),
            "negative_prompt_embeds": (1, 256, "joint_attention_dim"),
        },
    ),
    "hunyuan-video": Subject(
        pipeline="HunyuanVideoPipeline",
        transformer="HunyuanVideoTransformer3DModel",
        reduced={
            **SMALL,
            "attention_head_dim": 32,
            "num_single_layers": 4,
            "num_refiner_layers": 1,
            "text_embed_dim": 32,
            "pooled_projection_dim": 32,
            "rope_axes_dim": (8, 12, 12),
            "in_channels": 4,
            "out_channels": 4,
        },
        real={},
        absent=("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"),
        call={"height": 544, "width": 960, "num_frames": 33},
        small_call={**SMALL_SQUARE, "num_frames": 5},
        embeds={
            "prompt_embeds": (1, 256, "text_embed_dim"),
            "pooled_prompt_embeds": (1, "pooled_projection_dim"),
            "prompt_attention_mask": (1, 256),
        },
    ),
}


def pipeline_of(subject: Subject, gpu: bool) -> tuple[Any, dict[str, Any]]:
    """The pipeline with random weights, and the arguments of its call."""
    device, dtype = torch.device("cuda" if gpu else "cpu"), torch.bfloat16 if gpu else torch.float32
    torch.set_default_dtype(dtype)
    with device:
        transformer = getattr(diffusers, subject.transformer)(**(subject.real if gpu else subject.reduced)).eval()
    torch.set_default_dtype(torch.float32)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        **FLOW if subject.pipeline != "HunyuanVideoPipeline" else {"shift": 7.0}
    )
    pipeline = getattr(diffusers, subject.pipeline)(
        transformer=transformer, scheduler=scheduler, **dict.fromkeys(subject.absent)
    )
    pipeline.set_progress_bar_config(disable=True)
    embeds = {}
    for name, shape in subject.embeds.items():
        sizes = [transformer.config[size] if isinstance(size, str) else size for size in shape]
        embeds[name] = (
            torch.ones(sizes, device=device, dtype=dtype)
            if "mask" in name
            else torch.randn(sizes, device=device, dtype=dtype)
        )
    return pipeline, {**(subject.call if gpu else subject.small_call), **embeds, "output_type": "latent"}


def recipes(pipeline: Any, latents_shape: tuple[int, ...]) -> dict[str, Recipe]:
    """Recipes of the full program and of the budgets, from the scheduler as the pipeline prepared it."""
    table = lower(pipeline.scheduler)
    programs = {"full": program_from_table(table)}
    programs |= {
        str(budget): extrapolated_program(table, uniform_schedule(budget, STEPS), order=1) for budget in BUDGETS
    }
    zeros = "sha256:" + "0" * 64
    scheduler, transformer = type(pipeline.scheduler).__name__, type(pipeline.transformer).__name__
    return {
        budget: Recipe(
            artifact=zeros,
            budget=budget,
            program=program,
            blocks=0,
            features=0,
            latents_shape=latents_shape,
            sampler=schema.Sampler(
                scheduler=scheduler, config=plain_options(pipeline.scheduler), num_inference_steps=STEPS
            ),
            model=schema.Model(
                name="random",
                pipeline=type(pipeline).__name__,
                transformer=transformer,
                config_digest=zeros,
                weights_digest=zeros,
            ),
            guidance=schema.Guidance(kind="none", scale=1.0, minimum=1.0, maximum=1.0),
            initial_scale=table.initial_scale,
        )
        for budget, program in programs.items()
    }


def seconds(pipeline: Any, arguments: dict[str, Any], steps: int) -> float:
    start = time.perf_counter()
    pipeline(num_inference_steps=steps, generator=torch.Generator().manual_seed(0), **arguments)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", choices=SUBJECTS, default="flux")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    gpu = torch.cuda.is_available()
    pipeline, arguments = pipeline_of(SUBJECTS[options.model], gpu)
    latents = pipeline(num_inference_steps=STEPS, **arguments)[0]
    schedulers = {
        name: OTCacheScheduler(recipe=recipe.model_dump(mode="json"))
        for name, recipe in recipes(pipeline, tuple(latents.shape[1:])).items()
    }
    times: dict[str, list[float]] = {name: [] for name in schedulers}
    for _ in range(options.rounds):
        for name, scheduler in schedulers.items():
            pipeline.scheduler = scheduler
            times[name].append(seconds(pipeline, arguments, STEPS if name == "full" else int(name)))
    medians = {name: statistics.median(values) for name, values in times.items()}
    found = {
        "model": options.model,
        "class": SUBJECTS[options.model].transformer,
        "size": "real architecture, random bfloat16 weights"
        if gpu
        else "reduced size on the CPU: no evidence for large models",
        "device": torch.cuda.get_device_name() if gpu else "CPU",
        "seconds": {name: round(value, 4) for name, value in medians.items()},
        "speed_up": {name: round(medians["full"] / medians[name], 3) for name in map(str, BUDGETS)},
        "of_steps_over_budget": {str(b): round(medians["full"] / medians[str(b)] / (STEPS / b), 4) for b in BUDGETS},
        "target": TARGET,
    }
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
