"""Stages on ONNX Runtime, bound to buffers that stay where they are: CPU, or CUDA where its provider is present.

On the CPU a tensor is a numpy array that ONNX Runtime reads and writes in place. A chain of sessions is as fast as one
session only if idle thread pools do not spin: with spinning, a stage's workers burn the cores that the next one needs.
All sessions share one arena, so that memory does not grow with their number. `python tests/benchmarks/sessions.py
ARTIFACT` measures both choices, `tests/benchmarks/serving.py` the chain against one session.

ONNX Runtime's own builds record what they run: in a database in the home folder, which they send to their maker, and
which stays open. It is switched off here unless ORT_DISABLE_TELEMETRY says otherwise; it looks at that once, when it is
imported, so a process that has imported it before is left as it is.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
import onnxruntime as ort

from otcache.schemas.errors import ArtifactError, HostError
from otcache.schemas.manifest import Manifest, Stage, TensorInfo
from otcache.schemas.messages import one_line

from ..artifact.reader import Artifact
from ..loop.backend import DTYPES, Array, Denoiser, Engine, Part, Tensor

_ONNX_TYPES = {
    "float32": "tensor(float)",
    "float16": "tensor(float16)",
    "bfloat16": "tensor(bfloat16)",
    "int64": "tensor(int64)",
    "int32": "tensor(int32)",
    "bool": "tensor(bool)",
}
_GROW_AS_REQUESTED = 1
_ERRORS_ONLY = 3

_arena_lock = threading.Lock()
_has_shared_arena = False


class OnnxTensor:
    """A buffer on CPU or CUDA."""

    def __init__(self, shape: Sequence[int], dtype: str, device: str) -> None:
        self.shape = tuple(shape)
        self.dtype = np.dtype(DTYPES[dtype])
        self.host: Array | None = None
        if device == "cpu":
            self.host = np.empty(self.shape, self.dtype)
            self.value = ort.OrtValue.ortvalue_from_numpy(self.host)
        else:
            self.value = ort.OrtValue.ortvalue_from_shape_and_type(list(self.shape), self.dtype.type, device, 0)

    def write(self, array: Array) -> None:
        if self.host is not None:
            np.copyto(self.host, array, casting="unsafe")
        else:
            self.value.update_inplace(np.ascontiguousarray(np.broadcast_to(array, self.shape), self.dtype))

    def read(self) -> Array:
        return self.host if self.host is not None else self.value.numpy()


class OnnxEngine:
    """A session whose inputs and outputs are what the manifest says of the stage."""

    def __init__(self, stage: Stage, path: Path, options: Any, providers: Sequence[str]) -> None:
        self._name = stage.name
        try:
            self._session: Any = ort.InferenceSession(str(path), options, providers=list(providers))
        except Exception as error:  # ONNX Runtime's errors have no common base but this
            raise ArtifactError(
                f"engine {stage.onnx}: ONNX Runtime {ort.__version__} cannot load it: {one_line(error)}: compile "
                "again, or install the version that the manifest names"
            ) from None
        _check_tensors(stage, "inputs", self._session.get_inputs(), stage.inputs)
        _check_tensors(stage, "outputs", self._session.get_outputs(), stage.outputs)

    def bind(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> Callable[[], None]:
        session, name = self._session, self._name
        binding = session.io_binding()
        for key, tensor in inputs.items():
            binding.bind_ortvalue_input(key, tensor.value)  # type: ignore[attr-defined]
        for key, tensor in outputs.items():
            binding.bind_ortvalue_output(key, tensor.value)  # type: ignore[attr-defined]

        def run() -> None:
            try:
                session.run_with_iobinding(binding)
            except Exception as error:
                raise HostError(f"stage {name} failed in ONNX Runtime: {one_line(error)}: try fewer images") from None

        return run

    def close(self) -> None:
        self._session = None


class OnnxBackend:
    """ONNX Runtime with one device.

    threads: of each stage, one stage at a time; None leaves it to ONNX Runtime (one for each core). provider: what is
    asked before CUDA and the CPU.
    """

    def __init__(self, name: str = "onnxruntime", *, threads: int | None = None, provider: str | None = None) -> None:
        self.name = name
        self.device = "cuda" if "CUDAExecutionProvider" in available_providers() else "cpu"
        wanted = [provider, "CUDAExecutionProvider" if self.device == "cuda" else None, "CPUExecutionProvider"]
        self._providers = [one for one in wanted if one is not None]
        self._options = _session_options(threads)

    def parts(self, manifest: Manifest) -> tuple[Part, ...]:
        return tuple(Part(stage.name, stage, stage.onnx) for stage in manifest.stages)

    def load(self, part: Part, artifact: Artifact) -> Engine:
        assert isinstance(part.contract, Stage)
        return OnnxEngine(part.contract, artifact.engine_path(part.file), self._options, self._providers)

    def denoiser(self, manifest: Manifest, engines: Mapping[str, Engine]) -> Denoiser:
        from ..loop.host_loop import HostLoop

        return HostLoop(engines, self)

    def check(self, samples: int, manifest: Manifest) -> None:
        """Graphs take any batch, and every size that the artifact serves."""

    def empty(self, shape: Sequence[int], dtype: str) -> OnnxTensor:
        try:
            return OnnxTensor(shape, dtype, self.device)
        except Exception as error:
            raise HostError(
                f"no room for a {dtype} tensor of shape {tuple(shape)} on {self.device} ({one_line(error)}): ask for "
                "fewer images at once"
            ) from None


def available_providers() -> list[str]:
    """Execution providers of this build of ONNX Runtime."""
    return list(ort.get_available_providers())


def _session_options(threads: int | None) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.use_deterministic_compute = True
    options.log_severity_level = _ERRORS_ONLY
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if _share_arena():
        options.add_session_config_entry("session.use_env_allocators", "1")
    return options


def _share_arena() -> bool:
    """Register one CPU arena for all sessions of this process; False if ONNX Runtime refuses."""
    global _has_shared_arena
    with _arena_lock:
        if not _has_shared_arena:
            try:
                memory = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
                arena = ort.OrtArenaCfg({"arena_extend_strategy": _GROW_AS_REQUESTED})
                ort.create_and_register_allocator(memory, arena)
                _has_shared_arena = True
            except Exception:  # registered by someone else, or not there in this build: every session has its own
                return False
        return True


def _check_tensors(stage: Stage, side: str, found: Sequence[Any], expected: Sequence[TensorInfo]) -> None:
    have = {tensor.name: tensor.type for tensor in found}
    want = {tensor.name: _ONNX_TYPES[tensor.dtype] for tensor in expected}
    if have != want:
        raise ArtifactError(
            f"engine {stage.onnx}: found {side} {one_line(have)}: expected {one_line(want)} as the manifest says: "
            "compile it again"
        )
