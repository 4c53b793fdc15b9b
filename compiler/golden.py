"""The golden request: one held-out prompt at the smallest budget with the latents that torch makes of it on the build host.

`otc verify --level golden` runs it again wherever the artifact is served. The latents come out of pass `evaluate`, which runs
them anyway, so the record costs no evaluation and is as deterministic as the rest of the manifest.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from otcache.schemas.manifest import Golden

PATH = "golden/latents.f32"
TOLERANCE = 1e-3
"""Served latents of a float32 artifact differ from torch's by 1e-6 to 1e-5 of their size; a wrong program by 1e-1."""
STAGES_TO_LATENTS = 20.0
"""How much the steps of a sampler are let amplify the error of one evaluation of the exported trunk."""


def golden_record(
    *, prompt: str, budget: int, seed: int, guidance_scale: float | None, max_relative_error: float
) -> Golden:
    """The manifest's record. max_relative_error: of the exported trunk against torch, which a host may have as well."""
    return Golden(
        prompt=prompt, budget=str(budget), seed=seed, guidance_scale=guidance_scale, latents=PATH,
        max_relative_error=min(1.0, max(TOLERANCE, STAGES_TO_LATENTS * max_relative_error)),
    )  # fmt: skip


def write_golden(folder: Path, latents: np.ndarray) -> None:
    """Write the final latents of one sample, float32 of the manifest's `latents.shape`, into an artifact's folder."""
    path = folder / PATH
    path.parent.mkdir()
    path.write_bytes(np.ascontiguousarray(latents, "<f4").tobytes())
