"""Prompt → conditioning and latents → pictures: exported forms against the pipeline's own calls."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

from otcache.artifacts.training.text import POOLED_LENGTH, TEXT_LENGTH, make_encoders, make_tokenizers
from otcache.compiler.export.decoder import latent_decoder
from otcache.compiler.export.onnx_stages import export_module
from otcache.compiler.export.text_encoders import text_encoders
from otcache.compiler.export.tokenizers import PROBES, convert_tokenizer
from otcache.compiler.pipelines.call import call_options
from otcache.compiler.pipelines.decode import decoded
from otcache.schemas.errors import ModelError


@pytest.fixture(scope="module")
def pipeline():
    torch.manual_seed(0)
    clip, t5 = make_tokenizers()
    clip_encoder, t5_encoder = make_encoders(clip, t5)
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
        scaling_factor=0.7,
        shift_factor=0.1,
    )
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=64,
        pooled_projection_dim=64,
        axes_dims_rope=(4, 6, 6),
    )
    made = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae.eval(),
        text_encoder=clip_encoder.eval(),
        tokenizer=clip,
        text_encoder_2=t5_encoder.eval(),
        tokenizer_2=t5,
        transformer=transformer.eval(),
    )
    made.set_progress_bar_config(disable=True)
    return made


def test_text_encoders_reproduce_encode_prompt(pipeline):
    encoders = text_encoders(pipeline, 10)
    assert [(spec.input_name, spec.length) for spec in encoders.tokenizers] == [
        ("input_ids", POOLED_LENGTH),
        ("input_ids_2", 10),
    ]
    assert {name: tuple(value.shape) for name, value in encoders.example.items()} == {
        "input_ids": (2, POOLED_LENGTH),
        "input_ids_2": (2, 10),
    }
    for prompt in PROBES:
        with torch.no_grad():
            result = encoders.module(**{spec.input_name: spec.encode([prompt]) for spec in encoders.tokenizers})
            hidden, pooled, _ = pipeline.encode_prompt(prompt, max_sequence_length=10)
        assert tuple(result) == encoders.output_names
        assert torch.equal(result["pooled_projections"], pooled)
        assert torch.equal(result["encoder_hidden_states"], hidden)


def test_text_encoders_export(pipeline, tmp_path):
    encoders = text_encoders(pipeline, TEXT_LENGTH)
    exported = export_module(
        encoders.module,
        encoders.example,
        encoders.output_names,
        tmp_path / "text_encoder.onnx",
        kind="text_encoder",
    )
    assert exported.max_relative_error < 1e-5
    assert [(info.name, info.dtype, info.shape) for info in (*exported.inputs, *exported.outputs)] == [
        ("input_ids", "int64", ("batch", POOLED_LENGTH)),
        ("input_ids_2", "int64", ("batch", TEXT_LENGTH)),
        ("pooled_projections", "float32", ("batch", 64)),
        ("encoder_hidden_states", "float32", ("batch", TEXT_LENGTH, 64)),
    ]


def test_latent_decoder_reproduces_the_pipeline(pipeline, tmp_path):
    call = call_options(pipeline, num_inference_steps=4, height=16, width=24, max_sequence_length=8)
    latents = torch.randn(2, 24, 16)
    pictures = decoded(pipeline, call, latents)
    unpacked = pipeline._unpack_latents(latents, 16, 24, pipeline.vae_scale_factor)

    def drawn(parts):
        with torch.no_grad():
            made = torch.cat([pipeline.vae.decode(part / 0.7 + 0.1, return_dict=False)[0] for part in parts])
        return pipeline.image_processor.postprocess(made, output_type="pt").permute(0, 2, 3, 1)

    assert torch.equal(
        pictures, drawn(unpacked.split(1))
    )  # one by one, as `decoded` does: two at once are summed in another order
    expected = drawn([unpacked])
    decoder = latent_decoder(pipeline, latents, pictures, 16, 24)
    with torch.no_grad():
        torch.testing.assert_close(decoder(latents), expected, rtol=0, atol=1e-6)
    path = tmp_path / "vae_decoder.onnx"
    exported = export_module(decoder, {"latents": latents}, ("images",), path, kind="decoder")
    assert exported.outputs[0].shape == ("batch", 16, 24, 3)
    assert exported.max_relative_error < 1e-5


def test_a_decoder_that_differs_from_the_pipeline_is_not_exported(pipeline):
    latents = torch.randn(2, 24, 16)
    pictures = decoded(pipeline, call_options(pipeline, num_inference_steps=4, height=16, width=24), latents)
    assert latent_decoder(pipeline, latents, pictures + 0.01, 16, 24) is None
    assert latent_decoder(pipeline, latents[:, :20], pictures, 16, 24) is None


def test_other_classes_have_no_encoders(pipeline):
    class OtherPipeline(type(pipeline)):
        pass

    assert text_encoders(OtherPipeline.__new__(OtherPipeline), 16) is None


def test_a_missing_part_is_named(pipeline):
    part, pipeline.tokenizer_2 = pipeline.tokenizer_2, None
    try:
        with pytest.raises(ModelError, match="FluxPipeline has no tokenizer_2"):
            text_encoders(pipeline, 16)
    finally:
        pipeline.tokenizer_2 = part


def test_tokenizer_that_json_cannot_express_is_refused():
    clip, _ = make_tokenizers()
    clip.padding_side = "left"
    with pytest.raises(ModelError, match="gives other ids than the pipeline"):
        convert_tokenizer(clip, "input_ids", 16)
