"""The build host: from a diffusers pipeline to an artifact. May import torch, diffusers, POT and Optuna.

    import otcache.compiler
    folder = otcache.compiler.compile(pipe, budgets=[4, 8, 16], prompts=["a red ring", …])

Importing this package costs next to nothing: what it offers is loaded when it is first used.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .passes.live import compile

__all__ = ["compile"]

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # ONNX Runtime's own builds send what they run to their maker


def __getattr__(name: str) -> Any:
    if name != "compile":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .passes.live import compile

    return compile
