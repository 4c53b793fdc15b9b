"""A LoRA is fused into the weights, and the weights' digest tells."""

from __future__ import annotations

import pytest
import torch

from otcache.compiler.models.load import load_model
from otcache.schemas.errors import ModelError

pytest.importorskip("peft")


@pytest.fixture(scope="module")
def unfused(tiny_flux_folder, tiny_flux_lora):
    """The transformer of the pipeline that has the LoRA beside its weights."""
    pipeline = load_model(str(tiny_flux_folder)).pipeline
    pipeline.load_lora_weights(tiny_flux_lora)
    return pipeline.transformer.eval()


def output(transformer):
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        return transformer(
            hidden_states=torch.randn(2, 16, 16, generator=random),
            timestep=torch.tensor([0.3, 0.8]),
            encoder_hidden_states=torch.randn(2, 5, 64, generator=random),
            pooled_projections=torch.randn(2, 64, generator=random),
            img_ids=torch.zeros(16, 3),
            txt_ids=torch.zeros(5, 3),
            return_dict=False,
        )[0]


def test_fused_is_what_it_is_unfused(tiny_flux_folder, tiny_flux_lora, unfused):
    plain, fused = load_model(str(tiny_flux_folder)), load_model(str(tiny_flux_folder), lora=tiny_flux_lora)
    torch.testing.assert_close(output(fused.transformer), output(unfused), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(output(fused.transformer), output(plain.transformer), atol=1e-3)
    assert not any("lora" in name for name, _ in fused.transformer.named_parameters())
    assert fused.weights_digest != plain.weights_digest and fused.denoiser_digest != plain.denoiser_digest
    assert fused.weights_digest == load_model(str(tiny_flux_folder), lora=tiny_flux_lora).weights_digest


def test_a_folder_without_one_is_refused(tiny_flux_folder, tmp_path):
    with pytest.raises(ModelError, match=r"--lora .* has 0 safetensors files: expected a folder with one"):
        load_model(str(tiny_flux_folder), lora=tmp_path)


def test_a_lora_of_another_model_is_refused(tiny_flux_folder, tiny_flux_lora, tmp_path):
    from safetensors.torch import load_file, save_file

    (file,) = tiny_flux_lora.glob("*.safetensors")
    save_file(
        {name.replace("to_q", "elsewhere"): value for name, value in load_file(file).items()}, tmp_path / file.name
    )
    with pytest.raises(ModelError, match=r"--lora .*safetensors"):
        load_model(str(tiny_flux_folder), lora=tmp_path)
