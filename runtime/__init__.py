"""Serving: loads an artifact and samples from it. Imports no torch, POT, Optuna, onnx or diffusers.

    from otcache.runtime import Sampler
    with Sampler.load("artifacts/shapes") as sampler:
        images = sampler("a small red ring on blue", budget=8, seed=0)

Importing this package costs next to nothing: what it offers is loaded when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from otcache.schemas.errors import ArtifactError, HostError, ModelError, OTCacheError, RequestError, UsageError

if TYPE_CHECKING:
    from .artifact import Artifact
    from .sampler import Sampler

__all__ = [
    "Artifact",
    "ArtifactError",
    "HostError",
    "ModelError",
    "OTCacheError",
    "RequestError",
    "Sampler",
    "UsageError",
]


def __getattr__(name: str) -> Any:
    if name == "Sampler":
        from .sampler import Sampler

        return Sampler
    if name == "Artifact":
        from .artifact import Artifact

        return Artifact
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
