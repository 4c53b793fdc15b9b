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

SIZES = ((16, 16), (16, 24), (24, 24))


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


@pytest.fixture(scope="module", params=["listed", "range"])
def artifact(request, shifted, tiny_flux_folder, workspace, tmp_path_factory):
    """`listed`: each size has programs of its own; `range`: all have the same."""
    folder = tmp_path_factory.mktemp("sized") / request.param
    model, sizes = (shifted, "16x16,16x24") if request.param == "listed" else (tiny_flux_folder, "16x16:32x32:8")
    result = otc("compile", str(model), *COMPILE, "--sizes", sizes, "-o", str(folder), workspace=workspace)
    assert result.exit_code == 0, result.output
    return model, folder


@pytest.mark.slow
@pytest.mark.parametrize("budget", ["full", "4"])
def test_every_size_is_served_as_by_the_runtime(artifact, budget):
    model, folder = artifact
    manifest, listed = read_manifest(folder)[0], artifact[0].name == "model"
    if listed:
        programs = [manifest.program(budget), *(each for s in manifest.shapes.sizes for each in s.programs)]
        assert len({each.program for each in programs if each.budget == budget}) == 2, "another program at another size"
    pipeline = DiffusionPipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    program, length = manifest.program(budget).program, manifest.conditions.max_sequence_length
    if program.payload == "residual":
        apply_residual_cache(pipeline, folder, budget)
    else:
        pipeline.scheduler = OTCacheScheduler.from_artifact(folder, budget, pipeline=pipeline)

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

    with Sampler.load(folder) as sampler:
        for height, width in SIZES[: 2 if listed else 3]:
            conditioning = sampler.encode("a red ring on black")
            expected = sampler.sample(conditioning, budget=budget, seed=3, height=height, width=width)
            found = draw(height, width)
            assert found.shape == expected.shape
            assert np.linalg.norm(found - expected) / np.linalg.norm(expected) < 1e-3
    with pytest.raises(RequestError, match=r"latents are \(1, 64, 16\): expected"):
        draw(32, 32) if listed else draw(8, 128)


def test_a_program_of_another_size_is_not_run_by_a_loop_that_does_not_say_its_size(artifact):
    model, folder = artifact
    if model.name != "model":
        return
    scheduler = OTCacheScheduler.from_artifact(folder, "full")
    scheduler.set_timesteps(8)
    latents = torch.zeros(1, 24, 16)
    with pytest.raises(RequestError, match=r"latents are \(1, 24, 16\): expected \(n, 16, 16\) or \(n, 24, 16\)"):
        scheduler.step(latents, scheduler.timesteps[0], latents)
