"""An artifact of several sizes in the drop-in, from the command line to the runtime's latents at each size."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from command import COMPILE, otc
from diffusers import DiffusionPipeline

from otcache.compiler.hosts import OTCacheScheduler, apply_residual_cache
from otcache.runtime import Sampler
from otcache.schemas.errors import RequestError
from otcache.schemas.manifest_file import read_manifest


@pytest.fixture(scope="module")
def shifted(tiny_flux_folder, tmp_path_factory):
    """The tiny pipeline with a shift that follows the size, as FLUX has it."""
    folder = tmp_path_factory.mktemp("shifted") / "model"
    shutil.copytree(tiny_flux_folder, folder)
    path = folder / "scheduler/scheduler_config.json"
    config = json.loads(path.read_text())
    config |= {"use_dynamic_shifting": True, "base_image_seq_len": 4, "max_image_seq_len": 9}
    path.write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def artifact(shifted, workspace, tmp_path_factory):
    """Of two sizes, each with programs of its own."""
    folder = tmp_path_factory.mktemp("sized") / "artifact"
    result = otc("compile", str(shifted), *COMPILE, "--sizes", "16x16,16x24", "-o", str(folder), workspace=workspace)
    assert result.exit_code == 0, result.output
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("budget", ["full", "4"])
def test_every_size_is_served_as_by_the_runtime(shifted, artifact, budget):
    manifest = read_manifest(artifact).manifest
    programs = [*manifest.programs, *(each for size in manifest.shapes.sizes for each in size.programs)]
    assert len({each.program for each in programs if each.budget == budget}) == 2, "another program at another size"
    pipeline = DiffusionPipeline.from_pretrained(shifted)
    pipeline.set_progress_bar_config(disable=True)
    program, length = manifest.program(budget).program, manifest.conditions.max_sequence_length
    if program.payload == "residual":
        apply_residual_cache(pipeline, artifact, budget)
    else:
        pipeline.scheduler = OTCacheScheduler.from_artifact(artifact, budget, pipeline=pipeline)

    def draw(height, width):
        return pipeline(
            "a red ring on black",
            negative_prompt="",
            true_cfg_scale=4.0,
            height=height,
            width=width,
            max_sequence_length=length,
            num_inference_steps=len(program.steps),
            generator=torch.Generator().manual_seed(3),
            output_type="latent",
        ).images.numpy()

    with Sampler.load(artifact) as sampler:
        conditioning = sampler.encode("a red ring on black")
        for height, width in ((16, 16), (16, 24), (16, 16)):
            expected = sampler.sample(conditioning, budget=budget, seed=3, height=height, width=width)
            found = draw(height, width)
            assert found.shape == expected.shape
            assert np.linalg.norm(found - expected) / np.linalg.norm(expected) < 1e-3
    with pytest.raises(RequestError, match=r"latents are \(1, 64, 16\): expected"):
        draw(32, 32)


@pytest.mark.slow
def test_a_program_of_another_size_is_not_run_by_a_loop_that_does_not_say_its_size(artifact):
    scheduler = OTCacheScheduler.from_artifact(artifact, "full")
    scheduler.set_timesteps(8)
    latents = torch.zeros(1, 24, 16)
    with pytest.raises(RequestError, match=r"latents are \(1, 24, 16\): expected \(n, 16, 16\) or \(n, 24, 16\)"):
        scheduler.step(latents, scheduler.timesteps[0], latents)
