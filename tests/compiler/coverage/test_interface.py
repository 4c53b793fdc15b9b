"""What `probe` finds out about pipelines of all kinds, and what it refuses; nothing is exported, so all of it
is quick.
"""

from __future__ import annotations

import pytest
import torch
from model_zoo.pipelines import CASES, REFUSED

from otcache.compiler.calibration.rollout import roll_out
from otcache.compiler.models.model import transformer_of
from otcache.compiler.pipelines.arguments import Behind, Listed, Output, PerSample
from otcache.compiler.pipelines.call import call_options, prepare_scheduler
from otcache.compiler.pipelines.denoiser import denoiser_of
from otcache.compiler.pipelines.full_run import capture
from otcache.compiler.pipelines.probe import probe
from otcache.compiler.programs.lower import lower
from otcache.compiler.programs.solver_table import program_from_table
from otcache.schemas.errors import ModelError, UsageError


def probed(name, scale=4.0, **options):
    case = {**CASES, **REFUSED}[name]
    pipeline = case.pipeline()
    call = call_options(pipeline, num_inference_steps=4, **{**case.call, **options})
    return pipeline, call, probe(pipeline, call, scale, case.prompts)


@pytest.mark.parametrize("name", CASES)
def test_the_full_program_is_the_pipeline(name):
    pipeline, call, interface = probed(name)
    trajectory = capture(pipeline, interface, call, CASES[name].prompts[1:3], [1, 2], [4.0, 4.0])
    prepare_scheduler(pipeline, call, pipeline.scheduler, 4)
    denoiser = denoiser_of(transformer_of(pipeline, name), interface, trajectory)
    final = roll_out(program_from_table(lower(pipeline.scheduler)), denoiser, trajectory.latents[0])
    assert float((final - trajectory.latents[-1]).norm() / trajectory.latents[-1].norm()) < 1e-5


@pytest.mark.parametrize(
    ("name", "scale", "kind", "stacked"),
    [
        pytest.param("StableDiffusion3Pipeline", 1.0, "none", False, id="none"),
        pytest.param("FluxPipeline", 4.0, "none", False, id="embedded"),
        pytest.param("StableDiffusion3Pipeline", 4.0, "cfg", True, id="one call with both branches"),
        pytest.param("WanPipeline", 4.0, "cfg", False, id="two calls"),
        pytest.param("QwenImagePipeline", 4.0, "cfg_norm", False, id="two calls, the norm kept"),
    ],
)
def test_guidance_in_all_its_forms(name, scale, kind, stacked):
    """What the pipeline hands its scheduler is the denoiser's output: of one branch, or of two combined."""
    pipeline, call, interface = probed(name, scale)
    assert (interface.guidance_kind, interface.stacked, interface.branches) == (
        kind,
        stacked,
        1 if kind == "none" else 2,
    )
    trajectory = capture(pipeline, interface, call, CASES[name].prompts[1:3], [1, 2], [scale] * 2)
    denoiser = denoiser_of(transformer_of(pipeline, name), interface, trajectory)
    found = denoiser(trajectory.latents[1], trajectory.timesteps[1])
    assert float((found - trajectory.outputs[1]).norm() / trajectory.outputs[1].norm()) < 1e-5


def test_text_is_padded_to_one_length_behind_its_mask():
    pipeline, call, interface = probed("QwenImagePipeline", max_sequence_length=16)
    assert interface.text.names == ("encoder_hidden_states",) and interface.text.length == 16
    prompts = ["a red ring on blue", "a large green star on a black background"]
    trajectory = capture(pipeline, interface, call, prompts, [1, 2], [4.0, 4.0])
    hidden, mask = (trajectory.conditioning[key] for key in ("encoder_hidden_states", interface.text.mask))
    assert hidden.shape[:3] == mask.shape == (2, 2, 16)
    counts = mask.sum(-1)
    assert counts[0, 0] == counts[0, 1] < counts[1, 0] < counts[1, 1]  # negative prompts are empty
    assert (hidden.abs().sum(-1) > 0).long().equal(mask.long())


def test_the_default_length_is_the_pipelines_own():
    case = CASES["QwenImagePipeline"]
    pipeline = case.pipeline()
    call = call_options(pipeline, num_inference_steps=3, height=32, width=32)
    assert call.max_sequence_length == 512


def test_embedded_guidance_is_a_constant_of_each_sample():
    _, _, interface = probed("FluxPipeline")
    assert interface.guidance_kind == "none"
    assert torch.equal(interface.constants["guidance"].row, torch.tensor([4.0]))


def test_unused_guidance_is_left_out_of_the_conditioning():
    _, call, interface = probed("HunyuanVideoPipeline")
    assert (call.num_frames, call.guidance_argument, interface.guidance_kind) == (5, "true_cfg_scale", "cfg")
    assert isinstance(interface.constants["guidance"], PerSample) and "guidance" not in interface.conditioning


def test_labels_latents_of_both_branches_and_predicted_variances():
    pipeline, call, interface = probed("DiTPipeline")
    assert interface.conditioning == ("class_labels",) and interface.output == Output(channels=4)
    assert interface.stacked and interface.positive_first
    with pytest.raises(
        ModelError, match=r"no label 'a ring': expected one of 1000 classes, by label or number, such as 'shape 0'"
    ):
        capture(pipeline, interface, call, ["a ring"], [0], [4.0])


def test_a_time_that_runs_backwards_and_a_negated_output():
    _, _, interface = probed("Lumina2Pipeline")
    assert interface.timestep_scale == -1e-3 and interface.constants["timestep"].value == 1.0
    assert interface.output.scale == -1.0


def test_arguments_in_dicts_are_conditioning_too():
    _, _, interface = probed("StableDiffusionXLPipeline")
    assert interface.conditioning == ("encoder_hidden_states", "added_cond_kwargs.text_embeds")
    assert isinstance(interface.constants["added_cond_kwargs.time_ids"], PerSample)


def test_lists_of_one_tensor_a_sample_are_tensors_and_a_mask():
    pipeline, call, interface = probed("ZImagePipeline")
    assert interface.listed == {"x": Listed(axis=1), "cap_feats": Listed(mask="cap_feats_mask")}
    assert interface.conditioning == ("cap_feats", "cap_feats_mask") and interface.latents_shape == (4, 8, 8)
    trajectory = capture(pipeline, interface, call, ["a red ring on blue", "a blue cross on yellow"], [1, 2], [4.0] * 2)
    captions, mask = (trajectory.conditioning[name] for name in interface.conditioning)
    assert captions.shape[:3] == mask.shape == (2, 2, 12) and mask.sum(-1)[1].tolist() == [6, 6]
    assert (captions.abs().sum(-1) > 0).long().equal(mask)


def test_a_scale_is_the_same_whatever_a_pipeline_counts_from():
    _, call, interface = probed("ZImagePipeline", scale=4.0)
    assert call.arguments(4.0, 1)["guidance_scale"] == 3.0 and interface.guidance_kind == "cfg"
    assert call.arguments(1.0, 1)["guidance_scale"] == 0.0 and probed("ZImagePipeline", scale=1.0)[2].branches == 1
    assert probed("FluxPipeline")[1].arguments(4.0, 1)["guidance_scale"] == 4.0


def test_one_list_of_texts_can_be_padded():
    pipeline, call, _ = probed("ZImagePipeline")
    forward = pipeline.transformer.forward
    pipeline.transformer.forward = lambda x, t, cap_feats, letters=(), **kwargs: forward(x, t, cap_feats, **kwargs)
    pipeline.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: (args, {**kwargs, "letters": [each[:1] for each in args[2]]}), with_kwargs=True
    )
    with pytest.raises(ModelError, match="passes cap_feats and letters as lists of text: expected one"):
        probe(pipeline, call, 4.0, CASES["ZImagePipeline"].prompts)


def test_constant_channels_behind_the_latents_are_the_calls():
    """HunyuanVideo 1.5 without a picture; its guidance scale is kept by a guider."""
    pipeline, _, interface = probed("HunyuanVideo15Pipeline")
    assert interface.constants["hidden_states"] == Behind((0.0,) * 5) and interface.latents_shape == (4, 2, 8, 8)
    assert interface.guidance_kind == "cfg" and interface.positive_first and not interface.stacked
    assert pipeline.guider.guidance_scale == 7.5  # as it was


def test_channels_beside_the_latents_that_change_are_refused():
    case = CASES["HunyuanVideo15Pipeline"]
    pipeline = case.pipeline()
    pipeline.prepare_cond_latents_and_mask = lambda latents, *_: (
        torch.rand_like(latents),
        torch.rand_like(latents[:, :1]),
    )
    call = call_options(pipeline, num_inference_steps=4, **case.call)
    with pytest.raises(ModelError, match=r"HunyuanVideo15Pipeline does not hand .* \(3, 9, 2, 8, 8\)"):
        probe(pipeline, call, 4.0, case.prompts)


def test_experts_that_take_turns_are_refused():
    pipeline = CASES["WanPipeline"].pipeline()
    pipeline.transformer_2 = pipeline.transformer
    call = call_options(pipeline, num_inference_steps=4, **CASES["WanPipeline"].call)
    with pytest.raises(ModelError, match="two transformers that take turns"):
        probe(pipeline, call, 4.0, [])


def test_frames_are_for_videos():
    with pytest.raises(UsageError, match="--num-frames is 5, but FluxPipeline draws pictures"):
        probed("FluxPipeline", num_frames=5)
