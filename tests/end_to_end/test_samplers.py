"""Samplers that evaluate the model more often than steps are asked for, repeat times, or are made deterministic by what
the pipeline passes to their step: from a saved folder through the command line to the drop-in.
"""

from __future__ import annotations

import json
import math

import diffusers
import pytest
import torch
from command import otc
from model_zoo.pipelines import CASES
from model_zoo.small import PROMPTS

from otcache.compiler.hosts import OTCacheScheduler
from otcache.schemas.errors import RequestError
from otcache.schemas.manifest_file import read_manifest

STEPS = 7
SAMPLERS = {
    "pndm": ("StableDiffusionPipeline", "PNDMScheduler", {"skip_prk_steps": True}, STEPS + 1),
    "pndm with its Runge-Kutta start": ("StableDiffusionPipeline", "PNDMScheduler", {}, STEPS + 9),
    "kdpm2": ("StableDiffusionPipeline", "KDPM2DiscreteScheduler", {}, 2 * STEPS - 1),
    "flow heun": ("StableDiffusion3Pipeline", "FlowMatchHeunDiscreteScheduler", {}, 2 * STEPS - 1),
    "tcd": ("StableDiffusionPipeline", "TCDScheduler", {}, STEPS),
    "edm": ("StableDiffusionPipeline", "EDMDPMSolverMultistepScheduler", {}, STEPS),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLERS)
def test_saved_sampler_is_compiled_and_dropped_in(name, tmp_path, workspace):
    pipeline_name, scheduler, options, evaluations = SAMPLERS[name]
    pipeline = CASES[pipeline_name].pipeline()
    kept = {} if scheduler.startswith("EDM") else pipeline.scheduler.config
    pipeline.scheduler = getattr(diffusers, scheduler).from_config(kept, **options)
    pipeline.save_pretrained(tmp_path / "model")
    (tmp_path / "model/prompts.txt").write_text("\n".join(PROMPTS))
    arguments = ["--num-inference-steps", str(STEPS), "--height", "16", "--width", "16", "--trials", "3"]
    arguments += ["--calibration-prompts", "4", "--evaluation-prompts", "2", "--threads", "1", "--budgets", "2,5"]
    arguments += ["-o", str(tmp_path / "artifact")]
    arguments += ["--no-bench", "--payload", "output"]  # diffusers' caches know no blocks of a U-Net
    result = otc("compile", str(tmp_path / "model"), *arguments, workspace=workspace)
    assert result.exit_code == 0, result.output
    manifest = read_manifest(tmp_path / "artifact").manifest
    total = manifest.sampler.num_inference_steps
    assert total == evaluations == len(manifest.program("full").program.steps) == manifest.reference.num_inference_steps
    for budget in (2, 5):
        entry = manifest.program(budget)
        assert entry.program.nfe == budget and math.isfinite(entry.quality.psnr_db.mean)
        assert any(baseline.nfe <= budget for baseline in entry.baselines)
    assert (tmp_path / "artifact/report.html").is_file()

    pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "model")
    pipeline.set_progress_bar_config(disable=True)

    def draw(steps):
        return pipeline(
            "a red ring on black",
            negative_prompt="",
            guidance_scale=4.0,
            height=16,
            width=16,
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(1),
            output_type="latent",
        ).images

    expected = draw(STEPS)
    pipeline.scheduler = OTCacheScheduler.from_artifact(tmp_path / "artifact", "full", pipeline=pipeline)
    assert float((draw(evaluations) - expected).norm() / expected.norm()) < 1e-5
    if evaluations != STEPS:
        with pytest.raises(
            RequestError, match=f"num_inference_steps is {STEPS}: expected {evaluations}, the evaluations of"
        ):
            draw(STEPS)
    program = manifest.program(5).program
    pipeline.scheduler = OTCacheScheduler.from_artifact(tmp_path / "artifact", 5, pipeline=pipeline)
    assert float((draw(len(program.steps)) - expected).norm() / expected.norm()) < 0.7


def test_a_dry_run_counts_the_tables_evaluations(tmp_path, workspace):
    pipeline = CASES["StableDiffusionPipeline"].pipeline()
    pipeline.scheduler = diffusers.HeunDiscreteScheduler.from_config(pipeline.scheduler.config)
    pipeline.save_pretrained(tmp_path / "model")
    (tmp_path / "model/prompts.txt").write_text("\n".join(PROMPTS))
    arguments = ["--num-inference-steps", "7", "--budgets", "3", "--calibration-prompts", "2", "--height", "16"]
    arguments += ["--width", "16", "--dry-run", "--json", "-o", str(tmp_path / "artifact")]
    result = otc("compile", str(tmp_path / "model"), *arguments, workspace=workspace)
    assert result.exit_code == 0, result.output
    passes = {entry["name"]: entry for entry in json.loads(result.stdout)["passes"]}
    assert passes["capture"]["evaluations"] == 13 * 2


def test_a_budget_beyond_the_tables_evaluations_is_refused_before_anything_runs(tmp_path, workspace):
    pipeline = CASES["StableDiffusion3Pipeline"].pipeline()
    pipeline.scheduler = diffusers.MiniMaxH3Scheduler()
    pipeline.save_pretrained(tmp_path / "model")
    (tmp_path / "model/prompts.txt").write_text("\n".join(PROMPTS))
    arguments = ["--num-inference-steps", "7", "--budgets", "7", "--height", "16", "--width", "16"]
    result = otc("compile", str(tmp_path / "model"), *arguments, "-o", str(tmp_path / "artifact"), workspace=workspace)
    expected = "--budgets has 7: expected 1 … 6, the model evaluations of MiniMaxH3Scheduler in 7 steps"
    assert result.exit_code == 2 and expected in result.stderr
