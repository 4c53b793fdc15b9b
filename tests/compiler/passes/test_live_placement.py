"""A pipeline in memory is compiled where and as it is: offloaded, in half precision, with a quantised model."""

from __future__ import annotations

import accelerate
import pytest
import torch
from diffusers import DiffusionPipeline
from torch import nn

import otcache.compiler
from otcache.compiler.models.digests import denoiser_digest
from otcache.compiler.models.offloading import hooks_by_weight
from otcache.compiler.pipelines.placement import placement_of
from otcache.runtime.artifact.reader import Artifact
from otcache.schemas.errors import ModelError, UsageError

SMALL = dict(
    budgets=[2],
    prompts=["a red ring on black", "a blue star on black", "a red cross on black"],
    num_inference_steps=5,
    trials=0,
    payload="output",
    calibration_prompts=2,
    evaluation_prompts=1,
    micro_batch=2,
    threads=1,
    progress=False,
)
CPU = torch.device("cpu")


@pytest.fixture
def pipeline(tiny_flux_folder):
    return DiffusionPipeline.from_pretrained(tiny_flux_folder)


def coefficients(manifest):
    """Of all programs, schedules among them."""
    steps = [(each.budget, step) for each in manifest.programs for step in each.program.steps]
    return {(budget, step.step_index): [step.latent_coef, *step.output_coefs] for budget, step in steps}


def run(pipeline):
    generator = torch.Generator().manual_seed(3)
    call = dict(height=16, width=16, max_sequence_length=12, num_inference_steps=2, output_type="latent")
    return pipeline("a red ring", generator=generator, **call).images


def offload_model(pipeline):
    pipeline.enable_model_cpu_offload(device="cpu")


def offload_sequentially(pipeline):
    accelerate.cpu_offload(pipeline.transformer, execution_device=CPU)  # of CLIP it fails where both devices are one


def offload_groups(pipeline):
    pipeline.enable_group_offload(onload_device=CPU, offload_device=CPU, offload_type="leaf_level")


@pytest.fixture(scope="module")
def expected(tiny_flux_folder, tmp_path_factory):
    """The manifest of the pipeline without hooks, and its workspace."""
    folder = tmp_path_factory.mktemp("plain")
    pipeline = DiffusionPipeline.from_pretrained(tiny_flux_folder)
    made = otcache.compiler.compile(
        pipeline, **SMALL, engines="none", output=folder / "artifact", workspace=folder / "workspace"
    )
    return Artifact.open(made).manifest


@pytest.mark.parametrize(
    ("offload", "kind", "hook"),
    [
        (offload_model, "model", "CpuOffload"),
        (offload_sequentially, "group", "AlignDevicesHook"),
        (offload_groups, "group", "GroupOffloadingHook"),
    ],
)
def test_an_offloaded_pipeline_gives_the_same_programs_and_stays_offloaded(
    pipeline, expected, tmp_path, offload, kind, hook
):
    before = run(pipeline)
    offload(pipeline)
    assert placement_of(pipeline, pipeline.transformer).offload == kind
    pipeline.transformer.requires_grad_(True)
    made = otcache.compiler.compile(
        pipeline, **SMALL, engines="none", output=tmp_path / "artifact", workspace=tmp_path / "workspace"
    )
    manifest = Artifact.open(made).manifest
    found = coefficients(manifest)
    assert found == {key: pytest.approx(value, rel=1e-4) for key, value in coefficients(expected).items()}
    assert manifest.model.denoiser_digest == expected.model.denoiser_digest
    assert set(hooks_by_weight(pipeline.transformer).values()) == {hook}
    assert all(each.requires_grad for each in pipeline.transformer.parameters())
    torch.testing.assert_close(run(pipeline), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("offload", [offload_model, offload_groups])
def test_engines_of_an_offloaded_pipeline_are_exported_with_its_weights_in_place(pipeline, tmp_path, offload):
    with torch.no_grad():
        for value in pipeline.transformer.parameters():
            value.mul_(1.125)  # no longer what its folder holds
    before, digest = run(pipeline), denoiser_digest(pipeline.transformer)
    offload(pipeline)
    made = otcache.compiler.compile(pipeline, **SMALL, output=tmp_path / "artifact", workspace=tmp_path / "workspace")
    artifact = Artifact.open(made)
    artifact.verify()
    assert artifact.manifest.stages and artifact.manifest.model.denoiser_digest == digest
    assert hooks_by_weight(pipeline.transformer)
    torch.testing.assert_close(run(pipeline), before, rtol=1e-4, atol=1e-4)


def test_a_pipeline_in_half_precision_with_engines(pipeline, tmp_path):
    pipeline.to(torch.bfloat16)
    tables = {name: value.dtype for name, value in pipeline.transformer.named_buffers()}
    before = run(pipeline)
    made = otcache.compiler.compile(pipeline, **SMALL, output=tmp_path / "artifact", workspace=tmp_path / "workspace")
    manifest = Artifact.open(made).manifest
    assert manifest.producer["precision"] == "bfloat16" and manifest.stages
    assert {each.dtype for each in pipeline.transformer.parameters()} == {torch.bfloat16}
    assert {name: value.dtype for name, value in pipeline.transformer.named_buffers()} == tables
    torch.testing.assert_close(run(pipeline), before, rtol=1e-4, atol=1e-4)


def test_residuals_of_an_offloaded_pipeline_are_refused_before_it_runs(pipeline, tmp_path):
    offload_groups(pipeline)
    with pytest.raises(
        UsageError, match="--payload residual runs the model in parts, and FluxTransformer2DModel is off"
    ):
        otcache.compiler.compile(
            pipeline, **{**SMALL, "payload": "residual"}, engines="none", output=tmp_path / "a", workspace=tmp_path
        )
    assert [path.name for path in tmp_path.iterdir()] == []


def quantise_dynamically(transformer: nn.Module) -> None:
    quantization = pytest.importorskip("torchao.quantization", reason="pip install --no-deps torchao")
    quantization.quantize_(transformer, quantization.Int8DynamicActivationInt8WeightConfig())


def test_a_quantised_model_is_calibrated_without_engines(pipeline, tmp_path):
    plain = denoiser_digest(pipeline.transformer)
    quantise_dynamically(pipeline.transformer)
    digest, before = denoiser_digest(pipeline.transformer), run(pipeline)
    assert digest != plain and digest == denoiser_digest(pipeline.transformer)
    with pytest.raises(ModelError, match=r"is quantised .*: load it without quantization, or .* --engines none"):
        otcache.compiler.compile(pipeline, **SMALL, output=tmp_path / "a", workspace=tmp_path / "workspace")
    assert not (tmp_path / "workspace").exists()
    made = otcache.compiler.compile(
        pipeline, **SMALL, engines="none", output=tmp_path / "a", workspace=tmp_path / "workspace"
    )
    assert Artifact.open(made).manifest.model.denoiser_digest == digest
    torch.testing.assert_close(run(pipeline), before, rtol=1e-4, atol=1e-4)
