"""Part of pass `export`: what turns a prompt into conditioning and final latents into pictures, without torch at serve time.

Consumes a diffusers pipeline. Produces two modules that `export_module` can take, the text encoders and the latent
decoder, and the tokenizers as JSON of the `tokenizers` library, checked against the pipeline's own calls.

Every pipeline class wires its encoders in its own way: `FAMILIES` holds one entry per class that is supported.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import tokenizers
import torch
from torch import Tensor, nn

from otcache.schemas.errors import ModelError

EXAMPLE_BATCH = 2
PROBES = (
    "",
    "a small red ring on blue",
    "A Photo,  of: two (2) CATS!",
    "a café – naïve 北京 🙂 ﬁne ½",
    "one two three four five six seven eight nine ten " * 60,
)
"""Prompts on which the exported tokenizers are compared: empty, plain, punctuation, Unicode, and one that is cut."""


@dataclass(frozen=True)
class TokenizerSpec:
    """A tokenizer of the text encoder: encode, cut to `length`, pad on the right with `pad_id`."""

    input_name: str
    tokenizer_json: str
    length: int
    pad_id: int

    def load(self) -> tokenizers.Tokenizer:
        """Ready to encode prompts to `length` ids, as the runtime does it."""
        tokenizer = tokenizers.Tokenizer.from_str(self.tokenizer_json)
        tokenizer.enable_truncation(self.length)
        tokenizer.enable_padding(length=self.length, pad_id=self.pad_id)
        return tokenizer


class TextEncoders(nn.Module):
    """CLIP and T5 as FluxPipeline runs them.

    input_ids int64 (batch, L1), input_ids_2 int64 (batch, L2) →
    pooled_projections (batch, d1), encoder_hidden_states (batch, L2, d2).
    """

    output_names = ("pooled_projections", "encoder_hidden_states")

    def __init__(self, text_encoder: nn.Module, text_encoder_2: nn.Module) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.text_encoder_2 = text_encoder_2

    def forward(self, input_ids: Tensor, input_ids_2: Tensor) -> dict[str, Tensor]:
        pooled = self.text_encoder(input_ids, output_hidden_states=False).pooler_output
        hidden = self.text_encoder_2(input_ids_2, output_hidden_states=False)[0]
        return dict(zip(self.output_names, (pooled, hidden), strict=True))


class LatentDecoder(nn.Module):
    """Final latents, as the scheduler sees them → images float32 (batch, height, width, 3) in [0, 1]."""

    def __init__(self, pipeline: Any, height: int, width: int) -> None:
        super().__init__()
        self.vae = pipeline.vae
        self.size = (height, width)
        self.vae_scale_factor = pipeline.vae_scale_factor
        self.unpack = getattr(type(pipeline), "_unpack_latents", None)
        config = self.vae.config
        mean, std = config.get("latents_mean"), config.get("latents_std")
        if mean is not None and std is not None:
            # `reshape` takes any rank of latents: channels are dimension 1.
            scale, shift = torch.tensor(std, dtype=torch.float32), torch.tensor(mean, dtype=torch.float32)
        else:
            scale = torch.tensor([1.0 / config.scaling_factor], dtype=torch.float32)
            shift = torch.tensor([config.get("shift_factor") or 0.0], dtype=torch.float32)
        self.scale: Tensor
        self.shift: Tensor
        self.register_buffer("scale", scale.reshape(1, -1, 1, 1), persistent=False)
        self.register_buffer("shift", shift.reshape(1, -1, 1, 1), persistent=False)

    def forward(self, latents: Tensor) -> Tensor:
        if self.unpack is not None:
            latents = self.unpack(latents, *self.size, self.vae_scale_factor)
        latents = latents * self.scale + self.shift
        images = self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0]
        return (images.float() / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)


@dataclass(frozen=True)
class Family:
    """How the pipelines of one class encode prompts and decode latents."""

    text_encoders: Callable[[Any, int], tuple[nn.Module, dict[str, Tensor], tuple[TokenizerSpec, ...]]]
    latents: Callable[[Any, int, int], Tensor]
    """(pipeline, height, width) → example of the final latents, batch `EXAMPLE_BATCH`."""


def text_encoders(
    pipeline: Any, max_sequence_length: int
) -> tuple[nn.Module, dict[str, Tensor], tuple[TokenizerSpec, ...]]:
    """The pipeline's text encoders as one module, an example of its inputs, and the tokenizers that feed it.

    The module has `output_names`: the transformer's keyword arguments that it makes.

    Args:
        pipeline: a diffusers pipeline of a class in `FAMILIES`.
        max_sequence_length: as the pipeline's call takes it.

    Raises:
        ModelError: another pipeline class, or a tokenizer that JSON cannot express.
    """
    return _family(pipeline).text_encoders(pipeline, max_sequence_length)


def latent_decoder(pipeline: Any, height: int, width: int) -> tuple[nn.Module, dict[str, Tensor]]:
    """Module from final latents to images float32 (batch, height, width, 3) in [0, 1], and an example of its input.

    Args:
        pipeline: a diffusers pipeline of a class in `FAMILIES`.
        height, width: of the images in pixels, baked into the module.

    Raises:
        ModelError: another pipeline class, or a size that the VAE and the patches do not divide.
    """
    family = _family(pipeline)
    decoder = LatentDecoder(pipeline, height, width).eval()
    example = {"latents": family.latents(pipeline, height, width)}
    with torch.no_grad():
        shape = tuple(decoder(**example).shape)
    if shape != (EXAMPLE_BATCH, height, width, 3):
        raise ModelError(
            f"{type(pipeline).__name__} decodes to {shape[1:]}: expected ({height}, {width}, 3); "
            "take a height and width that the pipeline itself accepts"
        )
    return decoder, example


def _family(pipeline: Any) -> Family:
    name = type(pipeline).__name__
    if name not in FAMILIES:
        raise ModelError(
            f"{name}: export from prompt to picture is not available for this class, only for {', '.join(FAMILIES)}; "
            "what works: its transformer can be cut and exported (tensors in, latents out), and its scheduler replaced"
        )
    return FAMILIES[name]


# --- Flux ----------------------------------------------------------------------------------------------------------------


def _flux_text_encoders(
    pipeline: Any, max_sequence_length: int
) -> tuple[nn.Module, dict[str, Tensor], tuple[TokenizerSpec, ...]]:
    missing = [
        part
        for part in ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2")
        if getattr(pipeline, part, None) is None
    ]
    if missing:
        raise ModelError(f"FluxPipeline has no {', '.join(missing)}: expected all of them; load the pipeline whole")
    specifications = (
        tokenizer_spec(pipeline.tokenizer, "input_ids", pipeline.tokenizer_max_length),
        tokenizer_spec(pipeline.tokenizer_2, "input_ids_2", max_sequence_length),
    )
    module = TextEncoders(pipeline.text_encoder, pipeline.text_encoder_2).eval()
    prompts = PROBES[1 : 1 + EXAMPLE_BATCH]
    device = next(module.parameters()).device
    example = {spec.input_name: _ids(spec, prompts).to(device) for spec in specifications}
    return module, example, specifications


def _flux_latents(pipeline: Any, height: int, width: int) -> Tensor:
    side = 2 * pipeline.vae_scale_factor
    if height % side or width % side:
        raise ModelError(f"FluxPipeline: size {height}×{width} is no multiple of {side}: expected one; round it")
    shape = (EXAMPLE_BATCH, (height // side) * (width // side), pipeline.transformer.config.in_channels)
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator).to(next(pipeline.vae.parameters()).device)


FAMILIES = {"FluxPipeline": Family(text_encoders=_flux_text_encoders, latents=_flux_latents)}
"""Supported pipelines by class name. To add one: encoders as a module, and the shape of its latents."""


# --- tokenizers ----------------------------------------------------------------------------------------------------------


def tokenizer_spec(tokenizer: Any, input_name: str, length: int) -> TokenizerSpec:
    """A transformers tokenizer as JSON, proven to give the ids of `tokenizer(prompt, padding="max_length", …)`.

    Raises:
        ModelError: the tokenizer has no fast backend, or the ids differ on one of `PROBES`.
    """
    subject = f"{type(tokenizer).__name__} of {input_name}"
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or tokenizer.pad_token_id is None:
        lacks = "backend of the `tokenizers` library" if backend is None else "padding token"
        raise ModelError(f"{subject} has no {lacks}: expected a fast tokenizer with one; convert it with transformers")
    plain = tokenizers.Tokenizer.from_str(backend.to_str())
    plain.no_truncation()
    plain.no_padding()
    spec = TokenizerSpec(input_name, plain.to_str(), length, tokenizer.pad_token_id)
    received = _ids(spec, PROBES)
    expected = tokenizer(
        list(PROBES), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids  # fmt: skip
    for prompt, ours, theirs in zip(PROBES, received, expected, strict=True):
        if not torch.equal(ours, theirs):
            raise ModelError(
                f"{subject}: its JSON gives other ids than the pipeline for {prompt[:40]!r} ({ours[:8].tolist()}…, expected "
                f"{theirs[:8].tolist()}…); check that it pads and truncates on the right and has no preprocessing in Python"
            )
    return spec


def _ids(spec: TokenizerSpec, prompts: Sequence[str]) -> Tensor:
    """Token ids int64 (len(prompts), spec.length)."""
    return torch.tensor([encoding.ids for encoding in spec.load().encode_batch(list(prompts))], dtype=torch.int64)
