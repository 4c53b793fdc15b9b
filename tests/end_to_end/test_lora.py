"""`otc compile --lora` through the command line: what is served is the pipeline with that LoRA loaded."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from command import otc

from otcache.compiler.models.load import load_model
from otcache.compiler.pipelines.call import call_options
from otcache.runtime.artifact.reader import Artifact

SMALL = (
    "--budgets",
    "2",
    "--num-inference-steps",
    "4",
    "--calibration-prompts",
    "2",
    "--evaluation-prompts",
    "1",
    "--trials",
    "2",
    "--no-bench",
)
PROMPT = "a red ring on black"
SERVE = f"""
import sys
for module in ("torch", "diffusers", "transformers", "peft"):
    sys.modules[module] = None  # importing it raises
import numpy as np
from otcache.runtime import Sampler
with Sampler.load(sys.argv[1]) as sampler:
    np.save(sys.argv[2], sampler.sample(sampler.encode({PROMPT!r}), budget="full", seed=3))
"""


@pytest.fixture(scope="module")
def with_lora(tiny_flux_folder, tiny_flux_lora, tmp_path_factory):
    folder = tmp_path_factory.mktemp("with-lora")
    result = otc(
        "compile",
        str(tiny_flux_folder),
        *SMALL,
        "--lora",
        str(tiny_flux_lora),
        "-o",
        str(folder / "artifact"),
        workspace=folder / "work",
    )
    assert result.exit_code == 0, result.output
    return folder / "artifact"


def latents_of(pipeline):
    options = call_options(pipeline, num_inference_steps=4, height=16, width=16, max_sequence_length=12)
    arguments = {**options.arguments(4.0, 1), "output_type": "latent"}
    with torch.no_grad():
        return pipeline([PROMPT], generator=torch.Generator().manual_seed(3), **arguments).images.numpy()


@pytest.mark.slow
def test_served_latents_are_those_of_the_pipeline_with_the_lora(with_lora, tiny_flux_folder, tiny_flux_lora, tmp_path):
    target = tmp_path / "latents.npy"
    subprocess.run([sys.executable, "-c", SERVE, str(with_lora), str(target)], check=True)
    pipeline = load_model(str(tiny_flux_folder)).pipeline
    without = latents_of(pipeline)
    pipeline.load_lora_weights(tiny_flux_lora)
    expected, served = latents_of(pipeline), np.load(target)
    size = np.linalg.norm(expected)
    assert np.linalg.norm(served - expected) / size < 1e-3
    assert np.linalg.norm(without - expected) / size > 1e-2, "the LoRA changes nothing that could be seen"


def test_the_digests_tell(with_lora, tiny_flux_folder):
    fused, plain = Artifact.open(with_lora).manifest.model, load_model(str(tiny_flux_folder))
    assert fused.config_digest == plain.config_digest
    assert fused.weights_digest != plain.weights_digest and fused.denoiser_digest != plain.denoiser_digest
