"""Final latents → the pipeline's own pictures."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .call import CallOptions, short_call
from .invoke import invoke
from .prompts import any_prompts


def decode_latents(pipeline: Any, options: CallOptions, latents: Tensor) -> Tensor:
    """Final latents (n, …) → the pipeline's own pictures, float32 (n, [frames,] height, width, 3) in [0, 1].

    The pipeline runs two steps (Mochi's times cannot be fewer), whose results are replaced by the latents: it decodes
    them in whatever way it has.
    """
    count, scheduler = len(latents), pipeline.scheduler

    def step(model_output: Tensor, timestep: Any, sample: Tensor, *_: Any, return_dict: bool = True, **__: Any) -> Any:
        final = latents.repeat(len(sample) // count, *[1] * (latents.ndim - 1)).to(sample)
        return SimpleNamespace(prev_sample=final) if return_dict else (final,)

    arguments = short_call(pipeline, options).arguments(1.0, count) | {"output_type": "np"}
    scheduler.step = step
    try:
        with _one_by_one(getattr(pipeline, "vae", None)):
            generators = [torch.Generator() for _ in range(count)]
            made = invoke(pipeline, {**any_prompts(pipeline, count), "generator": generators, **arguments})
    finally:
        del scheduler.step
    return torch.from_numpy(np.asarray(made[0], np.float32))


@contextlib.contextmanager
def _one_by_one(vae: Any) -> Iterator[None]:
    """While it lasts, an autoencoder that can decodes samples one by one: HunyuanVideo 1.5's takes no more than one."""
    if not hasattr(vae, "use_slicing"):
        yield
        return
    before, vae.use_slicing = vae.use_slicing, True
    try:
        yield
    finally:
        vae.use_slicing = before
