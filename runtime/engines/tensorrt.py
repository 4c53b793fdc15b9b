"""Plans of TensorRT and TensorRT for RTX, run on the device without torch.

A plan is code: it is handed to the library only after backend, version, platform and compute capability have been
compared with the manifest's (`plan_hosts`), and as the very bytes whose digest was checked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from otcache.schemas.combinations import combinations
from otcache.schemas.errors import ArtifactError, HostError, RequestError
from otcache.schemas.manifest import Engine as Plans
from otcache.schemas.manifest import Manifest
from otcache.schemas.messages import one_line
from otcache.schemas.segments import coarsen, name_of, segments_of

from ..artifact.reader import Artifact
from ..loop.address_plan import ITEM_BYTES
from ..loop.backend import DTYPES, Array, Denoiser, Part, Tensor
from ..loop.device_loop import Device, Shape, as_type, resident_denoiser
from .plan_hosts import why_not
from .profiles import at_usual_size, request_of, why_outside
from .tensorrt_library import TYPES, error_log, library


class DeviceTensor:
    """A buffer of its own on the device."""

    def __init__(self, device: Device, shape: Sequence[int], dtype: str) -> None:
        self.shape, self._dtype, self._device = tuple(shape), dtype, device
        self.address = device.allocate(max(1, int(np.prod(self.shape)) * ITEM_BYTES[dtype]))

    def write(self, array: Array) -> None:
        self._device.upload(self.address, as_type(np.broadcast_to(array, self.shape), self._dtype))

    def read(self) -> Array:
        """bfloat16 comes as float32, which holds each of its values."""
        array = np.zeros(self.shape, DTYPES[self._dtype])
        self._device.download(self.address, array)
        return array.astype(np.float32) if self._dtype == "bfloat16" else array

    def __del__(self) -> None:
        if hasattr(self, "address"):
            self._device.free(self.address)


class TensorrtContext:
    """A state in which a plan is executed: shapes, addresses, workspace. A recorded graph keeps those that it was
    recorded with.
    """

    def __init__(self, context: Any, name: str, log: Any, stream: int) -> None:
        self._context, self._name, self._log, self._stream = context, name, log, stream

    def use_workspace(self, address: int, size_bytes: int) -> None:
        self._context.set_device_memory(address, size_bytes)

    def set_shape(self, tensor: str, shape: Shape) -> None:
        if not self._context.set_input_shape(tensor, shape):
            raise failure(self._name, self._log, f"does not take {tensor} of shape {shape}")

    def set_address(self, tensor: str, address: int) -> None:
        if not self._context.set_tensor_address(tensor, address):
            raise failure(self._name, self._log, f"does not take an address for {tensor}")

    def enqueue(self) -> None:
        if not self._context.execute_async_v3(self._stream):
            raise failure(self._name, self._log, "failed")


class TensorrtEngine:
    """A plan that has been deserialised."""

    def __init__(self, part: Part, engine: Any, contexts: Contexts, log: Any, device: Any) -> None:
        self._part, self._device, self._log = part, device, log
        self._engine, self._contexts = engine, contexts
        self._alone: TensorrtContext | None = None
        """What the stage runs in when it runs on its own."""
        found = {
            engine.get_tensor_name(i): engine.get_tensor_dtype(engine.get_tensor_name(i)).name
            for i in range(engine.num_io_tensors)
        }
        wanted = {t.name: TYPES[t.dtype] for t in (*part.contract.inputs, *part.contract.outputs)}
        if found != wanted:
            raise ArtifactError(
                f"plan {part.file}: found tensors {one_line(found)}: expected {one_line(wanted)} as the manifest says: "
                "build it again with otc build-engines"
            )
        self.workspace_bytes = int(engine.device_memory_size_v2)

    def context(self) -> TensorrtContext:
        context = self._contexts.create(self._engine)
        if context is None:
            raise failure(self._part.name, self._log, "has no room for its context")
        return TensorrtContext(context, self._part.name, self._log, self._device.stream)

    def bind(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> Callable[[], None]:
        """For a stage on its own: set up, run and wait."""

        def run() -> None:
            context = self._alone = self._alone or self.context()
            workspace = self._device.allocate(max(1, self.workspace_bytes))
            try:
                context.use_workspace(workspace, self.workspace_bytes)
                for name, tensor in inputs.items():
                    context.set_shape(name, tensor.shape)
                for name, tensor in (*inputs.items(), *outputs.items()):
                    context.set_address(name, tensor.address)  # type: ignore[attr-defined]
                context.enqueue()
                self._device.synchronize()
            finally:
                self._device.free(workspace)

        return run

    def close(self) -> None:
        self._alone = self._engine = None


class Contexts:
    """Makes execution contexts without memory of their own.

    TensorRT for RTX compiles kernels when it first meets a shape. By default it does so in the background and runs
    others meanwhile, which round otherwise: a request would not give the same bits twice, and a graph keep the slow
    ones. So it is told to wait for them; what it has compiled is kept for the next context of the same engine.
    """

    def __init__(self, trt: Any) -> None:
        self._strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        self._specialization = getattr(trt, "DynamicShapesKernelSpecializationStrategy", None)
        self._cache: Any = None

    def create(self, engine: Any) -> Any:
        """None if there is no room."""
        if self._specialization is None:
            return engine.create_execution_context(self._strategy)
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(self._strategy)
        config.dynamic_shapes_kernel_specialization_strategy = self._specialization.EAGER
        if self._cache is None:
            self._cache = config.create_runtime_cache()
        config.set_runtime_cache(self._cache)
        return engine.create_execution_context(config)


def failure(name: str, log: Any, what: str) -> HostError:
    reason = f" ({one_line(log.errors[-1])})" if log.errors else ""
    return HostError(f"{name} {what}{reason}: ask for fewer pictures, or use --backend onnxruntime")


class TensorrtBackend:
    """One entry of the manifest's engines, on this host's GPU."""

    def __init__(self, plans: Plans, manifest: Manifest, *, cuda_graph: bool = False) -> None:
        """Raises HostError if this host cannot run the plans."""
        if reason := why_not(plans):
            raise HostError(f"{plans.backend} cannot run the artifact's plans for {plans.target}: {reason}")
        from .cuda_device import CudaDevice

        self.name: str = plans.backend
        self._plans, self._cuda_graph = plans, cuda_graph
        self._segments, self._manifest = segments_of(plans, manifest), manifest
        self._trt = library(plans.backend)
        self._log = error_log(self._trt)
        self._device = CudaDevice()
        self._runtime = self._trt.Runtime(self._log)
        self._contexts = Contexts(self._trt)

    def parts(self, manifest: Manifest) -> tuple[Part, ...]:
        return plan_parts(self._plans, manifest)

    def load(self, part: Part, artifact: Artifact) -> TensorrtEngine:
        engine = self._runtime.deserialize_cuda_engine(artifact.read(part.file))
        if engine is None:
            reason = one_line(self._log.errors[-1] if self._log.errors else "it gives no reason")
            raise HostError(
                f"plan {part.file}: {self.name} {self._trt.__version__} cannot load it: {reason}: build it again with "
                "otc build-engines, or use --backend onnxruntime"
            )
        return TensorrtEngine(part, engine, self._contexts, self._log, self._device)

    def empty(self, shape: Sequence[int], dtype: str) -> DeviceTensor:
        return DeviceTensor(self._device, shape, dtype)

    def denoiser(self, manifest: Manifest, engines: Mapping[str, Any]) -> Denoiser:
        usual, samples = at_usual_size(self._plans, manifest)
        return resident_denoiser(
            usual,
            engines,
            self._device,
            segments=self._segments,
            cuda_graph=self._cuda_graph,
            samples=samples,
        )

    def check(self, samples: int, manifest: Manifest) -> None:
        if reason := why_outside(self._plans, self._manifest, request_of(manifest, samples)):
            raise RequestError(reason)


def plan_parts(plans: Plans, manifest: Manifest) -> tuple[Part, ...]:
    """A part for every stage, segment and combination. Raises ArtifactError for a combination without a plan."""
    needed = combinations(manifest)
    if missing := [one.name for one in needed if one.name not in plans.combinations]:
        raise ArtifactError(
            f"engines for {plans.target}: found no plan of the combination {missing[0]}: expected one: otc "
            f"build-engines ARTIFACT --backend {plans.backend} --target {plans.target}"
        )
    segments = segments_of(plans, manifest)
    files = {**plans.stages, **{name_of(segment): plans.stages[segment[0]] for segment in segments}}
    stages = [Part(stage.name, stage, files[stage.name]) for stage in coarsen(manifest, segments).stages]
    return (*stages, *(Part("@" + one.name, one, plans.combinations[one.name]) for one in needed))
