"""Pass `capture`: session + prompts → Trajectory, in chunks that the workspace keeps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..pipelines.full_run import capture
from ..pipelines.trajectory import Trajectory
from ..workspace.progress import Pass
from .session import Session


def calibration_scales(minimum: float, maximum: float, count: int, margin: float = 1.0) -> list[float]:
    """Guidance scales of `count` samples: one value, or three that cover the range in turn; every fourth one times
    `margin`.
    """
    levels = [minimum] if minimum == maximum else [minimum, (minimum + maximum) / 2, maximum]
    return [levels[i % len(levels)] * (margin if i % 4 == 3 else 1.0) for i in range(count)]


CAPTURE_CHUNK = 8
"""Full runs that are kept together: an interrupted capture redoes at most these."""


def capture_key(session: Session, prompts: Sequence[str], seed: int, scales: Sequence[float]) -> Any:
    """What a chunk of full runs depends on, for the workspace."""
    return [session.key, list(prompts), seed, list(scales)]


def capture_chunks(count: int) -> list[slice]:
    """How full runs are cut into chunks that are kept one by one."""
    return [slice(start, min(start + CAPTURE_CHUNK, count)) for start in range(0, count, CAPTURE_CHUNK)]


def full_runs(session: Session, name: str, prompts: Sequence[str], seed: int, margin: float = 1.0) -> Trajectory:
    """Full runs of `prompts` at consecutive seeds, from the workspace where they were made before."""
    scales = calibration_scales(*session.options.guidance_scale, len(prompts), margin)
    steps = session.call.num_inference_steps

    def chunk(rows: slice, advance: Pass) -> dict[str, np.ndarray]:
        own, seeds = prompts[rows], [seed + i for i in range(rows.start, rows.stop)]

        def progress(done: int, total: int) -> None:
            advance(steps * rows.start + steps * len(own) * done // total, steps * len(prompts))

        def compute() -> dict[str, np.ndarray]:
            model = session.model
            found = capture(
                model.pipeline, session.interface, session.call, own, seeds, scales[rows], progress=progress
            )
            advance.facts["evaluations"] += len(found.timesteps) * len(own)
            arrays = {f"conditioning.{key}": _array(value) for key, value in found.conditioning.items()}
            return arrays | {
                "latents": found.latents.numpy(),
                "outputs": found.outputs.numpy(),
                "timesteps": np.asarray(found.timesteps),
            }

        return session.workspace.arrays(name, capture_key(session, own, seeds[0], scales[rows]), compute)

    with session.reporter.on(name, f"{len(prompts)} full runs") as advance:
        advance.facts["evaluations"] = 0
        parts = [chunk(rows, advance) for rows in capture_chunks(len(prompts))]
        names = [key for key in parts[0] if key != "timesteps"]
        if len({tuple(part[key].shape[2:] for key in names) for part in parts}) > 1:
            # A pipeline that pads prompts to the longest one of a call: they have to be in one call.
            parts = [chunk(slice(0, len(prompts)), advance)]
        charged = len(parts[0]["timesteps"]) * len(prompts)
        advance.facts["evaluations_reused"] = max(charged - advance.facts["evaluations"], 0)
    arrays = {key: np.concatenate([part[key] for part in parts], axis=1) for key in names}
    arrays["timesteps"] = parts[0]["timesteps"]
    dtype = next(session.model.transformer.parameters()).dtype
    kept = {name: torch.from_numpy(arrays[f"conditioning.{name}"]) for name in session.interface.conditioning}
    conditioning = {name: value.to(dtype) if value.is_floating_point() else value for name, value in kept.items()}
    return Trajectory(
        latents=torch.from_numpy(arrays["latents"]),
        outputs=torch.from_numpy(arrays["outputs"]),
        conditioning=conditioning,
        guidance=torch.tensor(scales),
        timesteps=tuple(arrays["timesteps"].tolist()),
    )


def _array(value: Tensor) -> np.ndarray:
    """For the workspace, which has no bfloat16."""
    array: np.ndarray = (value.float() if value.is_floating_point() else value).numpy()
    return array
