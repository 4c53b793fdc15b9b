"""How a pipeline packs the noise that it draws into latents, found from both."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from otcache.schemas.arithmetic import latents_from_noise
from otcache.schemas.errors import ModelError


def find_layout(
    noise_shape: tuple[int, ...], samples: Tensor, name: str, dtype: torch.dtype = torch.float32
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """How noise is packed into latents: sizes that it is split into, and their order.

    A packing is a walk through the noise in nested loops. They are read off, the innermost first: the loop's stride is
    where the next value of the latents stands in the noise, its size is how far the walk goes on like that.

    Args:
        noise_shape: of one sample's noise, as the pipeline draws it.
        samples: the first latents of seeds 0, 1, …, float32 (n, …).
        name: of the pipeline, for messages.
        dtype: in which the pipeline draws.
    """
    tolerance = 1e-3 if dtype.itemsize >= 4 else 3e-2
    noise = torch.cat(
        [
            torch.randn(1, *noise_shape, generator=torch.Generator().manual_seed(seed), dtype=dtype).float()
            for seed in range(len(samples))
        ]
    )
    flat, latents = noise.flatten(1).double(), samples.flatten(1).double()
    unknown = ModelError(
        f"{name} arranges noise {noise_shape} as latents {tuple(samples.shape[1:])} in a way that is not known"
    )
    if flat.shape != latents.shape:
        raise unknown
    latents = latents * (flat.norm() / latents.norm())
    loops: list[tuple[int, int]] = []  # (stride, size), innermost first
    done, count = 1, flat.shape[1]
    while done < count:
        stride = int((flat - latents[:, done : done + 1]).abs().sum(0).argmin())
        if not stride:
            raise unknown
        heads, walked = latents[:, ::done], flat[:, ::stride]
        both = min(heads.shape[1], walked.shape[1])
        agrees = (heads[:, :both] - walked[:, :both]).abs().amax(0) < tolerance
        size = both if bool(agrees.all()) else int(agrees.int().argmin())
        if size < 2 or count % (done * size):
            raise unknown
        loops.append((stride, size))
        done *= size
    order = sorted(loops, reverse=True)
    split = tuple(size for _, size in order)
    permutation = tuple(order.index(loop) for loop in reversed(loops))
    arranged = latents_from_noise(noise, split, permutation) if math.prod(split) == count else None
    if arranged is None or not proportional(arranged.reshape(samples.shape), samples, tolerance):
        raise unknown
    return split, permutation


def proportional(value: Tensor, sample: Tensor, tolerance: float = 1e-3) -> bool:
    """Whether a tensor is a multiple of another of its shape, up to so much of its largest value."""
    scale = (value * sample).sum() / sample.square().sum()
    return bool((value - scale * sample).abs().max() <= tolerance * value.abs().max())
