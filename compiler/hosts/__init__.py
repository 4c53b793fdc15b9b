"""For hosts that keep torch: programs of an artifact inside a diffusers pipeline.

    from otcache.compiler.hosts import OTCacheScheduler
    pipe.scheduler = OTCacheScheduler.from_artifact("artifacts/shapes", budget=8)
    pipe(prompt, num_inference_steps=8)

Needs torch and diffusers, but nothing else of `otcache[compiler]`. Importing this package loads neither: what it offers
is loaded when it is first used. The serving runtime does not import it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .omni import OmniScheduler
    from .refusal import CalibrationWarning
    from .residual import ResidualScheduler, apply_residual_cache, remove_residual_cache
    from .scheduler import OTCacheScheduler

_MODULES = {
    "CalibrationWarning": "refusal",
    "OTCacheScheduler": "scheduler",
    "OmniScheduler": "omni",
    "ResidualScheduler": "residual",
    "apply_residual_cache": "residual",
    "remove_residual_cache": "residual",
}
__all__ = [
    "CalibrationWarning",
    "OTCacheScheduler",
    "OmniScheduler",
    "ResidualScheduler",
    "apply_residual_cache",
    "remove_residual_cache",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
