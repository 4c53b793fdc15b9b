"""Parts that the small pipelines of the coverage suite share: tokenizers, text encoders, autoencoders, schedulers.

Where a pipeline loads a text encoder of a class that has no tiny tokenizer (Gemma, Mistral, UMT5), a T5 of the same
interface stands in: the transformer is what is covered, and it sees tensors of the same shapes.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, FlowMatchEulerDiscreteScheduler
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    LlamaConfig,
    LlamaModel,
    T5EncoderModel,
)

from otcache.artifacts.training import text

WIDTH = 64
"""Of every text encoder's output."""
PROMPTS = [
    "a red ring on blue",
    "a large green star on a black background",
    "a small white circle on red",
    "a blue cross on yellow",
    "a yellow square on a white background",
    "a small red triangle on green",
]


@functools.cache
def tokenizers() -> tuple[Any, Any]:
    """CLIP and T5 with the words of the bundled model's captions."""
    return text.make_tokenizers()


def t5() -> tuple[Any, T5EncoderModel]:
    clip, tokenizer = tokenizers()
    return tokenizer, text.make_encoders(clip, tokenizer)[1]


CHAT = "{% set said = messages[-1]['content'] %}{{ said if said is string else said[0]['text'] }}"
"""A chat template that leaves the prompt as it is."""


class Processor:
    """A tokenizer with the call of a vision-language processor."""

    def __init__(self) -> None:
        self.tokenizer = chat_tokenizer()

    def __call__(self, text: list[str], images: None = None, videos: None = None, **options: Any) -> Any:
        return self.tokenizer(text, **options)

    def decode(self, ids: Any) -> str:
        return str(self.tokenizer.decode(ids))


def chat_tokenizer() -> Any:
    tokenizer, _ = text.make_tokenizers()[::-1]
    tokenizer.chat_template = CHAT
    return tokenizer


def language_model(tokenizer: Any, layers: int = 2, width: int = WIDTH) -> LlamaModel:
    """A causal model in the place of Mistral, Qwen or Gemma."""
    return LlamaModel(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=width,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=512,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def clip(projection: bool = False, length: int = 77) -> tuple[Any, CLIPTextModel]:
    tokenizer, _ = tokenizers()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return tokenizer, (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


def vae(channels: int = 4, size: int = 16, levels: int = 2, **options: Any) -> AutoencoderKL:
    """2× smaller on each side; with more levels 4×, 8×, …"""
    return AutoencoderKL(
        block_out_channels=(8,) * levels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=2,
        sample_size=size,
        mid_block_add_attention=False,
        **options,
    )


def flow(**options: Any) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(shift=3.0, **options)


def ddim() -> DDIMScheduler:
    """As Stable Diffusion and its relatives ship it."""
    return DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1)


def ready(pipeline: Any) -> Any:
    """In eval mode, without gradients and progress bars."""
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval().requires_grad_(False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
