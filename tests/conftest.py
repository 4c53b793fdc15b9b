"""Fixtures: small pipelines in real diffusers folders, made once per session."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from command import COMPILE, otc
from hypothesis import HealthCheck, settings

settings.register_profile("busy host", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy host")  # how long a draw takes says nothing where others compute, too
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.pop("OTC_LPIPS", None)  # tests name weights of their own
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def tiny_flux_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A FluxPipeline folder with random weights: 1 double and 2 single blocks, 16 × 16 pictures."""
    torch = pytest.importorskip("torch")
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    from otcache.artifacts.training import text

    torch.manual_seed(0)
    clip, t5 = text.make_tokenizers()
    clip_encoder, t5_encoder = text.make_encoders(clip, t5)
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
        sample_size=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
        scaling_factor=0.7,
        shift_factor=0.1,
        force_upcast=False,
    )
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=64,
        pooled_projection_dim=64,
        guidance_embeds=False,
        axes_dims_rope=(4, 6, 6),
    )
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=clip_encoder,
        tokenizer=clip,
        text_encoder_2=t5_encoder,
        tokenizer_2=t5,
        transformer=transformer,
    )
    folder = tmp_path_factory.mktemp("models") / "tiny-flux"
    pipeline.save_pretrained(folder)
    (folder / "prompts.txt").write_text(
        "".join(f"a {c} {s} on black\n" for c in ("red", "blue", "green", "white") for s in ("ring", "star", "cross"))
    )
    # FluxPipeline's own are 128 latents a side and 512 tokens.
    (folder / "call.json").write_text('{"height": 16, "width": 16, "max_sequence_length": 12}')
    return folder


@pytest.fixture(scope="session")
def tiny_flux_lora(tiny_flux_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a LoRA of the tiny transformer's queries, saved as `FluxPipeline.save_lora_weights` does."""
    peft = pytest.importorskip("peft")
    from diffusers import FluxPipeline, FluxTransformer2DModel
    from diffusers.utils import convert_state_dict_to_diffusers

    transformer = FluxTransformer2DModel.from_pretrained(tiny_flux_folder, subfolder="transformer")
    transformer.add_adapter(peft.LoraConfig(r=2, lora_alpha=2, target_modules=["to_q"], init_lora_weights=False))
    folder = tmp_path_factory.mktemp("lora")
    weights = convert_state_dict_to_diffusers(peft.get_peft_model_state_dict(transformer))
    FluxPipeline.save_lora_weights(folder, transformer_lora_layers=weights)
    return folder


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One workspace for all compiles of a session, so that they share what does not differ."""
    return tmp_path_factory.mktemp("workspace")


@pytest.fixture(scope="session")
def compiled(tiny_flux_folder: Path, workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The artifact of the tiny pipeline, compiled through the command line."""
    artifact = tmp_path_factory.mktemp("artifacts") / "tiny"
    result = otc("compile", str(tiny_flux_folder), *COMPILE, "-o", str(artifact), workspace=workspace)
    assert result.exit_code == 0, result.output
    return artifact
