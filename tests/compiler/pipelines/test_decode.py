"""Pictures that are too large for the device are decoded in tiles, with a note, and only where that is so."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL

from otcache.compiler.pipelines.decode import decode_with_tiles


@pytest.fixture
def vae():
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=2,
        sample_size=16,
        mid_block_add_attention=False,
    ).eval()


def room_for(vae, elements):
    """Let the decoder take no more latents at once, as a device without more memory would."""

    def check(module, args):
        if args[0].numel() > elements:
            raise torch.OutOfMemoryError("tried to allocate 2 GiB")

    vae.decoder.register_forward_pre_hook(check)


def run(vae, latents):
    notes = []
    with torch.no_grad():
        pictures = decode_with_tiles(vae, latents, lambda part: vae.decode(part).sample, notes.append)
    return pictures, notes


def test_what_fits_is_decoded_whole(vae):
    latents = torch.randn(2, 4, 16, 16)
    pictures, notes = run(vae, latents)
    assert torch.equal(pictures, vae.decode(latents).sample) and not notes and not vae.use_tiling


def test_one_sample_that_does_not_fit_is_decoded_in_tiles(vae):
    latents = torch.randn(1, 4, 16, 16)
    whole = vae.decode(latents).sample
    room_for(vae, 4 * 8 * 8)
    pictures, notes = run(vae, latents)
    assert len(notes) == 1 and notes[0].startswith(
        "AutoencoderKL is out of memory with one sample: it decodes in tiles"
    )
    assert vae.use_tiling and torch.equal(pictures, vae.decode(latents).sample)
    assert pictures.shape == whole.shape and not torch.equal(pictures, whole)
    assert run(vae, latents)[1] == [], "said once"


def test_several_samples_and_tiles_that_are_too_large_are_left_to_the_caller(vae):
    room_for(vae, 4 * 4 * 4)
    for count in (2, 1):
        with pytest.raises(torch.OutOfMemoryError):
            run(vae, torch.randn(count, 4, 16, 16))
    assert vae.use_tiling, "tried with the one"
    with pytest.raises(ValueError, match="another"):
        decode_with_tiles(vae, torch.zeros(1, 4, 4, 4), lambda part: int("another"), print)
