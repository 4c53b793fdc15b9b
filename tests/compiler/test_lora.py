"""A LoRA is fused into the weights, and the weights' digest tells."""

from __future__ import annotations

import pytest
import torch

from otcache.compiler.models import load_model
from otcache.schemas.errors import ModelError

peft = pytest.importorskip("peft")


@pytest.fixture(scope="module")
def lora(tiny_flux_folder, tmp_path_factory):
    """A folder with a LoRA of the transformer's queries, and the transformer that has it unfused."""
    from diffusers import FluxPipeline
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft.utils import get_peft_model_state_dict

    folder = tmp_path_factory.mktemp("lora")
    transformer = load_model(str(tiny_flux_folder)).transformer
    transformer.add_adapter(peft.LoraConfig(r=2, lora_alpha=2, target_modules=["to_q"], init_lora_weights=False))
    weights = convert_state_dict_to_diffusers(get_peft_model_state_dict(transformer))
    FluxPipeline.save_lora_weights(folder, transformer_lora_layers=weights)
    return folder, transformer.eval()


def output(transformer):
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        return transformer(
            hidden_states=torch.randn(2, 16, 16, generator=random), timestep=torch.tensor([0.3, 0.8]),
            encoder_hidden_states=torch.randn(2, 5, 64, generator=random),
            pooled_projections=torch.randn(2, 64, generator=random), img_ids=torch.zeros(16, 3),
            txt_ids=torch.zeros(5, 3), return_dict=False,
        )[0]  # fmt: skip


def test_fused_is_what_it_is_unfused(tiny_flux_folder, lora):
    folder, unfused = lora
    plain, fused = load_model(str(tiny_flux_folder)), load_model(str(tiny_flux_folder), lora=folder)
    torch.testing.assert_close(output(fused.transformer), output(unfused), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(output(fused.transformer), output(plain.transformer), atol=1e-3)
    assert not any("lora" in name for name, _ in fused.transformer.named_parameters())
    assert fused.weights_digest != plain.weights_digest and fused.denoiser_digest != plain.denoiser_digest
    assert fused.weights_digest == load_model(str(tiny_flux_folder), lora=folder).weights_digest


def test_a_folder_without_one_is_refused(tiny_flux_folder, tmp_path):
    with pytest.raises(ModelError, match=r"--lora .* has 0 safetensors files: expected a folder with one"):
        load_model(str(tiny_flux_folder), lora=tmp_path)


def test_a_lora_of_another_model_is_refused(tiny_flux_folder, lora, tmp_path):
    from safetensors.torch import load_file, save_file

    (file,) = lora[0].glob("*.safetensors")
    save_file(
        {name.replace("to_q", "elsewhere"): value for name, value in load_file(file).items()}, tmp_path / file.name
    )
    with pytest.raises(ModelError, match=r"--lora .*safetensors"):
        load_model(str(tiny_flux_folder), lora=tmp_path)
