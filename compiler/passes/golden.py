"""The golden request: one held-out prompt at the smallest budget with the latents that torch makes of it on the build
host.

`otc verify --level golden` runs it again wherever the artifact is served. The latents come out of pass `evaluate`,
which runs them anyway in float32, so the record is as deterministic as the rest of the manifest. How far a host may be
from them is measured as well where engines compute in half precision: the same request is run in torch with the stages
that were exported.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from otcache.schemas.manifest import Golden
from otcache.schemas.program import Program

from ..calibration.rollout import StagedModel, residual_memory, roll_out
from ..export.precision import Served
from ..pipelines.denoiser import Denoiser
from .crew import AnyRuns
from .session import Session

PATH = "golden/latents.f32"
TOLERANCE = 1e-3
"""Served latents of a float32 artifact differ from torch's by 1e-6 to 1e-5 of their size; a wrong program by 1e-1."""
STAGES_TO_LATENTS = 20.0
"""How much the steps of a sampler are let amplify the error of one evaluation of the exported trunk, in float32."""
ROUNDINGS = 3.0
"""How many times as far from float32 as torch in half precision a host may be that rounds at other places."""


def tolerance_of(max_relative_error: float, rounding: float | None) -> float:
    """How far a host's latents may be from the golden ones, relative to their size.

    Args:
        max_relative_error: of the exported float32 trunk against torch, which a host may have as well.
        rounding: of an artifact in half precision, what that alone comes to (`rounding_of`).
    """
    expected = STAGES_TO_LATENTS * max_relative_error if rounding is None else ROUNDINGS * rounding
    return min(1.0, max(TOLERANCE, expected))


def rounding_of(served: Served, program: Program, denoiser: Denoiser, latents: Tensor, golden: np.ndarray) -> float:
    """‖x − g‖₂ / ‖g‖₂ of the golden latents g and those, x, that torch makes with the stages as they are served.

    Args:
        served: the trunk as it is exported, on the CPU.
        program: of the golden request's budget.
        denoiser: of the golden request, on the CPU in float32.
        latents: its first ones, float32 (1, …).
        golden: its final ones, float32 (…).
    """
    staged = StagedModel(served.stages, denoiser, keep=residual_memory(program), cast=served.inputs_of)
    found = roll_out(program, denoiser, latents, staged=staged).numpy()[0]
    return float(np.linalg.norm((found - golden).astype(np.float64)) / np.linalg.norm(golden.astype(np.float64)))


def first_denoiser(session: Session, runs: AnyRuns) -> Denoiser:
    """The denoiser of the first sample of full runs, for a model on the CPU in float32."""
    first = slice(1)
    return Denoiser(
        transformer=session.model.transformer,
        interface=session.interface,
        conditioning={name: _float32(value) for name, value in runs.conditioning(first).items()},
        guidance=torch.from_numpy(runs.guidance(first)),
    )


def _float32(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value


def golden_record(
    *, prompt: str, budget: int, seed: int, guidance_scale: float | None, max_relative_error: float
) -> Golden:
    """The manifest's record. max_relative_error: see `tolerance_of`."""
    return Golden(
        prompt=prompt,
        budget=str(budget),
        seed=seed,
        guidance_scale=guidance_scale,
        latents=PATH,
        max_relative_error=max_relative_error,
    )


def write_golden(folder: Path, latents: np.ndarray) -> None:
    """Write the final latents of one sample, float32 of the manifest's `latents.shape`, into an artifact's folder."""
    path = folder / PATH
    path.parent.mkdir()
    path.write_bytes(np.ascontiguousarray(latents, "<f4").tobytes())
