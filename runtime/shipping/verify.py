"""`otc verify`: an artifact checked as far as one asks, each level with everything before it.

structure   the manifest, and that every file is there with its size
digests     the content of every file, and that ONNX files refer to no others
host        a backend of this host loads every stage
golden      the request that was stored at compile time gives the latents that were stored with it
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from otcache.schemas.errors import ArtifactError, HostError
from otcache.schemas.manifest import Golden
from otcache.schemas.messages import damage_error

from ..artifact.reader import Artifact
from ..engines.plan_hosts import why_not
from ..engines.profiles import narrower
from ..messages import MODULES
from .signing import check_signature

if TYPE_CHECKING:
    from ..serving.sampler import Sampler

LEVELS = ("structure", "digests", "host", "golden")


@dataclass(frozen=True, kw_only=True)
class PlansCheck:
    """Whether this host can run the plans of one backend and target."""

    backend: str
    version: str
    target: str
    reason: str | None
    """Why it cannot, with the command that makes it so; None if it can."""
    narrower: str | None
    """What the plans do not cover of the sizes that the artifact serves, with the command that mends it; None if all.
    """


@dataclass(frozen=True, kw_only=True)
class HostCheck:
    """What serves the artifact here."""

    backend: str
    passed_over: dict[str, str]
    """Backends that were not taken, with the reason."""
    plans: tuple[PlansCheck, ...]


@dataclass(frozen=True, kw_only=True)
class GoldenCheck:
    """A stored request, run again."""

    budget: str
    relative_error: float
    """‖x − g‖₂ / ‖g‖₂ of the latents x made here and the stored ones g."""
    max_relative_error: float


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What `verify` has checked; parts that the level does not reach are None."""

    level: str
    schema_version: str
    files: int
    """Listed files that are there, the manifest among them."""
    size_bytes: int
    digest: str
    """Of the manifest's core."""
    unlisted: tuple[str, ...]
    """Files in the folder that the manifest does not know; never read."""
    public_key: str | None
    """Base64 of the Ed25519 key that the signature was checked with."""
    host: HostCheck | None
    golden: GoldenCheck | None


def verify(
    folder: str | os.PathLike[str],
    level: str = "digests",
    *,
    public_key: Path | None = None,
    backend: str = "auto",
    threads: int | None = None,
) -> Outcome:
    """Check an artifact up to `level`, one of LEVELS; with `public_key` its signature as well, before any other file.

    Raises ArtifactError for what is wrong with the artifact or its signature, HostError for what this host lacks or
    computes otherwise than it should, UsageError for the key or an unknown backend.
    """
    artifact = Artifact.open(folder)
    signature = check_signature(artifact, public_key) if public_key is not None else None
    deepest = LEVELS.index(level)
    found = artifact.verify() if deepest >= LEVELS.index("digests") else artifact.check_structure()
    host, golden = (None, None)
    if deepest >= LEVELS.index("host"):
        host, golden = _run(artifact, backend, threads, with_golden=level == "golden")
    return Outcome(
        level=level,
        schema_version=artifact.manifest.schema_version,
        files=found.files,
        size_bytes=found.size_bytes,
        digest=found.digest,
        unlisted=found.unlisted,
        public_key=signature.public_key if signature else None,
        host=host,
        golden=golden,
    )


def _run(
    artifact: Artifact, backend: str, threads: int | None, *, with_golden: bool
) -> tuple[HostCheck, GoldenCheck | None]:
    from ..engines.choose import select_backend
    from ..loop.backend import Options
    from ..serving.sampler import Sampler as Loaded

    golden = artifact.manifest.golden
    if with_golden and golden is None:
        raise ArtifactError(
            f"{artifact.folder} holds no golden request: expected one, as compiles since schema 1.1 write it: use "
            "--level host, or compile it again"
        )
    selection = select_backend(backend, artifact.manifest, Options(threads=threads))
    with Loaded(artifact, selection) as sampler:
        host = HostCheck(backend=sampler.backend, passed_over=sampler.passed_over, plans=_check_plans(artifact))
        return host, _run_golden(sampler, golden) if with_golden and golden else None


def _check_plans(artifact: Artifact) -> tuple[PlansCheck, ...]:
    return tuple(
        PlansCheck(
            backend=engine.backend,
            version=engine.version,
            target=engine.target,
            reason=why_not(engine, str(artifact.folder)),
            narrower=narrower(engine, artifact.manifest, str(artifact.folder)),
        )
        for engine in artifact.manifest.engines
        if engine.backend in MODULES
    )


def _run_golden(sampler: Sampler, golden: Golden) -> GoldenCheck:
    artifact = sampler.artifact
    size = 4 * math.prod(artifact.manifest.latents.shape)
    expected = np.frombuffer(artifact.read(golden.latents, size), "<f4").astype(np.float64)
    if not np.isfinite(expected).all() or not expected.any():
        raise damage_error(golden.latents, "zeros alone, or numbers that are not finite", "latents", "compile it again")
    found = sampler.sample(
        sampler.encode(golden.prompt), budget=golden.budget, seed=golden.seed, guidance_scale=golden.guidance_scale
    )
    error = float(np.linalg.norm(found.astype(np.float64).ravel() - expected) / np.linalg.norm(expected))
    if not error <= golden.max_relative_error:
        raise HostError(
            f"golden request: {sampler.backend} of this host makes latents that differ by {error:.3g} of their size at "
            f"budget {golden.budget}: expected at most {golden.max_relative_error:g}: try another --backend or version "
            "of it, or compile the model again with this one"
        )
    return GoldenCheck(budget=golden.budget, relative_error=error, max_relative_error=golden.max_relative_error)
