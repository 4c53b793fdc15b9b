"""Part of pass `export`: text encoders as one module per pipeline class, from token ids to the transformer's arguments.

Every pipeline class wires its encoders in its own way, so `FAMILIES` holds an entry for each class that is served from
the prompt on; the artifact of any other class takes conditioning that `otc encode` made on a host with torch.

Shapes: input ids int64 (batch, length); what the modules return is named by `output_names`, batch first. Causal
encoders are run without a mask: padding stands on the right, where no token before it looks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import tokenizers
import torch
from torch import Tensor, nn

from otcache.schemas.errors import ModelError

from ..pipelines.prompts import class_numbers
from .tokenizers import PROBES, TokenizerSpec, convert_tokenizer

EXAMPLE_BATCH = 2
"""Prompts of the example that encoders are traced with."""


@dataclass(frozen=True)
class Encoders:
    """What turns prompts into conditioning."""

    module: nn.Module
    """Token ids by keyword → dict of conditioning tensors."""
    output_names: tuple[str, ...]
    """Of the module's results."""
    tokenizers: tuple[TokenizerSpec, ...]

    @property
    def example(self) -> dict[str, Tensor]:
        """Inputs of the module for two prompts."""
        parameter = next(self.module.parameters(), None)
        device = torch.device("cpu") if parameter is None else parameter.device
        return {spec.input_name: spec.encode(PROBES[1 : 1 + EXAMPLE_BATCH]).to(device) for spec in self.tokenizers}


def make_text_encoders(pipeline: Any, max_sequence_length: int) -> Encoders | None:
    """Make one module of a pipeline's text encoders.

    Args:
        pipeline: a diffusers pipeline, with all its encoders and tokenizers.
        max_sequence_length: text tokens that the transformer is called with.

    Returns:
        The encoders; None for a class that `FAMILIES` does not have.

    Raises:
        ModelError: a part of the pipeline is missing, or a tokenizer that JSON cannot express.
    """
    family = FAMILIES.get(type(pipeline).__name__)
    if family is None:
        return None
    missing = [part for part in family.parts if getattr(pipeline, part, None) is None]
    if missing:
        raise ModelError(
            f"{type(pipeline).__name__} has no {', '.join(missing)}: expected all of {', '.join(family.parts)}"
        )
    found = family.encoders(pipeline, max_sequence_length)
    found.module.eval()
    return found


@dataclass(frozen=True)
class Family:
    """How the pipelines of one class encode prompts."""

    parts: tuple[str, ...]
    """Components that are needed."""
    encoders: Callable[[Any, int], Encoders]
    """(pipeline, max_sequence_length) → encoders."""


def _mask(input_ids: Tensor, pad_id: int) -> Tensor:
    """1 up to the last token that is no padding, then 0: int64 (batch, length).

    >>> _mask(torch.tensor([[7, 0, 8, 0], [7, 0, 0, 0]]), pad_id=0).tolist()
    [[1, 1, 1, 0], [1, 0, 0, 0]]
    """
    places = torch.arange(1, input_ids.shape[1] + 1)
    last = (places * (input_ids != pad_id)).amax(1, keepdim=True)
    return (places <= last).to(torch.int64)


# --- Stable Diffusion


class StableDiffusionEncoder(nn.Module):
    """CLIP's last hidden states, normalised."""

    output_names = ("encoder_hidden_states",)

    def __init__(self, pipeline: Any) -> None:
        super().__init__()
        self.text_encoder = pipeline.text_encoder

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        return {"encoder_hidden_states": self.text_encoder(input_ids)[0]}


def _stable_diffusion(pipeline: Any, _: int) -> Encoders:
    specification = convert_tokenizer(pipeline.tokenizer, "input_ids", pipeline.tokenizer.model_max_length)
    return Encoders(StableDiffusionEncoder(pipeline), StableDiffusionEncoder.output_names, (specification,))


# --- Stable Diffusion XL


class StableDiffusionXLEncoders(nn.Module):
    """The hidden states before the last layer of two CLIPs side by side; the second's projection as pooled output."""

    output_names = ("encoder_hidden_states", "added_cond_kwargs.text_embeds")

    def __init__(self, pipeline: Any) -> None:
        super().__init__()
        self.text_encoder, self.text_encoder_2 = pipeline.text_encoder, pipeline.text_encoder_2

    def forward(self, input_ids: Tensor, input_ids_2: Tensor) -> dict[str, Tensor]:
        first = self.text_encoder(input_ids, output_hidden_states=True)
        second = self.text_encoder_2(input_ids_2, output_hidden_states=True)
        hidden = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
        return dict(zip(self.output_names, (hidden, second[0]), strict=True))


def _stable_diffusion_xl(pipeline: Any, _: int) -> Encoders:
    return Encoders(
        StableDiffusionXLEncoders(pipeline),
        StableDiffusionXLEncoders.output_names,
        (
            convert_tokenizer(pipeline.tokenizer, "input_ids", pipeline.tokenizer.model_max_length),
            convert_tokenizer(pipeline.tokenizer_2, "input_ids_2", pipeline.tokenizer_2.model_max_length),
        ),
    )


# --- FLUX


class FluxEncoders(nn.Module):
    """CLIP's pooled output and T5's hidden states."""

    output_names = ("pooled_projections", "encoder_hidden_states")

    def __init__(self, pipeline: Any) -> None:
        super().__init__()
        self.text_encoder, self.text_encoder_2 = pipeline.text_encoder, pipeline.text_encoder_2

    def forward(self, input_ids: Tensor, input_ids_2: Tensor) -> dict[str, Tensor]:
        pooled = self.text_encoder(input_ids, output_hidden_states=False).pooler_output
        hidden = self.text_encoder_2(input_ids_2, output_hidden_states=False)[0]
        return dict(zip(self.output_names, (pooled, hidden), strict=True))


def _flux(pipeline: Any, max_sequence_length: int) -> Encoders:
    return Encoders(
        FluxEncoders(pipeline),
        FluxEncoders.output_names,
        (
            convert_tokenizer(pipeline.tokenizer, "input_ids", pipeline.tokenizer_max_length),
            convert_tokenizer(pipeline.tokenizer_2, "input_ids_2", max_sequence_length),
        ),
    )


# --- Qwen-Image


class QwenImageEncoders(nn.Module):
    """The last hidden states of Qwen2.5-VL's language model behind the template's head, zero at padding, with their
    mask.
    """

    output_names = ("encoder_hidden_states", "encoder_hidden_states_mask")

    def __init__(self, pipeline: Any) -> None:
        super().__init__()
        self.language_model = pipeline.text_encoder.model.language_model
        self.dropped = pipeline.prompt_template_encode_start_idx
        self.pad_id = pipeline.tokenizer.pad_token_id

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        hidden = self.language_model(input_ids, use_cache=False).last_hidden_state[:, self.dropped :]
        mask = _mask(input_ids, self.pad_id)[:, self.dropped :]
        return dict(zip(self.output_names, (hidden * mask[..., None].to(hidden.dtype), mask), strict=True))


def _qwen_image(pipeline: Any, max_sequence_length: int) -> Encoders:
    length = pipeline.prompt_template_encode_start_idx + max_sequence_length
    specification = convert_tokenizer(pipeline.tokenizer, "input_ids", length, pipeline.prompt_template_encode)
    return Encoders(QwenImageEncoders(pipeline), QwenImageEncoders.output_names, (specification,))


# --- HunyuanVideo


class HunyuanVideoEncoders(nn.Module):
    """Llama's hidden states before its last two layers, behind the template's head, with their mask; CLIP's pooled
    output.
    """

    output_names = ("encoder_hidden_states", "encoder_attention_mask", "pooled_projections")

    def __init__(self, pipeline: Any, dropped: int) -> None:
        super().__init__()
        self.text_encoder, self.text_encoder_2 = pipeline.text_encoder, pipeline.text_encoder_2
        self.dropped = dropped
        self.pad_id = pipeline.tokenizer.pad_token_id

    def forward(self, input_ids: Tensor, input_ids_2: Tensor) -> dict[str, Tensor]:
        states = self.text_encoder(input_ids, output_hidden_states=True, use_cache=False).hidden_states
        hidden = states[-3][:, self.dropped :]
        mask = _mask(input_ids, self.pad_id)[:, self.dropped :].to(hidden.dtype)
        pooled = self.text_encoder_2(input_ids_2, output_hidden_states=False).pooler_output
        return dict(zip(self.output_names, (hidden, mask, pooled), strict=True))


def _hunyuan_video(pipeline: Any, max_sequence_length: int) -> Encoders:
    from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE

    template: Any = DEFAULT_PROMPT_TEMPLATE["template"]
    dropped: Any = DEFAULT_PROMPT_TEMPLATE["crop_start"]
    return Encoders(
        HunyuanVideoEncoders(pipeline, dropped),
        HunyuanVideoEncoders.output_names,
        (
            convert_tokenizer(pipeline.tokenizer, "input_ids", dropped + max_sequence_length, template),
            convert_tokenizer(pipeline.tokenizer_2, "input_ids_2", CLIP_LENGTH),
        ),
    )


# --- Stable Diffusion 3


class StableDiffusion3Encoders(nn.Module):
    """Two CLIPs side by side, padded to T5's width and followed by T5; both CLIPs' projections as pooled output."""

    output_names = ("encoder_hidden_states", "pooled_projections")

    def __init__(self, pipeline: Any) -> None:
        super().__init__()
        self.text_encoder, self.text_encoder_2 = pipeline.text_encoder, pipeline.text_encoder_2
        self.text_encoder_3 = pipeline.text_encoder_3

    def forward(self, input_ids: Tensor, input_ids_2: Tensor, input_ids_3: Tensor) -> dict[str, Tensor]:
        first = self.text_encoder(input_ids, output_hidden_states=True)
        second = self.text_encoder_2(input_ids_2, output_hidden_states=True)
        third = self.text_encoder_3(input_ids_3)[0]
        clip = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
        clip = nn.functional.pad(clip, (0, third.shape[-1] - clip.shape[-1]))
        hidden, pooled = torch.cat([clip, third], dim=-2), torch.cat([first[0], second[0]], dim=-1)
        return dict(zip(self.output_names, (hidden, pooled), strict=True))


def _stable_diffusion_3(pipeline: Any, max_sequence_length: int) -> Encoders:
    length = pipeline.tokenizer_max_length
    return Encoders(
        StableDiffusion3Encoders(pipeline),
        StableDiffusion3Encoders.output_names,
        (
            convert_tokenizer(pipeline.tokenizer, "input_ids", length),
            convert_tokenizer(pipeline.tokenizer_2, "input_ids_2", length),
            convert_tokenizer(pipeline.tokenizer_3, "input_ids_3", max_sequence_length),
        ),
    )


# --- one T5: PixArt-Sigma, Wan


class T5Encoder(nn.Module):
    """Hidden states of T5 and the mask of its tokens; without the mask as output, hidden states are zero at padding."""

    def __init__(self, pipeline: Any, *, masked: bool) -> None:
        super().__init__()
        self.text_encoder = pipeline.text_encoder
        self.pad_id = pipeline.tokenizer.pad_token_id
        self.masked = masked

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        mask = _mask(input_ids, self.pad_id)
        hidden = self.text_encoder(input_ids, attention_mask=mask)[0]
        if self.masked:
            return {"encoder_hidden_states": hidden * mask[..., None].to(hidden.dtype)}
        return {"encoder_hidden_states": hidden, "encoder_attention_mask": mask}


def _pixart_sigma(pipeline: Any, max_sequence_length: int) -> Encoders:
    specification = convert_tokenizer(pipeline.tokenizer, "input_ids", max_sequence_length, lower=True)
    names = ("encoder_hidden_states", "encoder_attention_mask")
    return Encoders(T5Encoder(pipeline, masked=False), names, (specification,))


def _wan(pipeline: Any, max_sequence_length: int) -> Encoders:
    specification = convert_tokenizer(pipeline.tokenizer, "input_ids", max_sequence_length)
    return Encoders(T5Encoder(pipeline, masked=True), ("encoder_hidden_states",), (specification,))


# --- DiT

NULL_LABEL = 1000
"""What DiTPipeline gives the negative branch; here also what an unknown label is."""


class Labels(nn.Module):
    """Token ids → classes: several words may mean the same one, which a file of words cannot say."""

    classes: Tensor

    def __init__(self, classes: Sequence[int]) -> None:
        super().__init__()
        self.register_buffer("classes", torch.tensor(classes, dtype=torch.int64))

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        return {"class_labels": self.classes[input_ids[:, 0]]}


def _dit(pipeline: Any, _: int) -> Encoders:
    classes = {**(class_numbers(pipeline) or {}), "": NULL_LABEL}
    words = {word: position for position, word in enumerate(classes)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token=""))
    specification = TokenizerSpec("input_ids", tokenizer.to_str(), 1, words[""])
    return Encoders(Labels(list(classes.values())), ("class_labels",), (specification,))


CLIP_LENGTH = 77
"""What HunyuanVideoPipeline pads CLIP's prompts to."""
_TWO = ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2")
FAMILIES = {
    "FluxPipeline": Family(_TWO, _flux),
    "QwenImagePipeline": Family(_TWO[:2], _qwen_image),
    "HunyuanVideoPipeline": Family(_TWO, _hunyuan_video),
    "StableDiffusionPipeline": Family(_TWO[:2], _stable_diffusion),
    "StableDiffusionXLPipeline": Family(_TWO, _stable_diffusion_xl),
    "StableDiffusion3Pipeline": Family((*_TWO, "tokenizer_3", "text_encoder_3"), _stable_diffusion_3),
    "PixArtSigmaPipeline": Family(_TWO[:2], _pixart_sigma),
    "WanPipeline": Family(_TWO[:2], _wan),
    "DiTPipeline": Family(("labels",), _dit),
}
"""Pipelines that are served from the prompt on, by class name. To add one: encoders as a module, and their tokenizers.
"""
