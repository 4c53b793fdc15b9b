"""The size that a pipeline draws where its call names none, asked of the pipeline itself."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np

from .invoke import Stop, invoke

AXES = ("height", "width", "num_frames")


def own_size(pipeline: Any, arguments: Mapping[str, Any]) -> dict[str, int]:
    """Height, width and frames of what `pipeline(**arguments)` draws, as far as it says them.

    The call ends where it prepares latents, which is told the size; a pipeline that never does is run, in two steps.

    Args:
        pipeline: a diffusers pipeline.
        arguments: of its call: prompts, a generator, and what the user chose of the size.
    """
    prepare = getattr(pipeline, "prepare_latents", None)
    if prepare is None:
        pictures = np.asarray(invoke(pipeline, {**arguments, "num_inference_steps": 2, "output_type": "np"})[0])
        *_, height, width, _ = pictures.shape
        return {"height": height, "width": width}
    signature = inspect.signature(prepare)
    told: dict[str, int] = {}

    def ask(*args: Any, **kwargs: Any) -> None:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        told.update({name: int(value) for name in AXES if (value := bound.arguments.get(name)) is not None})
        raise Stop

    pipeline.prepare_latents = ask
    try:
        with contextlib.suppress(Stop):
            invoke(pipeline, arguments)
    finally:
        del pipeline.prepare_latents
    return told
