"""Serving: loads an artifact and samples from it. Imports no torch, POT, Optuna, onnx or diffusers.

    from otcache.runtime import Sampler
    with Sampler.load("artifacts/shapes") as sampler:
        images = sampler("a small red ring on blue", budget=8, seed=0)

Importing this package costs next to nothing: what it offers is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from otcache.schemas.errors import ArtifactError, HostError, ModelError, OTCacheError, RequestError, UsageError

if TYPE_CHECKING:
    from .artifact.reader import Artifact
    from .loop.timing import Timer
    from .serving.governor import Governor
    from .serving.sampler import Sampler
    from .serving.service import BusyError, ClosedError, DeadlineError, Service, http_status

__all__ = [
    "Artifact",
    "ArtifactError",
    "BusyError",
    "ClosedError",
    "DeadlineError",
    "Governor",
    "HostError",
    "ModelError",
    "OTCacheError",
    "RequestError",
    "Sampler",
    "Service",
    "Timer",
    "UsageError",
    "http_status",
]
_MODULES = {
    "Artifact": "artifact.reader",
    "BusyError": "serving.service",
    "ClosedError": "serving.service",
    "DeadlineError": "serving.service",
    "Governor": "serving.governor",
    "Sampler": "serving.sampler",
    "Service": "serving.service",
    "Timer": "loop.timing",
    "http_status": "serving.service",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
