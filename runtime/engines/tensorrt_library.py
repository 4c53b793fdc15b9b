"""TensorRT and TensorRT for RTX as Python modules: which is installed, in which version, and which GPUs it builds for.

Both have one API. The full library builds for the GPU of the host only; the one for RTX builds for a list of compute
capabilities, on any host.
"""

from __future__ import annotations

import importlib
import platform
from typing import Any, Literal

from otcache.schemas.errors import HostError, UsageError

from ..messages import MODULES

Backend = Literal["tensorrt", "tensorrt-rtx"]
PACKAGES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt-rtx-cu13"}
"""What pip calls them."""


def library(backend: str) -> Any:
    """The module of a backend. Raises HostError if it is not installed or cannot be loaded."""
    try:
        return importlib.import_module(MODULES[backend])
    except (ImportError, OSError) as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == MODULES[backend]
        reason = "is not installed" if missing else f"cannot be loaded ({error})"
        raise HostError(f"{backend} {reason}: expected its package: pip install {PACKAGES[backend]}") from None


def host_platform() -> str:
    """`linux-x86_64`: a plan holds code for it."""
    return f"{platform.system()}-{platform.machine()}".lower()


def buildable_targets(trt: Any) -> tuple[str, ...]:
    """Compute capabilities that the library builds for without their GPU, as `sm_89`; none for the full library."""
    members = getattr(getattr(trt, "ComputeCapability", None), "__members__", {})
    return tuple(f"sm_{name[2:]}" for name in members if name.startswith("SM"))


def choose_targets(backend: str, trt: Any, asked: tuple[str, ...]) -> tuple[str, ...]:
    """The targets to build for: those that were asked for, else this host's GPU. Raises UsageError, HostError."""
    from .gpu import why_no_gpu

    buildable = buildable_targets(trt)
    reason, host = why_no_gpu()
    if not buildable:
        if host is None:
            raise HostError(f"{backend} builds on the GPU that it builds for, and here is none: {reason}")
        if wrong := [target for target in asked if target != host]:
            raise UsageError(f"--target is {wrong[0]}: {backend} builds for the GPU of this host only: expected {host}")
        return (host,)
    if not asked and host is None:
        raise UsageError(f"--target is not given and there is no GPU here: expected some of {', '.join(buildable)}")
    targets = asked or (str(host),)
    if wrong := [target for target in targets if target not in buildable]:
        fix = "" if backend == "tensorrt" else ": data-centre GPUs are built for with --backend tensorrt on them"
        raise UsageError(f"--target is {wrong[0]}: {backend} builds for {', '.join(buildable)}{fix}")
    return tuple(dict.fromkeys(targets))


def error_log(trt: Any) -> Any:
    """A logger that is silent and keeps errors in `errors`, oldest first."""

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self.errors.append(message)

    return Log()


TYPES = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16", "int64": "INT64", "int32": "INT32", "bool": "BOOL"}
"""TensorRT's names of the manifest's types."""
