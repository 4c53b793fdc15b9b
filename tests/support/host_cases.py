"""Tiny random pipelines of diffusers' own classes, each with the arguments of a call that ends in latents."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from make import save_model

STEPS = 6
WIDTH = 16


@dataclass(frozen=True, kw_only=True)
class Case:
    """A pipeline with the arguments of its call."""

    make: Callable[[], Any]
    arguments: dict[str, Any] = field(default_factory=dict)
    guidance: float = 4.0
    guidance_argument: str = "guidance_scale"
    offset: float = 0.0
    """Of that argument from the scale."""
    guidance_kind: str = "cfg"
    """`none`: one branch, with the scale embedded."""
    blocks: int = 2

    def __call__(self, pipeline: Any, steps: int = STEPS, seed: int = 0, **changed: Any) -> Any:
        arguments = {
            "output_type": "latent",
            self.guidance_argument: self.guidance + self.offset,
            **self.arguments,
            **changed,
        }
        generator = torch.Generator().manual_seed(seed)
        return pipeline(num_inference_steps=steps, generator=generator, **arguments)[0]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def made(build: Callable[[], Any]) -> Callable[[], Any]:
    """A fresh pipeline with the same random weights each time, in eval mode and without bars."""

    @functools.wraps(build)
    def make() -> Any:
        torch.manual_seed(0)
        pipeline = build()
        pipeline.set_progress_bar_config(disable=True)
        for component in pipeline.components.values():
            if isinstance(component, torch.nn.Module):
                component.eval()
        return pipeline

    return make


def autoencoder() -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(4, 4),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
        sample_size=16,
        mid_block_add_attention=False,
    )


@functools.cache
def golden_folder() -> Path:
    """The model of the artifacts in tests/golden."""
    import tempfile

    folder = Path(tempfile.mkdtemp()) / "tiny"
    save_model(folder)
    return folder


@made
def flux() -> Any:
    from diffusers import FluxPipeline

    folder = golden_folder()
    torch.manual_seed(0)  # the first time, making the folder has drawn numbers
    return FluxPipeline.from_pretrained(folder)


@made
def flux_img2img() -> Any:
    from diffusers import FluxImg2ImgPipeline

    return FluxImg2ImgPipeline(**flux().components)


@made
def flux_controlnet() -> Any:
    from diffusers import FluxControlNetModel, FluxControlNetPipeline

    components = flux().components
    controlnet = FluxControlNetModel.from_transformer(
        components["transformer"], num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2
    )
    for layer in (*controlnet.controlnet_blocks, *controlnet.controlnet_single_blocks):
        torch.nn.init.normal_(layer.weight, std=0.5)  # zero until it is trained
    return FluxControlNetPipeline(**{**components, "controlnet": controlnet})


@made
def flux_embedded() -> Any:
    from diffusers import FluxPipeline, FluxTransformer2DModel

    components = flux().components
    config = {**components["transformer"].config, "guidance_embeds": True}
    return FluxPipeline(**{**components, "transformer": FluxTransformer2DModel.from_config(config)})


@made
def stable_diffusion_3() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        caption_projection_dim=16,
        pooled_projection_dim=WIDTH,
        out_channels=4,
        pos_embed_max_size=8,
    )
    absent = dict.fromkeys(f"{part}{place}" for part in ("text_encoder", "tokenizer") for place in ("", "_2", "_3"))
    return StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=autoencoder(), **absent
    )


@made
def pixart_sigma() -> Any:
    from diffusers import DPMSolverMultistepScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel

    transformer = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=16,
        sample_size=8,
        patch_size=2,
        caption_channels=WIDTH,
    )
    return PixArtSigmaPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=autoencoder(),
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(),
    )


@made
def qwen_image() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline, QwenImageTransformer2DModel

    transformer = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 2, 2),
    )
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.02)
    return QwenImagePipeline(scheduler=scheduler, vae=None, text_encoder=None, tokenizer=None, transformer=transformer)


@made
def dit() -> Any:
    from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        patch_size=2,
    )
    scheduler = DDIMScheduler(clip_sample=False)
    return DiTPipeline(transformer=transformer, vae=autoencoder(), scheduler=scheduler)


def _unet(**changed: Any) -> Any:
    from diffusers import EulerDiscreteScheduler, UNet2DConditionModel

    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
    )
    scheduler = EulerDiscreteScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1
    )
    return dict(
        vae=autoencoder(),
        text_encoder=None,
        tokenizer=None,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@made
def stable_diffusion() -> Any:
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline(**_unet())


@made
def wan() -> Any:
    from diffusers import UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel

    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=WIDTH,
        freq_dim=16,
        ffn_dim=16,
        num_layers=2,
        rope_max_seq_len=16,
    )
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return WanPipeline(tokenizer=None, text_encoder=None, vae=None, scheduler=scheduler, transformer=transformer)


@made
def z_image() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel

    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=16,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=WIDTH,
        axes_dims=[4, 2, 2],
        axes_lens=[128, 16, 16],
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return ZImagePipeline(
        scheduler=scheduler, vae=autoencoder(), text_encoder=None, tokenizer=None, transformer=transformer
    )


def _embeds(*, pooled: bool = False, mask: str | None = None) -> dict[str, Any]:
    """Prompt and negative prompt as embeddings (1, 5, WIDTH)."""
    found: dict[str, Any] = {}
    for seed, prefix in enumerate(("", "negative_")):
        found[prefix + "prompt_embeds"] = normal(1, 5, WIDTH, seed=seed)
        if pooled:
            found[prefix + "pooled_prompt_embeds"] = normal(1, WIDTH, seed=seed)
        if mask:
            found[prefix + "prompt_" + mask] = torch.ones(1, 5, dtype=torch.int64)
    return found


SMALL = {"height": 16, "width": 16}
FLUX = {"prompt": "a red ring", "max_sequence_length": 6, "negative_prompt": "", **SMALL}
CASES = {
    "flux": Case(make=flux, arguments=FLUX, guidance_argument="true_cfg_scale"),
    "flux-img2img": Case(
        make=flux_img2img,
        arguments={**FLUX, "image": normal(1, 3, 16, 16).clamp(0, 1), "strength": 1.0},
        guidance_argument="true_cfg_scale",
    ),
    "flux-controlnet": Case(
        make=flux_controlnet,
        guidance_argument="true_cfg_scale",
        arguments={**FLUX, "control_image": normal(1, 3, 16, 16).clamp(0, 1), "controlnet_conditioning_scale": 1.0},
    ),
    "flux-embedded": Case(make=flux_embedded, arguments={**FLUX, "negative_prompt": None}, guidance_kind="none"),
    "sd3": Case(make=stable_diffusion_3, arguments={**_embeds(pooled=True), **SMALL}),
    "pixart-sigma": Case(
        make=pixart_sigma,
        arguments={**_embeds(mask="attention_mask"), **SMALL, "negative_prompt": None, "use_resolution_binning": False},
    ),
    "qwen-image": Case(
        make=qwen_image,
        arguments={**_embeds(mask="embeds_mask"), "height": 32, "width": 32},
        guidance_argument="true_cfg_scale",
    ),
    "dit": Case(make=dit, arguments={"class_labels": [3, 5], "output_type": "np"}),
    "sd": Case(make=stable_diffusion, arguments={**_embeds(), **SMALL}),
    "wan": Case(make=wan, arguments={**_embeds(), **SMALL, "num_frames": 5}),
    "z-image": Case(
        make=z_image, arguments={**{key: list(value) for key, value in _embeds().items()}, **SMALL}, offset=-1.0
    ),
}
