"""What people bring to a compile: folders as `save_pretrained` writes them, and what `pipe(prompt)` draws from them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import otc
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler
from model_zoo.pipelines import CASES
from safetensors.torch import load_file, save_file

from otcache.runtime import Sampler
from otcache.runtime.artifact.reader import Artifact

QUICK = (
    *("--budgets", "2", "--num-inference-steps", "4", "--trials", "1", "--threads", "1", "--payload", "output"),
    *("--calibration-prompts", "4", "--evaluation-prompts", "2"),
)
PROMPT = "a red ring on blue"
PROMPTS = "a red ring on blue\na green star\na white cross\na blue ring\na red star\na white ring\n"
EXACT = 1e-4
"""Relative error of latents: the pipeline's arithmetic is done in another order."""


def save(pipeline: Any, folder: Path, prompts: str | None = PROMPTS) -> Path:
    """A folder as people have it."""
    pipeline.save_pretrained(folder)
    if prompts is not None:
        (folder / "prompts.txt").write_text(prompts)
    return folder


def compile_folder(folder: Path, target: Path, *options: str, workspace: Path) -> tuple[Path, str]:
    """The artifact, and what the command said."""
    result = otc("compile", str(folder), *QUICK, *options, "-o", str(target), workspace=workspace)
    assert result.exit_code == 0, result.output
    return target, result.output


def encoded(folder: Path, artifact: Path, prompt: str = PROMPT) -> dict[str, np.ndarray]:
    """What `otc encode` makes of a prompt."""
    file = artifact.with_suffix(".safetensors")
    result = otc("encode", str(folder), "--for", str(artifact), "--prompt", prompt, "-o", str(file), "--force")
    assert result.exit_code == 0, result.output
    return {name: value.numpy() for name, value in load_file(file).items()}


def own_latents(folder: Path, *prompts: Any, without: Sequence[str] = (), **call: Any) -> np.ndarray:
    """What a user's own call ends with: no argument but the prompt, the seed, and `call`.

    without: components that the folder lacks, which diffusers wants to be told.
    """
    pipeline = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32, **dict.fromkeys(without))
    pipeline.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 4, "output_type": "latent", **call}
    return pipeline(*(prompts or (PROMPT,)), generator=torch.Generator().manual_seed(7), **call)[0].numpy()


def distance(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def test_a_call_with_the_prompt_alone(tmp_path, workspace):
    """SDXL takes zeros where it is given no negative prompt, and the size of its U-Net, not that of its VAE."""
    pipeline = CASES["StableDiffusionXLPipeline"].pipeline()
    pipeline.vae.register_to_config(sample_size=64)
    folder = save(pipeline, tmp_path / "model")
    artifact, _ = compile_folder(folder, tmp_path / "artifact", workspace=workspace)
    guidance = Artifact.open(artifact).manifest.guidance
    assert guidance.negative_prompt is None and guidance.negative_zeros
    expected = own_latents(folder, guidance_scale=4.0)
    empty = own_latents(folder, guidance_scale=4.0, negative_prompt="")
    assert distance(empty, expected) > 100 * EXACT, "zeros are no text"
    with Sampler.load(artifact, "onnxruntime", 1) as sampler:
        made = encoded(folder, artifact), sampler.encode([PROMPT]), sampler.encode([PROMPT], negative_prompt="")
        found = [sampler.sample(each, budget="full", seed=[7]) for each in made]
        both = sampler([PROMPT, PROMPT], negative_prompt=None, budget="full", seed=[7, 7])
        assert both.shape[0] == 2 and np.allclose(both[0], both[1], atol=1e-5)
    assert max(distance(found[0], expected), distance(found[1], expected), distance(found[2], empty)) < EXACT


def test_options_that_json_does_not_know(tmp_path, workspace):
    """diffusers writes -Infinity into the config of every DPM-Solver."""
    pipeline = CASES["StableDiffusionPipeline"].pipeline()
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    folder = save(pipeline, tmp_path / "model")
    assert "-Infinity" in (folder / "scheduler" / "scheduler_config.json").read_text()
    artifact, _ = compile_folder(folder, tmp_path / "artifact", workspace=workspace)
    manifest = json.loads((artifact / "manifest.json").read_text(), parse_constant=pytest.fail)
    assert manifest["sampler"]["config"]["lambda_min_clipped"] == {"__float__": "-Infinity"}
    with Sampler.load(artifact, "onnxruntime", 1) as sampler:
        found = sampler.sample(encoded(folder, artifact), budget="full", seed=[7])
    assert distance(found, own_latents(folder, guidance_scale=4.0)) < EXACT


@pytest.mark.parametrize(
    ("name", "options", "call"),
    [
        ("StableDiffusion3Pipeline", ("--guidance-scale", "7"), {}),
        ("PixArtSigmaPipeline", ("--guidance-scale", "4.5"), {"use_resolution_binning": False}),
        (
            "QwenImagePipeline",
            ("--height", "32", "--width", "32", "--max-sequence-length", "12"),
            {"height": 32, "width": 32, "max_sequence_length": 12, "true_cfg_scale": 4.0, "negative_prompt": ""},
        ),
    ],
)
def test_from_the_prompt_on(name, options, call, tmp_path, workspace):
    """The runtime's own text encoder, with no argument but what the user's call has too."""
    folder = save(CASES[name].pipeline(), tmp_path / "model")
    artifact, _ = compile_folder(folder, tmp_path / "artifact", *options, workspace=workspace)
    with Sampler.load(artifact, "onnxruntime", 1) as sampler:
        found = sampler.sample(sampler.encode([PROMPT]), budget="full", seed=[7])
    assert distance(found, own_latents(folder, **call)) < EXACT


def test_stable_diffusion_3_without_t5_takes_what_encode_makes(tmp_path, workspace):
    """As people save it who lack the memory; what has no export is no reason to refuse the model."""
    pipeline = CASES["StableDiffusion3Pipeline"].pipeline()
    t5 = ("text_encoder_3", "tokenizer_3")
    pipeline.register_modules(**dict.fromkeys(t5))
    folder = save(pipeline, tmp_path / "model")
    artifact, said = compile_folder(folder, tmp_path / "artifact", "--guidance-scale", "7", workspace=workspace)
    assert "has no tokenizer_3, text_encoder_3" in " ".join(said.split()) and "`otc encode`" in said
    assert not Artifact.open(artifact).manifest.tokenizers
    with Sampler.load(artifact, "onnxruntime", 1) as sampler:
        found = sampler.sample(encoded(folder, artifact), budget="full", seed=[7])
    assert distance(found, own_latents(folder, without=t5)) < EXACT


def test_wan_cleans_prompts_and_runs_one_branch_at_scale_one(tmp_path, workspace):
    folder, size = (
        save(CASES["WanPipeline"].pipeline(), tmp_path / "model"),
        {"height": 16, "width": 16, "num_frames": 5},
    )
    options = [f"--{name.replace('_', '-')}={value}" for name, value in size.items()]
    artifact, _ = compile_folder(
        folder, tmp_path / "artifact", *options, "--guidance-scale", "1:6", workspace=workspace
    )
    (tokenizer,) = Artifact.open(artifact).manifest.tokenizers
    assert tokenizer.steps[-4:] == ("unescape", "unescape", "collapse", "strip")
    nasty = " a &#114;ed &amp;#114;ing  on\nblue "
    with Sampler.load(artifact, "onnxruntime", 1) as sampler:
        found = {s: sampler.sample(sampler.encode([nasty]), budget="full", seed=[7], guidance_scale=s) for s in (1, 3)}
        clean = sampler.encode(["a red ring on blue"])
        assert all(np.array_equal(value, clean[name]) for name, value in sampler.encode([nasty]).items())
    for scale, latents in found.items():
        assert distance(latents, own_latents(folder, nasty, guidance_scale=float(scale), **size)) < EXACT, scale


@pytest.mark.parametrize("named", [True, False])
def test_ten_classes(named, tmp_path, workspace):
    """Without prompts of its own: its labels, or numbers where it has none, with other seeds where they repeat."""
    pipeline = CASES["DiTPipeline"].pipeline()
    folder = save(pipeline, tmp_path / "model", prompts=None)
    index = json.loads((folder / "model_index.json").read_text())
    labels = {str(number): f"digit {number}, {number}th digit" for number in range(10)} if named else None
    (folder / "model_index.json").write_text(json.dumps({**index, "id2label": labels}))  # as the hub's models have it
    artifact, _ = compile_folder(
        folder, tmp_path / "artifact", "--calibration-prompts", "12", "--guidance-scale", "4", workspace=workspace
    )
    assert Artifact.open(artifact).manifest.conditions.calibration_prompts == 12
    prompts = ["digit 3", "3th digit", "7"] if named else ["3", "3", "7"]
    with Sampler.load(artifact, "onnxruntime", 1) as sampler:
        found = sampler(prompts, budget="full", seed=[7, 8, 9])
    made = DiffusionPipeline.from_pretrained(folder)
    generators = [torch.Generator().manual_seed(seed) for seed in (7, 8, 9)]
    expected = made([3, 3, 7], generator=generators, num_inference_steps=4, guidance_scale=4.0, output_type="np").images
    assert np.abs(found - expected).max() < 1e-3


def test_one_models_results_are_never_anothers(tiny_flux_folder, tmp_path):
    """The transformer is a link, which points at other weights before the second compile."""
    folder, file = tmp_path / "model", "diffusion_pytorch_model.safetensors"
    shutil.copytree(tiny_flux_folder, folder)
    shutil.move(folder / "transformer", tmp_path / "first")
    shutil.copytree(tmp_path / "first", tmp_path / "second")
    weights = load_file(tmp_path / "first" / file)
    save_file({name: value.flip(0) for name, value in weights.items()}, tmp_path / "second" / file, {"format": "pt"})
    call = {"height": 16, "width": 16, "max_sequence_length": 12, "true_cfg_scale": 4.0, "negative_prompt": ""}
    digests = set()
    for place in ("first", "second"):
        (folder / "transformer").unlink(missing_ok=True)
        (folder / "transformer").symlink_to(tmp_path / place)
        artifact, _ = compile_folder(folder, tmp_path / f"artifact-{place}", workspace=tmp_path / "workspace")
        digests.add(Artifact.open(artifact).manifest.model.weights_digest)
        with Sampler.load(artifact, "onnxruntime", 1) as sampler:
            found = sampler.sample(sampler.encode([PROMPT]), budget="full", seed=[7])
        assert distance(found, own_latents(folder, **call)) < EXACT, place
    assert len(digests) == 2


def test_what_a_pipeline_refuses_is_one_line(tmp_path, workspace):
    from diffusers import StableDiffusionImg2ImgPipeline

    pipeline = StableDiffusionImg2ImgPipeline(**CASES["StableDiffusionPipeline"].pipeline().components)
    folder = save(pipeline, tmp_path / "model")
    result = otc("compile", str(folder), *QUICK, "-o", str(tmp_path / "artifact"), workspace=workspace)
    (line,) = [line for line in result.output.splitlines() if line.startswith("Error: ")]
    assert result.exit_code != 0 and "StableDiffusionImg2ImgPipeline, argument image: " in line
    assert "unexpected" not in line and "expected a pipeline that draws without image" in line
