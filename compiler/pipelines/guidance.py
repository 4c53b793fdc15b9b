"""Guidance: which scales a calibration covers, and how a pipeline combines its two branches, found from what it
computed.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from otcache.schemas.errors import ModelError


def with_norm_of(positive: Tensor, combined: Tensor) -> Tensor:
    """`combined` with vectors along the last axis as long as those of `positive`."""
    return combined * (positive.norm(dim=-1, keepdim=True) / combined.norm(dim=-1, keepdim=True).clamp(min=1e-30))


def find_guidance(
    outputs: list[Tensor], guided: Tensor, scale: float, name: str, *, exact: bool
) -> tuple[bool, bool, bool, float]:
    """Whether two branches are guidance, whether the positive one comes first, whether its norm is kept; and the sign.

    The sign is −1 for a pipeline that negates its model's output. exact: the pipeline computed in float32.
    """
    found: dict[tuple[bool, bool, bool, float], float] = {}
    guided_by_two = len(outputs) == 2
    for sign in (1.0, -1.0):
        if not guided_by_two:
            found[False, False, False, sign] = _distance(sign * outputs[0], guided)
            continue
        for positive_first, (positive, negative) in ((True, outputs), (False, outputs[::-1])):
            combined = negative + scale * (positive - negative)
            for keep_norm, expected in ((False, combined), (True, with_norm_of(positive, combined))):
                found[True, positive_first, keep_norm, sign] = _distance(sign * expected, guided)
    best = min(found, key=lambda way: found[way])
    if found[best] < (1e-3 if exact else 3e-2):
        return best
    if not guided_by_two:
        raise ModelError(f"{name} changes the transformer's output before the scheduler's step: not supported")
    if outputs[0].shape != guided.shape:
        raise ModelError(
            f"{name} hands the scheduler {tuple(guided.shape)} of the model's {tuple(outputs[0].shape)}: not supported"
        )
    basis = torch.stack([output.flatten() for output in outputs], dim=1).double()
    weights = torch.linalg.lstsq(basis, guided.flatten().double()[:, None]).solution.flatten()
    listed = ", ".join(f"{weight:.3f}" for weight in weights)
    raise ModelError(f"{name} combines its branches with weights {listed}: expected {scale} and {1 - scale}")


def _distance(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖; infinite where shapes differ."""
    return float((found - expected).norm() / expected.norm()) if found.shape == expected.shape else math.inf
