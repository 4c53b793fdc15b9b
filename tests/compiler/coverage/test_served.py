"""The paper's other models from a diffusers folder to pictures and videos, and a pipeline whose prompts `otc encode`
turns into tensors.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from command import otc
from model_zoo.pipelines import CASES
from PIL import Image

from otcache.compiler.models.load import load_model
from otcache.compiler.pipelines.call import call_options
from otcache.runtime import Sampler

SMALL = (
    "--budgets",
    "2",
    "--num-inference-steps",
    "5",
    "--calibration-prompts",
    "2",
    "--evaluation-prompts",
    "2",
    "--trials",
    "2",
    "--no-bench",
)


def compiled(name, folder, workspace):
    """A saved pipeline and its artifact."""
    case = CASES[name]
    model, artifact = folder / "model", folder / "artifact"
    case.pipeline().save_pretrained(model)
    (model / "prompts.txt").write_text("\n".join(case.prompts) + "\n")
    sizes = [f"--{key.replace('_', '-')}={value}" for key, value in case.call.items()]
    result = otc("compile", str(model), *SMALL, *sizes, "-o", str(artifact), workspace=workspace)
    assert result.exit_code == 0, result.output
    return model, artifact


def pipelines_own(model, manifest, prompts, seeds):
    """What the pipeline draws, float32 (n, [frames,] height, width, 3)."""
    pipeline, conditions = load_model(str(model)).pipeline, manifest.conditions
    options = call_options(
        pipeline,
        num_inference_steps=5,
        height=conditions.height,
        width=conditions.width,
        num_frames=conditions.num_frames,
        max_sequence_length=conditions.max_sequence_length,
    )
    arguments = {**options.arguments(manifest.guidance.scale, len(prompts)), "output_type": "np"}
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    with torch.no_grad():
        return np.asarray(pipeline(prompts, generator=generators, **arguments)[0])


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "shape", "suffix"),
    [("QwenImagePipeline", (32, 32, 3), "png"), ("HunyuanVideoPipeline", (5, 32, 32, 3), "gif")],
)
def test_budget_full_is_the_pipelines_own(name, shape, suffix, workspace, tmp_path):
    model, artifact = compiled(name, tmp_path, workspace)
    prompts = ["a red ring on blue", "a large green star on a black background"]
    with Sampler.load(artifact) as sampler:
        assert sampler.manifest.golden is not None
        found = sampler(prompts, budget="full", seed=[3, 4])
        expected = pipelines_own(model, sampler.manifest, prompts, [3, 4])
    assert found.shape == expected.shape == (2, *shape)
    assert np.abs(found - expected).max() < 1e-4 < expected.std()
    assert otc("verify", str(artifact), "--level", "golden").exit_code == 0
    out = tmp_path / f"out.{suffix}"
    result = otc("run", str(artifact), "--budget", "2", "--prompt", prompts[0], "-o", str(out))
    assert result.exit_code == 0, result.output
    with Image.open(out) as image:
        assert image.size == (32, 32) and getattr(image, "n_frames", 1) == (5 if suffix == "gif" else 1)


@pytest.mark.long
@pytest.mark.parametrize("name", ["ChromaPipeline", "ZImagePipeline"])
def test_a_pipeline_without_text_export_takes_what_encode_makes(name, workspace, tmp_path):
    model, artifact = compiled(name, tmp_path, workspace)
    prompts = ["a red ring on blue", "a blue cross on yellow"]
    conditioning, out = tmp_path / "c.safetensors", tmp_path / "out.png"
    source = [part for prompt in prompts for part in ("--prompt", prompt)]
    encoded = otc("encode", str(model), "--for", str(artifact), *source, "-o", str(conditioning))
    assert encoded.exit_code == 0, encoded.output
    refused = otc("run", str(artifact), "--budget", "2", "--prompt", prompts[0], "-o", str(out))
    assert refused.exit_code == 5 and "text encoder" in refused.stderr
    line = ("--budget", "full", "--conditioning", str(conditioning), "--seed", "3", "--separate", "-o", str(out))
    result = otc("run", str(artifact), *line)
    assert result.exit_code == 0, result.output
    with Sampler.load(artifact) as sampler:
        assert sampler.manifest.golden is None and not sampler.manifest.tokenizers
        expected = pipelines_own(model, sampler.manifest, prompts[:1], [3])
    with Image.open(tmp_path / "out-1.png") as image:
        difference = np.asarray(image, np.float64) / 255 - expected[0]
    assert np.abs(difference).max() < 0.004
