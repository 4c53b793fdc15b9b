"""Several requests as one: texts and noise side by side, for one run of the engines.

A request's pictures are then those that it gets alone up to rounding: products of larger matrices add up in another
order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from .request import Request, noise_of


def can_join(one: Request, other: Request) -> bool:
    """Whether both have one budget, size and guidance, and say in words what they want."""
    return (
        one.budget == other.budget
        and one.manifest is other.manifest
        and one.guidance_weights == other.guidance_weights
        and bool(one.texts)
        and bool(other.texts)
    )


def joined(requests: Sequence[Request]) -> Request:
    """One request for the pictures of all, in their order. A single one is given back as it is."""
    if len(requests) == 1:
        return requests[0]
    branches = range(len(requests[0].texts))
    texts = tuple(tuple(text for one in requests for text in _text_of_each(one, branch)) for branch in branches)
    latents = np.concatenate([noise_of(one) for one in requests])
    samples = sum(one.samples for one in requests)
    return dataclasses.replace(requests[0], texts=texts, latents=latents, samples=samples)


def _text_of_each(request: Request, branch: int) -> list[str | None]:
    """A text for each picture, (n,)."""
    texts = request.texts[branch]
    return [text for text in texts for _ in range(request.samples // len(texts))]
