"""Part of pass `export`: a pipeline's decoder as one module, from final latents to pictures.

It undoes what pipelines commonly do between the last step and the autoencoder (pack, scale, shift), and is tried
against the pictures that the pipeline itself makes: where they differ the artifact has no decoder, and ends in latents.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

_log = logging.getLogger(__name__)

PICTURES_AGREE = 2e-3
"""Largest difference of a decoder from the pipeline, of a range of 1: half a level of 8 bits."""
PICTURES_AGREE_HALF = 5e-2
"""The same of an autoencoder in half precision, whose pictures are of some 2^8 levels and are computed in another
order: latents are scaled in float32 here, and in half precision by pipelines. A wrong scale is off by 1e-1 and more.
"""


class LatentDecoder(nn.Module):
    """Final latents, as the scheduler sees them → pictures float32 (batch, [frames,] height, width, 3) in [0, 1].

    Args:
        pipeline: whose autoencoder decodes.
        size: height and width in pixels, for a pipeline that packs latents; None where latents come unpacked.
        device: where it gets latents.
    """

    def __init__(self, pipeline: Any, size: tuple[int, int] | None, device: torch.device | str = "cpu") -> None:
        super().__init__()
        self.vae = pipeline.vae
        self.size = size or (0, 0)
        self.vae_scale_factor = getattr(pipeline, "vae_scale_factor", None)
        self.unpack = None if size is None else getattr(type(pipeline), "_unpack_latents", None)
        config = self.vae.config
        mean, std = config.get("latents_mean"), config.get("latents_std")
        if mean is not None and std is not None:
            scale, shift = torch.tensor(std, dtype=torch.float32), torch.tensor(mean, dtype=torch.float32)
        else:
            scale = torch.tensor([1.0 / config.scaling_factor], dtype=torch.float32)
            shift = torch.tensor([config.get("shift_factor") or 0.0], dtype=torch.float32)
        self.scale: Tensor
        self.shift: Tensor
        self.register_buffer("scale", scale.to(device), persistent=False)
        self.register_buffer("shift", shift.to(device), persistent=False)

    def forward(self, latents: Tensor) -> Tensor:
        if self.unpack is not None:
            latents = self.unpack(latents, *self.size, self.vae_scale_factor)
        channels = (1, -1, *[1] * (latents.ndim - 2))
        latents = latents * self.scale.reshape(channels) + self.shift.reshape(channels)
        images = self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0]
        images = images.float() / 2  # one by one, so that no more than two videos are in memory
        images = images + 0.5
        return images.clamp(0, 1).movedim(1, -1)


class FirstFrame(nn.Module):
    """A decoder of videos that makes pictures: its first frame."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, latents: Tensor) -> Tensor:
        frames: Tensor = self.decoder(latents)
        return frames[:, 0]


def make_latent_decoder(pipeline: Any, latents: Tensor, pictures: Tensor, height: int, width: int) -> nn.Module | None:
    """Make the decoder for one size, a module from final latents to pictures.

    Args:
        pipeline: a diffusers pipeline.
        latents: an example (n, …), as the scheduler leaves them.
        pictures: what the pipeline makes of it, float32 (n, [frames,] height, width, 3) in [0, 1].
        height: of the pictures in pixels.
        width: of the pictures in pixels.

    Returns:
        The decoder; None where the pipeline decodes in a way of its own, so that `latents` do not give `pictures`.
    """
    if not hasattr(getattr(pipeline, "vae", None), "decode"):
        return None
    try:
        decoder, found = _try(LatentDecoder(pipeline, (height, width), latents.device), latents, pictures)
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        _log.info("%s decodes in a way of its own: %s", type(pipeline).__name__, error)
        return None
    half = pipeline.vae.dtype.itemsize < 4
    return decoder if _agree(found, pictures, PICTURES_AGREE_HALF if half else PICTURES_AGREE) else None


def unpacked_shape(pipeline: Any, latents: Tensor, height: int, width: int) -> tuple[int, ...] | None:
    """The shape that one sample's latents have when they are decoded; None for a pipeline that does not pack them."""
    unpack = getattr(type(pipeline), "_unpack_latents", None)
    return None if unpack is None else tuple(unpack(latents, height, width, pipeline.vae_scale_factor).shape[1:])


def make_noise_order_decoder(pipeline: Any, examples: Sequence[tuple[Tensor, Tensor]]) -> nn.Module | None:
    """Make a decoder that knows no height and width, from latents in the order of the noise to pictures.

    Args:
        pipeline: a diffusers pipeline.
        examples: latents (n, …) of some sizes, unpacked or never packed, and the pictures that the pipeline makes of
            them, float32 (n, [frames,] height, width, 3) in [0, 1].

    Returns:
        The decoder; None where the pictures are others.
    """
    decoder: nn.Module = LatentDecoder(pipeline, None)
    try:
        for latents, pictures in examples:
            decoder, found = _try(decoder, latents, pictures)
            if not _agree(found, pictures):
                return None
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        _log.info("%s decodes in a way of its own: %s", type(pipeline).__name__, error)
        return None
    return decoder


@torch.no_grad()
def _try(decoder: nn.Module, latents: Tensor, pictures: Tensor) -> tuple[nn.Module, Tensor]:
    """Run a decoder on latents; returns it, of its first frame where `pictures` have none, and what it makes."""
    found: Tensor = decoder.eval()(latents).to(pictures.device)
    if found.ndim == pictures.ndim + 1 and found.shape[1] == 1:
        return FirstFrame(decoder).eval(), found[:, 0]
    return decoder, found


def _agree(found: Tensor, pictures: Tensor, limit: float = PICTURES_AGREE) -> bool:
    if found.shape != pictures.shape:
        return False
    rows = zip(found.flatten(0, -4), pictures.flatten(0, -4), strict=True)
    return max(float((row - expected).abs().max()) for row, expected in rows) < limit
