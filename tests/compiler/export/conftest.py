"""A transformer and a pipeline that several tests of this room export."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

from otcache.artifacts.training.text import make_encoders, make_tokenizers


@pytest.fixture
def flux() -> FluxTransformer2DModel:
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=64,
        pooled_projection_dim=64,
        axes_dims_rope=(8, 12, 12),
    ).eval()


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
