"""Latents → pictures: the exported decoder against the pipeline's own."""

from __future__ import annotations

import torch

from otcache.compiler.export.decoder import make_latent_decoder, make_noise_order_decoder, unpacked_shape
from otcache.compiler.export.onnx_stages import export_module
from otcache.compiler.pipelines.call import call_options
from otcache.compiler.pipelines.decode import decode_latents


def test_latent_decoder_reproduces_the_pipeline(pipeline, tmp_path):
    call = call_options(pipeline, num_inference_steps=4, height=16, width=24, max_sequence_length=8)
    latents = torch.randn(2, 24, 16)
    pictures = decode_latents(pipeline, call, latents)
    unpacked = pipeline._unpack_latents(latents, 16, 24, pipeline.vae_scale_factor)

    def drawn(parts):
        with torch.no_grad():
            made = torch.cat([pipeline.vae.decode(part / 0.7 + 0.1, return_dict=False)[0] for part in parts])
        return pipeline.image_processor.postprocess(made, output_type="pt").permute(0, 2, 3, 1)

    assert torch.equal(
        pictures, drawn(unpacked.split(1))
    )  # one by one, as `decoded` does: two at once are summed in another order
    expected = drawn([unpacked])
    decoder = make_latent_decoder(pipeline, latents, pictures, 16, 24)
    with torch.no_grad():
        torch.testing.assert_close(decoder(latents), expected, rtol=0, atol=1e-6)
    path = tmp_path / "vae_decoder.onnx"
    exported = export_module(decoder, {"latents": latents}, ("images",), path, kind="decoder")
    assert exported.outputs[0].shape == ("batch", 16, 24, 3)
    assert exported.max_relative_error < 1e-5


def test_a_decoder_that_differs_from_the_pipeline_is_not_exported(pipeline):
    latents = torch.randn(2, 24, 16)
    pictures = decode_latents(pipeline, call_options(pipeline, num_inference_steps=4, height=16, width=24), latents)
    assert make_latent_decoder(pipeline, latents, pictures + 0.01, 16, 24) is None
    assert make_latent_decoder(pipeline, latents[:, :20], pictures, 16, 24) is None


def test_a_decoder_in_the_order_of_the_noise_takes_every_size(pipeline):
    examples = []
    for height, width in ((16, 24), (24, 16), (32, 32)):
        call = call_options(pipeline, num_inference_steps=4, height=height, width=width)
        latents = torch.randn(2, height * width // 16, 16)
        shape = unpacked_shape(pipeline, latents, height, width)
        assert shape == (4, height // 2, width // 2)
        unpacked = pipeline._unpack_latents(latents, height, width, pipeline.vae_scale_factor)
        examples.append((unpacked, decode_latents(pipeline, call, latents)))
    decoder = make_noise_order_decoder(pipeline, examples)
    assert decoder is not None
    for latents, pictures in examples:
        with torch.no_grad():
            torch.testing.assert_close(decoder(latents), pictures, rtol=0, atol=1e-5)
    wrong = [(latents, 1 - pictures) for latents, pictures in examples]
    assert make_noise_order_decoder(pipeline, [*examples, *wrong]) is None
