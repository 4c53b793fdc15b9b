"""What the sampling loop asks of a backend, and the choice of one.

A backend owns a device: it makes tensors there and loads stages. An engine is a loaded stage; binding it to tensors
gives a function without arguments, so that a step is a fixed list of calls over fixed buffers.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from otcache.schemas.errors import HostError, UsageError
from otcache.schemas.manifest import Manifest, Stage

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


class Backend(Protocol):
    """A device and a way to run stages on it."""

    name: str

    def load(self, stage: Stage, path: Path) -> Engine:
        """The stage in a verified file. Raises ArtifactError if the file does not hold it."""

    def empty(self, shape: Sequence[int], dtype: str) -> Tensor:
        """A new tensor, content undefined. Raises HostError if the device has no room or no such type."""


@dataclass(frozen=True)
class Selection:
    """The backend that serves, and why others do not."""

    backend: Backend
    passed_over: dict[str, str]


def select_backend(name: str, manifest: Manifest, *, threads: int | None = None) -> Selection:
    """The named backend, or with `auto` the first of `BACKENDS` that this host and artifact allow.

    Raises UsageError for an unknown name, HostError with every reason if none can serve.
    """
    if name != "auto" and name not in BACKENDS:
        raise UsageError(f"backend is {name!r}: expected one of auto, {', '.join(BACKENDS)}")
    passed_over: dict[str, str] = {}
    for candidate in BACKENDS if name == "auto" else (name,):
        why_not, create = BACKENDS[candidate]
        reason = why_not(manifest)
        if reason is None:
            return Selection(create(threads), passed_over)
        passed_over[candidate] = reason
    reasons = "; ".join(f"{candidate}: {reason}" for candidate, reason in passed_over.items())
    raise HostError(f"backend {name} cannot serve this artifact here: {reasons}")


def _why_not_tensorrt(backend: str) -> Callable[[Manifest], str | None]:
    def why_not(manifest: Manifest) -> str | None:
        if not any(engine.backend == backend for engine in manifest.engines):
            return "the artifact holds no engines for it"
        return "this version of otcache does not run it: use --backend onnxruntime"

    return why_not


def _why_not_onnxruntime(manifest: Manifest) -> str | None:
    if importlib.util.find_spec("onnxruntime") is None:
        return "it is not installed: pip install onnxruntime"
    tensors = [tensor for stage in manifest.stages for tensor in (*stage.inputs, *stage.outputs)]
    if odd := [tensor for tensor in tensors if tensor.dtype not in DTYPES]:
        return f"{odd[0].name} is {odd[0].dtype}: it serves {', '.join(DTYPES)}: compile in another dtype"
    return None


def _create_onnxruntime(threads: int | None) -> Backend:
    from .onnx_engine import OnnxBackend

    return OnnxBackend(threads=threads)


def _create_nothing(threads: int | None) -> Backend:
    raise HostError("this backend is not part of this version of otcache")


BACKENDS: dict[str, tuple[Callable[[Manifest], str | None], Callable[[int | None], Backend]]] = {
    "tensorrt-rtx": (_why_not_tensorrt("tensorrt-rtx"), _create_nothing),
    "tensorrt": (_why_not_tensorrt("tensorrt"), _create_nothing),
    "onnxruntime": (_why_not_onnxruntime, _create_onnxruntime),
}
"""In order of preference: why it cannot serve an artifact here (None if it can), and how to make it."""
