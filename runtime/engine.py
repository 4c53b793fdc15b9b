"""What the sampling loop asks of a backend, and the choice of one.

A backend owns a device: it makes tensors there and loads stages. An engine is a loaded stage; binding it to tensors
gives a function without arguments, so that a step is a fixed list of calls over fixed buffers.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from otcache.schemas.combinations import Combination
from otcache.schemas.errors import HostError, UsageError
from otcache.schemas.manifest import Manifest, Stage
from otcache.schemas.program import Program

if TYPE_CHECKING:
    from .artifact import Artifact
    from .timing import Timer

Array = NDArray[Any]

DTYPES: dict[str, Any] = {
    "float32": np.float32, "float16": np.float16, "int64": np.int64, "int32": np.int32, "bool": np.bool_,
}  # fmt: skip
"""numpy's types of the manifest's; numpy has no bfloat16."""


class Tensor(Protocol):
    """A buffer on the backend's device."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def write(self, array: Array) -> None:
        """Copy an array of the same shape in, converting its type."""

    def read(self) -> Array:
        """The content as an array of the tensor's type; valid until the buffer is written again."""


class Engine(Protocol):
    """A stage, ready to run. Safe to bind and run from several threads."""

    def bind(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> Callable[[], None]:
        """A function that reads `inputs` and fills `outputs`, both by tensor name. It raises HostError."""

    def close(self) -> None:
        """Free what the engine holds; it cannot run afterwards."""


@dataclass(frozen=True)
class Part:
    """What a backend loads: a stage, or a combination between stages, and the file of the artifact that holds it."""

    name: str
    """Of the stage, or @ and that of the combination."""
    contract: Stage | Combination
    file: str


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is to be sampled, checked."""

    manifest: Manifest
    """For the request's size."""
    budget: str
    program: Program
    latents: NDArray[np.float32]
    """The first ones, (n, …)."""
    held: Mapping[str, Array]
    """Conditioning and constants of the size: with a batch (g, n, …), others as the manifest has them."""
    guidance_weights: Sequence[float]
    timer: Timer
    step_done: Callable[[int, int], None]
    """Called with the number of finished steps and of all."""
    watched: bool
    """Whether each step has to have ended when `step_done` is called; else the device may be behind."""


class Denoiser(Protocol):
    """Runs programs on a device."""

    def __call__(self, request: Request) -> NDArray[np.float32]:
        """The final latents of a request, (n, …)."""

    def close(self) -> None:
        """Free what it has allocated."""


class Backend(Protocol):
    """A device and a way to run stages on it."""

    name: str

    def parts(self, manifest: Manifest) -> tuple[Part, ...]:
        """What has to be loaded, stages first."""

    def load(self, part: Part, artifact: Artifact) -> Engine:
        """The part's engine, from its verified file. Raises ArtifactError if the file does not hold it, HostError."""

    def empty(self, shape: Sequence[int], dtype: str) -> Tensor:
        """A new tensor, content undefined. Raises HostError if the device has no room or no such type."""

    def denoiser(self, manifest: Manifest, engines: Mapping[str, Any]) -> Denoiser:
        """The loop over this backend's engines, by the parts' names."""

    def check(self, samples: int, manifest: Manifest) -> None:
        """Raise RequestError if engines do not serve so many samples at once, or not at the size of `manifest`."""


@dataclass(frozen=True)
class Selection:
    """The backend that serves, and why others do not."""

    backend: Backend
    passed_over: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a backend shall run."""

    threads: int | None = None
    """CPU threads of a stage; None takes one for each core."""
    cuda_graph: bool = False
    """Record each program once and replay it as a whole, where the backend keeps everything on a GPU."""
    request: Mapping[str, int] = field(default_factory=dict)
    """`batch` and axes of a request that shall be served: a backend whose plans do not cover it is passed over."""


def select_backend(name: str, manifest: Manifest, options: Options | None = None) -> Selection:
    """The named backend, or with `auto` the first of `BACKENDS` that this host and artifact allow.

    Raises UsageError for an unknown name, HostError with every reason if none can serve.
    """
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
        if odd := [tensor for tensor in tensors if tensor.dtype not in DTYPES]:
            return (
                f"{odd[0].name} is {odd[0].dtype}, and it serves {', '.join(DTYPES)}: build plans for a GPU with "
                "otc build-engines, or compile with --dtype float16"
            )
        if provider is not None:
            from .onnx_engine import available_providers

            if provider not in available_providers():
                return f"this build of ONNX Runtime has no {provider}: pip install onnxruntime-gpu"
        return None

    return why_not


def _create_plans(backend: str) -> Callable[[Manifest, Options], Backend]:
    def create(manifest: Manifest, options: Options) -> Backend:
        from .plan_hosts import usable_plans
        from .tensorrt_engine import TensorrtBackend

        plans, reason = usable_plans(backend, manifest, options.request)
        if plans is None:
            raise HostError(f"{backend}: {reason}")
        return TensorrtBackend(plans, manifest, cuda_graph=options.cuda_graph)

    return create


def _create_onnxruntime(name: str, provider: str | None) -> Callable[[Manifest, Options], Backend]:
    def create(manifest: Manifest, options: Options) -> Backend:
        from .onnx_engine import OnnxBackend

        return OnnxBackend(name, threads=options.threads, provider=provider)

    return create


_PROVIDERS = {
    "onnxruntime": None,
    "onnxruntime-tensorrt-rtx": "NvTensorRTRTXExecutionProvider",
    "onnxruntime-tensorrt": "TensorrtExecutionProvider",
}
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
