"""Final latents → the pipeline's own pictures."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .call import CallOptions, short_call
from .invoke import invoke
from .out_of_memory import is_out_of_memory, release
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


def decode_with_tiles(
    vae: Any, latents: Tensor, decode: Callable[[Tensor], Tensor], note: Callable[[str], None]
) -> Tensor:
    """What `decode` makes of latents (n, …); of one sample that is too large for the device in tiles from now on.

    Args:
        vae: the pipeline's autoencoder, or None.
        latents: final ones.
        decode: through that autoencoder.
        note: told where tiles begin.

    Raises what `decode` raises where memory is short for several samples, or tiles are no help.
    """
    try:
        return decode(latents)
    except Exception as error:
        tiles = hasattr(vae, "enable_tiling") and not getattr(vae, "use_tiling", False)
        if len(latents) > 1 or not tiles or not is_out_of_memory(error):
            raise
    release(latents.device)  # outside of the handler, whose traceback keeps tensors
    vae.enable_tiling()
    note(
        f"{type(vae).__name__} is out of memory with one sample: it decodes in tiles from now on, whose edges may "
        "show; so do the pictures that everything is compared with"
    )
    return decode(latents)


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
