"""What the sampling loop asks of a backend, and the choice of one.

A backend owns a device: it makes tensors there and loads stages. An engine is a loaded stage; binding it to tensors
gives a function without arguments, so that a step is a fixed list of calls over fixed buffers.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from otcache.schemas.errors import ArtifactError, HostError, UsageError
from otcache.schemas.manifest import Manifest

from ..loop.backend import DTYPES, Backend, Options

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class Selection:
    """The backend that serves, and why others do not."""

    backend: Backend
    passed_over: dict[str, str]


def check_engines(manifest: Manifest) -> None:
    """Raises ArtifactError for an artifact of programs alone, which hosts that keep torch can use and nothing else."""
    if manifest.programs_alone:
        raise ArtifactError(
            "this artifact holds programs alone: expected engines: add them where the model is with `otc export "
            "ARTIFACT MODEL`, or use the programs in diffusers (OTCacheScheduler)"
        )


def select_backend(name: str, manifest: Manifest, options: Options | None = None) -> Selection:
    """The named backend, or with `auto` the first of `BACKENDS` that this host and artifact allow.

    Raises UsageError for an unknown name, ArtifactError for an artifact without engines, HostError with every reason if
    none can serve.
    """
    check_engines(manifest)
    if name != "auto" and name not in BACKENDS:
        raise UsageError(f"backend is {name!r}: expected one of auto, {', '.join(BACKENDS)}")
    options = options or Options()
    passed_over: dict[str, str] = {}
    for candidate in BACKENDS if name == "auto" else (name,):
        why_not, create = BACKENDS[candidate]
        reason = _SLOW_TO_LOAD if name == "auto" and candidate in _ON_REQUEST else why_not(manifest, options)
        if reason is None and options.cuda_graph and candidate not in _RESIDENT:
            reason = "it has no CUDA graphs: leave cuda_graph out"
        if reason is None:
            return Selection(create(manifest, options), passed_over)
        passed_over[candidate] = reason
    reasons = "; ".join(f"{candidate}: {reason}" for candidate, reason in passed_over.items())
    raise HostError(f"backend {name} cannot serve this artifact here: {reasons}")


def _why_not_plans(backend: str) -> Callable[[Manifest, Options], str | None]:
    def why_not(manifest: Manifest, options: Options) -> str | None:
        from .plan_hosts import usable_plans

        return usable_plans(backend, manifest, options.request)[1]

    return why_not


def _why_not_onnxruntime(provider: str | None) -> Callable[[Manifest, Options], str | None]:
    def why_not(manifest: Manifest, options: Options) -> str | None:
        if importlib.util.find_spec("onnxruntime") is None:
            return "it is not installed: pip install onnxruntime"
        tensors = [tensor for stage in manifest.stages for tensor in (*stage.inputs, *stage.outputs)]
        if odd := [tensor for tensor in tensors if tensor.dtype not in _SERVED]:
            return (
                f"{odd[0].name} is {odd[0].dtype}, and it serves {', '.join(_SERVED)}: build plans for a GPU with "
                "otc build-engines, or compile with --dtype float16"
            )
        if provider is not None:
            from .onnx import available_providers

            if provider not in available_providers():
                return f"this build of ONNX Runtime has no {provider}: pip install onnxruntime-gpu"
        return None

    return why_not


def _create_plans(backend: str) -> Callable[[Manifest, Options], Backend]:
    def create(manifest: Manifest, options: Options) -> Backend:
        from .plan_hosts import usable_plans
        from .tensorrt import TensorrtBackend

        plans, reason = usable_plans(backend, manifest, options.request)
        if plans is None:
            raise HostError(f"{backend}: {reason}")
        return TensorrtBackend(plans, manifest, cuda_graph=options.cuda_graph)

    return create


def _create_onnxruntime(name: str, provider: str | None) -> Callable[[Manifest, Options], Backend]:
    def create(manifest: Manifest, options: Options) -> Backend:
        from .onnx import OnnxBackend

        return OnnxBackend(name, threads=options.threads, provider=provider)

    return create


_PROVIDERS = {
    "onnxruntime": None,
    "onnxruntime-tensorrt-rtx": "NvTensorRTRTXExecutionProvider",
    "onnxruntime-tensorrt": "TensorrtExecutionProvider",
}
_SERVED = tuple(dtype for dtype in DTYPES if dtype != "bfloat16")
"""What ONNX Runtime computes with on every host."""
_RESIDENT = ("tensorrt-rtx", "tensorrt")
_ON_REQUEST = ("onnxruntime-tensorrt-rtx", "onnxruntime-tensorrt")
_SLOW_TO_LOAD = "it builds its engines while it loads: ask for it by name"

BACKENDS: dict[str, tuple[Callable[[Manifest, Options], str | None], Callable[[Manifest, Options], Backend]]] = {
    **{name: (_why_not_plans(name), _create_plans(name)) for name in _RESIDENT},
    **{
        name: (_why_not_onnxruntime(provider), _create_onnxruntime(name, provider))
        for name, provider in _PROVIDERS.items()
    },
}
"""In order of preference: why it cannot serve an artifact here (None if it can), and how to make it."""
