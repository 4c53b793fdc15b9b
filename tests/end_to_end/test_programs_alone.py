"""Programs without engines through the command line, engines that are added later, and schedules of a smaller size."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from command import COMPILE, otc

from otcache.compiler.hosts import OTCacheScheduler
from otcache.runtime import Sampler
from otcache.schemas.manifest_file import read_manifest


@pytest.fixture(scope="module")
def alone(compiled, tiny_flux_folder, workspace, tmp_path_factory):
    """The tiny pipeline's programs of outputs, without engines.

    In the workspace of `compiled`, whose searches cached residuals too: they are not those of this compile.
    """
    assert any(each.program.payload == "residual" for each in read_manifest(compiled).manifest.programs)
    folder = tmp_path_factory.mktemp("alone") / "tiny"
    line = ["compile", str(tiny_flux_folder), *COMPILE, "--engines", "none", "-o", str(folder)]
    result = otc(*line, workspace=workspace)
    assert result.exit_code == 0, result.output
    return folder


def test_it_holds_programs_quality_and_report_alone(alone):
    manifest = read_manifest(alone).manifest
    assert manifest.programs_alone and not manifest.files and not list(alone.rglob("*.onnx"))
    assert (alone / "report.html").is_file()
    entry = manifest.program(4)
    assert entry.quality is not None and entry.baselines and entry.candidates
    assert all(each.program.payload != "residual" for each in manifest.programs)


def test_programs_drop_into_a_pipeline(alone, tiny_flux_folder):
    from diffusers import FluxPipeline

    pipeline = FluxPipeline.from_pretrained(tiny_flux_folder)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = OTCacheScheduler.from_artifact(alone, budget=4, pipeline=pipeline)
    calls = []
    handle = pipeline.transformer.register_forward_hook(lambda *_: calls.append(1))
    pipeline(
        "a red ring on black",
        num_inference_steps=4,
        height=16,
        width=16,
        max_sequence_length=12,
        negative_prompt="",
        true_cfg_scale=4.0,
        generator=[torch.Generator().manual_seed(0)],
        output_type="latent",
    )
    handle.remove()
    assert len(calls) == 2 * 4, "four evaluations of two branches"


def test_engines_are_added_without_calibrating(alone, tiny_flux_folder, workspace, tmp_path):
    folder = tmp_path / "whole"
    line = ["export", str(alone), str(tiny_flux_folder), "-o", str(folder), "--threads", "1", "--json"]
    result = otc(*line, workspace=workspace)
    assert result.exit_code == 0, result.output
    before, after = read_manifest(alone).manifest, read_manifest(folder).manifest
    assert json.loads(result.stdout)["digest"] == after.digest
    assert after.programs == before.programs and after.golden is not None
    assert otc("verify", str(folder), "--level", "golden").exit_code == 0
    with Sampler.load(folder) as sampler:
        assert np.isfinite(sampler("a red ring on black", budget=4, seed=0)).all()
    again = otc("export", str(folder), str(tiny_flux_folder), workspace=workspace)
    assert again.exit_code == 2 and "has engines: give --force" in again.stderr
    assert read_manifest(alone).manifest.programs_alone


def test_another_models_weights_are_refused(alone, tiny_flux_folder, workspace, tmp_path):
    from diffusers import FluxTransformer2DModel

    other = tmp_path / "other"
    shutil.copytree(tiny_flux_folder, other)
    transformer = FluxTransformer2DModel.from_pretrained(other, subfolder="transformer")
    with torch.no_grad():
        transformer.proj_out.weight.mul_(1.5)
    transformer.save_pretrained(other / "transformer")
    result = otc("export", str(alone), str(other), "-o", str(tmp_path / "whole"), workspace=workspace)
    assert result.exit_code == 3 and "weights digest" in result.stderr and "compiled from" in result.stderr
    assert not (tmp_path / "whole").exists()


def test_schedules_of_a_smaller_size(tiny_flux_folder, workspace, tmp_path):
    folder = tmp_path / "small"
    line = ["compile", str(tiny_flux_folder), *COMPILE, "--height", "32", "--width", "32", "--search-size", "16x16"]
    result = otc(*line, "--engines", "none", "-o", str(folder), workspace=workspace)
    assert result.exit_code == 0, result.output
    manifest = read_manifest(folder).manifest
    costs = {cost.name: cost.full_runs for cost in manifest.costs}
    assert manifest.conditions.height == 32 and {"capture", "fit", "anchor at 16x16"} <= set(costs)
    names = {each.name for each in manifest.program(4).candidates}
    assert any(name.startswith("graph") for name in names), "the served size's own graph has a say"
    assert manifest.program(4).quality.psnr_db.mean > manifest.program(2).quality.psnr_db.mean


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--search-size", "16"], "--search-size is '16': expected HEIGHTxWIDTH"),
        (["--search-size", "16x16"], "--search-size is 16x16, the size that is compiled"),
        (["--micro-batch", "0"], "--micro-batch is '0': expected auto"),
        (["--payload", "residual", "--offload", "model"], "--offload model with --payload residual"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(tiny_flux_folder, workspace, tmp_path, options, message):
    line = ["compile", str(tiny_flux_folder), *COMPILE, *options, "--engines", "none", "-o", str(tmp_path / "a")]
    result = otc(*line, workspace=workspace)
    assert result.exit_code == 2 and message in result.stderr and not (tmp_path / "a").exists()
