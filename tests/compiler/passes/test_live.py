"""A pipeline in memory is compiled as its folder would be; it is named by its weights, and left as it was."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

import otcache.compiler
from otcache.compiler.hosts import OTCacheScheduler
from otcache.compiler.models.digests import denoiser_digest, weights_digest
from otcache.compiler.options import CompileOptions
from otcache.compiler.passes.live import _name_of
from otcache.compiler.workspace.progress import Reporter
from otcache.runtime import Sampler
from otcache.runtime.artifact.reader import Artifact
from otcache.schemas.errors import ModelError, UsageError

PROMPTS = [f"a {colour} {shape} on black" for colour in ("red", "blue") for shape in ("ring", "star")]
SMALL = dict(
    budgets=[3, 2, 2],
    prompts=PROMPTS,
    num_inference_steps=6,
    trials=1,
    payload="output",
    calibration_prompts=2,
    evaluation_prompts=1,
)


@pytest.fixture
def pipeline(tiny_flux_folder):
    found = DiffusionPipeline.from_pretrained(tiny_flux_folder)
    found.set_progress_bar_config(disable=True)
    return found


class Passes(Reporter):
    """Keeps the names of the passes, and whether they told how far they were."""

    def __init__(self):
        self.names, self.closed = [], False

    def on(self, name, description):
        self.names.append(name)
        return super().on(name, description)

    def close(self):
        self.closed = True


@pytest.fixture(scope="module")
def artifact(tiny_flux_folder, workspace, tmp_path_factory):
    """The artifact, the passes that were reported, and the pipeline with its state from before."""
    pipeline = DiffusionPipeline.from_pretrained(tiny_flux_folder)
    pipeline.set_progress_bar_config(disable=True, desc="mine")
    pipeline.vae.train()
    pipeline.transformer.requires_grad_(True)
    scheduler, digest, passes = pipeline.scheduler, weights_digest(pipeline), Passes()
    folder = otcache.compiler.compile(
        pipeline, **SMALL, output=tmp_path_factory.mktemp("live") / "artifact", workspace=workspace, progress=passes
    )
    assert pipeline.scheduler is scheduler and not hasattr(scheduler, "num_inference_steps"), "never asked for times"
    assert pipeline._progress_bar_config == {"disable": True, "desc": "mine"}
    assert pipeline.vae.training and pipeline.vae.decoder.training and not pipeline.transformer.training
    assert all(tensor.requires_grad for tensor in pipeline.transformer.parameters())
    assert weights_digest(pipeline) == digest
    assert passes.closed
    return folder, passes.names


def test_it_is_a_whole_artifact_of_the_live_weights(artifact, pipeline):
    folder, passes = artifact
    opened = Artifact.open(folder)
    opened.verify()
    manifest = opened.manifest
    assert manifest.budgets == ("2", "3", "full") and manifest.model.name == "tiny-flux"
    assert manifest.model.weights_digest == weights_digest(pipeline)
    assert manifest.model.denoiser_digest == denoiser_digest(pipeline.transformer)
    assert {"load", "capture", "anchor", "export", "emit"} <= set(passes)


@pytest.mark.parametrize("budget", ["2", "3"])
def test_the_scheduler_draws_what_the_runtime_serves(artifact, pipeline, budget):
    """The whole way round: compiled from a pipeline, and run in it and by ONNX Runtime."""
    folder, _ = artifact
    pipeline.scheduler = OTCacheScheduler.from_artifact(folder, budget, pipeline=pipeline)
    call = dict(
        height=16, width=16, max_sequence_length=12, true_cfg_scale=4.0, negative_prompt="", output_type="latent"
    )
    prompts = ["a blue ring on black", "a red star on black"]
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    found = pipeline(
        prompts, num_inference_steps=int(budget), generator=generators, **{**call, "negative_prompt": [""] * 2}
    )
    with Sampler.load(folder, threads=1) as sampler:
        expected = sampler.sample(sampler.encode(prompts), budget=budget, seed=[5, 6])
    assert np.linalg.norm(found.images.numpy() - expected) / np.linalg.norm(expected) < 3e-6


def test_every_option_is_taken(pipeline, tmp_path):
    """Names of all fields reach CompileOptions: a value that it refuses is refused."""
    refused = {
        "budgets": [0],
        "num_inference_steps": 0,
        "guidance_scale": -1,
        "prompts": ["one"],
        "height": 1,
        "width": 1,
        "num_frames": 0,
        "reference_budget": 0,
        "anchor_budget": 0,
        "trials": -2,
        "calibration_prompts": 0,
        "evaluation_prompts": 0,
        "revision": "main",
        "variant": "fp16",
        "trust_remote_code": True,
        "lora": tmp_path,
        "device": "cpu",
        "precision": "bfloat16",
        "offload": "model",
        "micro_batch": -1,
        "sizes": "one",
        "frame_counts": "one",
        "text_lengths": "one",
        "threads": 0,
    }
    for name, value in refused.items():
        with pytest.raises(UsageError, match=f"{name}|{name.replace('_', '-')}"):
            otcache.compiler.compile(pipeline, **{**SMALL, name: value}, output=tmp_path / "out", progress=False)
    with pytest.raises(UsageError, match="colour is no option of compile: expected some of anchor_budget, "):
        otcache.compiler.compile(pipeline, **SMALL, colour="red")
    with pytest.raises(UsageError, match="prompts is the text 'a red ring'"):
        otcache.compiler.compile(pipeline, **{**SMALL, "prompts": "a red ring"})
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    with pytest.raises(UsageError, match="replace it with --force"):
        otcache.compiler.compile(pipeline, **SMALL, output=str(tmp_path / "taken"), progress=False)
    with pytest.raises(UsageError, match="--target is 'psnr': expected conditions such as psnr>=35"):
        otcache.compiler.compile(pipeline, **SMALL, targets="psnr", output=tmp_path / "out", progress=False)
    others = {
        "targets",
        "model",
        "output",
        "negative_prompt",
        "max_sequence_length",
        "dtype",
        "objective",
        "payload",
        "edge_costs",
        "seed",
        "workspace",
        "force",
        "engines",
        "effort",
        "search_size",
        "bench",
    }
    assert set(refused) | others >= {field.name for field in dataclasses.fields(CompileOptions)}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["taken"]


def test_pipelines_that_cannot_be_compiled_as_they_are(pipeline, artifact):
    def refused(message):
        with pytest.raises(ModelError, match=message):
            otcache.compiler.compile(pipeline, **SMALL, progress=False)

    own = pipeline.scheduler
    pipeline.scheduler = OTCacheScheduler.from_artifact(artifact[0], 2)
    refused("FluxPipeline runs a compiled program already: set the scheduler from before")
    pipeline.scheduler = own
    model, pipeline.transformer = pipeline.transformer, torch.compile(pipeline.transformer)
    refused("model made by torch.compile: expected the model itself, transformer._orig_mod")
    pipeline.transformer = model
    from peft import LoraConfig

    model.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), "style")
    refused("has LoRA style on its transformer: .*: call fuse_lora and unload_lora_weights first")


def test_names(pipeline, tiny_flux_folder):
    assert _name_of(pipeline) == "tiny-flux"
    assert _name_of(type(pipeline)(**pipeline.components)) == "FluxPipeline"


def test_the_package_alone_loads_nothing():
    code = "import otcache.compiler, sys; assert 'torch' not in sys.modules and 'optuna' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="has no attribute 'compiled'"):
        otcache.compiler.compiled  # noqa: B018
