"""The recorded interface and trajectory reproduce the pipeline; the denoiser is the pipeline's own model output."""

from __future__ import annotations

import pytest
import torch

from otcache.compiler.models.load import load_model
from otcache.compiler.passes.capture import calibration_scales
from otcache.compiler.pipelines.call import call_options
from otcache.compiler.pipelines.denoiser import denoiser_of
from otcache.compiler.pipelines.full_run import capture
from otcache.compiler.pipelines.guidance import find_guidance
from otcache.compiler.pipelines.probe import probe
from otcache.schemas.errors import ModelError


@pytest.fixture(scope="module")
def captured(tiny_flux_folder):
    model = load_model(str(tiny_flux_folder))
    options = call_options(model.pipeline, num_inference_steps=6, height=16, width=16, max_sequence_length=12)
    interface = probe(model.pipeline, options, 4.0, model.prompts)
    trajectory = capture(model.pipeline, interface, options, model.prompts[:4], [0, 1, 2, 3], [4.0] * 4)
    return model, options, interface, trajectory


def test_interface_is_found(captured):
    _, options, interface, _ = captured
    assert (options.height, options.max_sequence_length, options.guidance_argument) == (16, 12, "true_cfg_scale")
    assert interface.latents_input == "hidden_states"
    assert interface.timestep_input == "timestep"
    assert interface.timestep_scale == pytest.approx(1e-3)
    assert set(interface.conditioning) == {"encoder_hidden_states", "pooled_projections"}
    assert {"img_ids", "txt_ids"} <= set(interface.constants)
    assert interface.guided and interface.positive_first and not interface.stacked
    assert interface.noise_shape == (4, 8, 8) and interface.latents_shape == (16, 16)


def test_noise_layout_is_the_pipelines(captured):
    _, _, interface, trajectory = captured
    noise = torch.randn(1, *interface.noise_shape, generator=torch.Generator().manual_seed(2))
    latents = noise.view(1, *interface.noise_split).permute(0, *[a + 1 for a in interface.noise_permutation])
    assert torch.equal(latents.reshape(1, *interface.latents_shape)[0], trajectory.latents[0, 2])


def test_trajectory_ends_in_the_pipelines_latents(captured):
    model, options, _, trajectory = captured
    generator = [torch.Generator().manual_seed(1)]
    with torch.no_grad():
        expected = model.pipeline([model.prompts[1]], generator=generator, **options.arguments(4.0, 1)).images
    assert torch.allclose(trajectory.latents[-1, 1], expected[0], atol=1e-5)


def test_denoiser_reproduces_recorded_outputs(captured):
    model, _, interface, trajectory = captured
    denoiser = denoiser_of(model.transformer, interface, trajectory)
    for step in (0, 3, 5):
        found = denoiser(trajectory.latents[step], trajectory.timesteps[step])
        assert torch.allclose(found, trajectory.outputs[step], atol=2e-5)


def test_every_fourth_sample_is_guided_beyond_the_range():
    assert calibration_scales(4.0, 4.0, 5, 1.25) == [4.0, 4.0, 4.0, 5.0, 4.0]
    assert calibration_scales(2.0, 6.0, 8, 1.5) == [2.0, 4.0, 6.0, 3.0, 4.0, 6.0, 2.0, 6.0]
    assert calibration_scales(4.0, 4.0, 4) == [4.0] * 4


def test_guidance_may_differ_between_samples(captured):
    model, options, interface, _ = captured
    scales = calibration_scales(2.0, 6.0, 3)
    assert scales == [2.0, 4.0, 6.0]
    trajectory = capture(model.pipeline, interface, options, model.prompts[:3], [5, 6, 7], scales)
    denoiser = denoiser_of(model.transformer, interface, trajectory)
    found = denoiser(trajectory.latents[2], trajectory.timesteps[2])
    assert torch.allclose(found, trajectory.outputs[2], atol=2e-5)


@pytest.mark.parametrize("positive_first", [True, False])
@pytest.mark.parametrize("keep_norm", [True, False])
def test_guidance_is_told_apart(positive_first, keep_norm):
    positive, negative = torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(0))
    guided = negative + 4.0 * (positive - negative)
    if keep_norm:
        guided = guided * torch.norm(positive, dim=-1, keepdim=True) / torch.norm(guided, dim=-1, keepdim=True)
    outputs = [positive, negative] if positive_first else [negative, positive]
    assert find_guidance(outputs, guided, 4.0, "Pipeline", exact=True) == (True, positive_first, keep_norm, 1.0)
    assert find_guidance(outputs, -guided, 4.0, "Pipeline", exact=True) == (True, positive_first, keep_norm, -1.0)
    with pytest.raises(ModelError, match=r"Pipeline combines its branches with weights .*: expected 3\.0"):
        find_guidance(outputs, guided, 3.0, "Pipeline", exact=True)


def test_rows_are_the_same_samples_everywhere(captured):
    _, _, _, trajectory = captured
    part = trajectory.rows(slice(1, 3))
    assert part.count == 2 and part.timesteps == trajectory.timesteps
    assert torch.equal(part.latents, trajectory.latents[:, 1:3]) and torch.equal(
        part.outputs, trajectory.outputs[:, 1:3]
    )
    for name, value in trajectory.conditioning.items():
        assert torch.equal(part.conditioning[name], value[:, 1:3])
