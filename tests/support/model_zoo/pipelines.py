"""A small random pipeline of each class that the coverage suite tries, made from the real classes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers as d
import torch

from otcache.artifacts.training import qwen, video

from . import small


@dataclass(frozen=True, kw_only=True)
class Case:
    """A pipeline and how it is called."""

    make: Callable[[], Any]
    call: dict[str, int] = field(default_factory=lambda: {"height": 16, "width": 16, "max_sequence_length": 12})
    prompts: list[str] = field(default_factory=lambda: small.PROMPTS)

    def pipeline(self) -> Any:
        torch.manual_seed(0)
        return small.ready(self.make())


VIDEO = {"height": 16, "width": 16, "num_frames": 5, "max_sequence_length": 12}


def flux() -> Any:
    (clip, clip_encoder), (t5, t5_encoder) = small.clip(), small.t5()
    transformer = d.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=64,
        pooled_projection_dim=64,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )
    return d.FluxPipeline(
        scheduler=small.flow(),
        vae=small.vae(shift_factor=0.1),
        text_encoder=clip_encoder,
        tokenizer=clip,
        text_encoder_2=t5_encoder,
        tokenizer_2=t5,
        transformer=transformer,
    )


def qwen_image() -> Any:
    tokenizer = qwen.make_tokenizer()
    vae = d.AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, False],
        latents_mean=[0.1, 0.2, 0.3, 0.4],
        latents_std=[1.0, 1.1, 1.2, 1.3],
    )
    transformer = d.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=64,
        axes_dims_rope=(4, 6, 6),
    )
    return qwen.make_pipeline(vae, tokenizer, qwen.make_text_encoder(tokenizer), transformer)


def hunyuan_video() -> Any:
    tokenizers = video.make_tokenizers()
    vae = d.AutoencoderKLHunyuanVideo(
        latent_channels=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 3,
        up_block_types=("HunyuanVideoUpBlock3D",) * 3,
        block_out_channels=(4, 4, 4),
        layers_per_block=1,
        norm_num_groups=1,
        scaling_factor=0.7,
        spatial_compression_ratio=4,
        temporal_compression_ratio=4,
        mid_block_add_attention=False,
    )
    transformer = d.HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=2,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        patch_size=2,
        patch_size_t=1,
        guidance_embeds=False,
        text_embed_dim=64,
        pooled_projection_dim=64,
        rope_axes_dim=(4, 6, 6),
    )
    return video.make_pipeline(vae, tokenizers, video.make_text_encoders(*tokenizers), transformer)


def stable_diffusion_3() -> Any:
    (clip, first), (clip_2, second), (t5, third) = small.clip(True), small.clip(True), small.t5()
    transformer = d.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=64 * 2,
        caption_projection_dim=32,
        pooled_projection_dim=128,
        out_channels=4,
        pos_embed_max_size=8,
    )
    third = type(third)(type(third.config)(**{**third.config.to_dict(), "d_model": 128}))
    return d.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=small.flow(),
        vae=small.vae(shift_factor=0.1),
        text_encoder=first,
        tokenizer=clip,
        text_encoder_2=second,
        tokenizer_2=clip_2,
        text_encoder_3=third,
        tokenizer_3=t5,
    )


def pixart_sigma() -> Any:
    t5, encoder = small.t5()
    transformer = d.PixArtTransformer2DModel(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=16,
        num_attention_heads=2,
        caption_channels=64,
        in_channels=4,
        cross_attention_dim=32,
        out_channels=8,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
    )
    return d.PixArtSigmaPipeline(t5, encoder, small.vae(), transformer, small.ddim())


def dit() -> Any:
    transformer = d.DiTTransformer2DModel(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=16,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8,
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
    )
    labels = {i: f"shape {i}" for i in range(1000)}
    return d.DiTPipeline(transformer, small.vae(), small.ddim(), id2label=labels)


def sana() -> Any:
    t5, encoder = small.t5()
    vae = d.AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "ResBlock"),
        decoder_block_types=("ResBlock", "ResBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()),
        upsample_block_type="interpolate",
        downsample_block_type="stride_conv",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41407,
    )
    transformer = d.SanaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=16,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=64,
        sample_size=8,
    )
    return d.SanaPipeline(t5, encoder, vae, transformer, small.flow())


def wan() -> Any:
    t5, encoder = small.t5()
    vae = d.AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.1, 0.2, 0.3, 0.4],
        latents_std=[1.0, 1.1, 1.2, 1.3],
        scale_factor_spatial=4,
        scale_factor_temporal=2,
    )
    transformer = d.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=64,
        freq_dim=32,
        ffn_dim=32,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )
    return d.WanPipeline(t5, encoder, vae, small.flow(), transformer)


def cogvideox() -> Any:
    t5, encoder = small.t5()
    vae = d.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    )
    transformer = d.CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=64,
        num_layers=2,
        sample_width=4,
        sample_height=4,
        sample_frames=9,
        patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=12,
        use_rotary_positional_embeddings=True,
    )
    return d.CogVideoXPipeline(t5, encoder, vae, transformer, d.CogVideoXDDIMScheduler(clip_sample=False))


def ltx_video() -> Any:
    t5, encoder = small.t5()
    vae = d.AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5,
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        patch_size=1,
        patch_size_t=1,
    )
    transformer = d.LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        num_layers=2,
        caption_channels=64,
    )
    return d.LTXPipeline(small.flow(), vae, encoder, t5, transformer)


def aura_flow() -> Any:
    t5, encoder = small.t5()
    transformer = d.AuraFlowTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=64,
        caption_projection_dim=32,
        out_channels=4,
        pos_embed_max_size=64,
    )
    return d.AuraFlowPipeline(t5, encoder, small.vae(), transformer, small.flow())


def lumina_2() -> Any:
    t5, encoder = small.t5()
    transformer = d.Lumina2Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        hidden_size=32,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=2,
        multiple_of=16,
        axes_dim_rope=(4, 6, 6),
        axes_lens=(64, 16, 16),
        cap_feat_dim=64,
    )
    pipeline = d.Lumina2Pipeline(transformer, small.flow(), small.vae(shift_factor=0.1), encoder, t5)
    pipeline.system_prompt = ""  # its own is longer than the texts of the case
    return pipeline


def cogview_4() -> Any:
    t5, encoder = small.t5()
    transformer = d.CogView4Transformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        text_embed_dim=64,
        time_embed_dim=16,
        condition_dim=8,
        pos_embed_max_size=8,
        sample_size=8,
        rope_axes_dim=(8, 8),
    )
    scheduler = small.flow(
        base_shift=0.25, max_shift=0.75, base_image_seq_len=16, use_dynamic_shifting=True, time_shift_type="linear"
    )
    return d.CogView4Pipeline(t5, encoder, small.vae(), transformer, scheduler)


def chroma() -> Any:
    t5, encoder = small.t5()
    transformer = d.ChromaTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=64,
        axes_dims_rope=(4, 6, 6),
        approximator_num_channels=8,
        approximator_hidden_dim=32,
        approximator_layers=1,
    )
    return d.ChromaPipeline(small.flow(), small.vae(shift_factor=0.1), encoder, t5, transformer)


def hunyuan_dit() -> Any:
    (clip, clip_encoder), (t5, t5_encoder) = small.clip(), small.t5()
    transformer = d.HunyuanDiT2DModel(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=16,
        num_attention_heads=2,
        in_channels=4,
        hidden_size=32,
        cross_attention_dim=64,
        cross_attention_dim_t5=64,
        pooled_projection_dim=16,
        text_len=77,
        text_len_t5=256,
        activation_fn="gelu-approximate",
    )
    return d.HunyuanDiTPipeline(
        small.vae(levels=4),
        clip_encoder,
        clip,
        transformer,
        small.ddim(),
        None,
        None,
        requires_safety_checker=False,
        text_encoder_2=t5_encoder,
        tokenizer_2=t5,
    )


def mochi() -> Any:
    t5, encoder = small.t5()
    vae = d.AutoencoderKLMochi(
        latent_channels=12,
        out_channels=3,
        encoder_block_out_channels=(32,) * 4,
        decoder_block_out_channels=(32,) * 4,
        layers_per_block=(1,) * 5,
        latents_mean=[0.1] * 12,
        latents_std=[1.1] * 12,
    )
    transformer = d.MochiTransformer3DModel(
        patch_size=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        pooled_projection_dim=16,
        in_channels=12,
        out_channels=None,
        qk_norm="rms_norm",
        text_embed_dim=64,
        time_embed_dim=4,
        activation_fn="swiglu",
        max_sequence_length=12,
    )
    return d.MochiPipeline(d.FlowMatchEulerDiscreteScheduler(invert_sigmas=True), vae, encoder, t5, transformer)


def unet(**options: Any) -> d.UNet2DConditionModel:
    return d.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        **options,
    )


def stable_diffusion() -> Any:
    clip, encoder = small.clip()
    return d.StableDiffusionPipeline(
        small.vae(),
        encoder,
        clip,
        unet(cross_attention_dim=64),
        small.ddim(),
        None,
        None,
        requires_safety_checker=False,
    )


def stable_diffusion_xl() -> Any:
    (clip, first), (clip_2, second) = small.clip(), small.clip(True)
    model = unet(
        cross_attention_dim=128,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        use_linear_projection=True,
        projection_class_embeddings_input_dim=6 * 8 + 64,
    )
    return d.StableDiffusionXLPipeline(
        small.vae(), first, second, clip, clip_2, model, d.EulerDiscreteScheduler(), add_watermarker=False
    )


def flux_2() -> Any:
    tokenizer = small.chat_tokenizer()
    encoder = small.language_model(tokenizer, layers=30, width=16)  # its layers 10, 20 and 30 are read
    vae = d.AutoencoderKLFlux2(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
        sample_size=16,
        mid_block_add_attention=False,
    )
    transformer = d.Flux2Transformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=48,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        mlp_ratio=2.0,
    )
    return d.Flux2Pipeline(small.flow(), vae, encoder, tokenizer, transformer)


def z_image() -> Any:
    tokenizer = small.chat_tokenizer()
    transformer = d.ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=64,
        axes_dims=[4, 6, 6],
        axes_lens=[128, 32, 32],
    )
    return d.ZImagePipeline(
        small.flow(), small.vae(shift_factor=0.1), small.language_model(tokenizer), tokenizer, transformer
    )


def hunyuan_video_15() -> Any:
    tokenizer = small.chat_tokenizer()
    _, second = small.t5()
    vae = d.AutoencoderKLHunyuanVideo15(
        latent_channels=4,
        block_out_channels=(8, 8, 8),
        layers_per_block=1,
        spatial_compression_ratio=4,
        temporal_compression_ratio=4,
    )
    transformer = d.HunyuanVideo15Transformer3DModel(
        in_channels=9,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=64,
        text_embed_2_dim=64,
        image_embed_dim=8,
        rope_axes_dim=(4, 6, 6),
        target_size=32,
        task_type="t2v",
    )
    pipeline = d.HunyuanVideo15Pipeline(
        small.language_model(tokenizer, layers=3),
        tokenizer,
        transformer,
        vae,
        small.flow(),
        second,
        small.tokenizers()[1],
        d.ClassifierFreeGuidance(),
    )
    pipeline.tokenizer_max_length, pipeline.tokenizer_2_max_length = 12, 8
    return pipeline


def kandinsky_5() -> Any:
    clip, clip_encoder = small.clip()
    processor = small.Processor()
    vae = hunyuan_video().vae
    transformer = d.Kandinsky5Transformer3DModel(
        in_visual_dim=4,
        in_text_dim=64,
        in_text_dim2=64,
        time_dim=16,
        out_visual_dim=4,
        model_dim=32,
        ff_dim=32,
        num_text_blocks=1,
        num_visual_blocks=2,
        axes_dims=(4, 6, 6),
    )
    pipeline = d.Kandinsky5T2VPipeline(
        transformer, vae, small.language_model(processor.tokenizer), processor, clip_encoder, clip, small.flow()
    )
    pipeline.prompt_template, pipeline.prompt_template_encode_start_idx = "a {}", 1
    return pipeline


CASES = {
    "FluxPipeline": Case(make=flux),
    "Flux2Pipeline": Case(make=flux_2),
    "QwenImagePipeline": Case(make=qwen_image, call={"height": 32, "width": 32, "max_sequence_length": 12}),
    "HunyuanVideoPipeline": Case(make=hunyuan_video, call={**VIDEO, "height": 32, "width": 32}),
    "HunyuanVideo15Pipeline": Case(make=hunyuan_video_15, call={"height": 32, "width": 32, "num_frames": 5}),
    "StableDiffusion3Pipeline": Case(make=stable_diffusion_3),
    "PixArtSigmaPipeline": Case(make=pixart_sigma),
    "DiTPipeline": Case(make=dit, call={}, prompts=[f"shape {i}" for i in (1, 5, 9, 200, 600, 7)]),
    "SanaPipeline": Case(make=sana, call={"height": 32, "width": 32, "max_sequence_length": 12}),
    "WanPipeline": Case(make=wan, call=VIDEO),
    "CogVideoXPipeline": Case(make=cogvideox, call={**VIDEO, "num_frames": 9, "height": 32, "width": 32}),
    "LTXPipeline": Case(make=ltx_video, call={**VIDEO, "num_frames": 9, "height": 32, "width": 32}),
    "AuraFlowPipeline": Case(make=aura_flow),
    "Lumina2Pipeline": Case(make=lumina_2, call={"height": 32, "width": 32, "max_sequence_length": 24}),
    "MochiPipeline": Case(make=mochi, call={**VIDEO, "num_frames": 7, "height": 32, "width": 32}),
    "ZImagePipeline": Case(make=z_image),
    "CogView4Pipeline": Case(make=cogview_4, call={"height": 16, "width": 16, "max_sequence_length": 16}),
    "ChromaPipeline": Case(make=chroma),
    "HunyuanDiTPipeline": Case(make=hunyuan_dit, call={"height": 32, "width": 32}),
    "StableDiffusionPipeline": Case(make=stable_diffusion, call={"height": 16, "width": 16}),
    "StableDiffusionXLPipeline": Case(make=stable_diffusion_xl, call={"height": 16, "width": 16}),
}
REFUSED = {
    "Kandinsky5T2VPipeline": Case(
        make=kandinsky_5, call={**VIDEO, "height": 32, "width": 32, "max_sequence_length": 24}
    ),
}
"""Classes that cannot be compiled; the suite holds the reason that the user is given."""
