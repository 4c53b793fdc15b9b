"""A GPU through cuda-core and cuda-bindings, without torch: memory, one stream, copies, graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cuda.bindings import driver
from cuda.core import Device

from otcache.schemas.errors import HostError
from otcache.schemas.messages import one_line

from ..loop.backend import Array
from ..messages import readable_size


class CudaDevice:
    """The first GPU, with a stream of its own: the default one cannot be recorded."""

    def __init__(self) -> None:
        self._device = Device(0)
        self._device.set_current()
        self._stream = self._device.create_stream()
        self.stream = int(self._stream.handle)
        """Handle for libraries."""

    def activate(self) -> None:
        self._device.set_current()

    def allocate(self, size_bytes: int) -> int:
        """Also what a request begins with, in whichever thread it runs: the device becomes that thread's."""
        self.activate()
        status, address = driver.cuMemAlloc(size_bytes)
        if status == driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
            raise HostError(
                f"no room for {readable_size(size_bytes)} on the GPU: found {readable_size(self.free_bytes())}: ask "
                "for fewer pictures at once, or smaller ones (otc inspect ARTIFACT --memory -n N --height H --width W "
                "says what they take), or free its memory"
            )
        _check(status, "memory cannot be allocated")
        return int(address)

    def free(self, address: int) -> None:
        self.activate()
        _check(driver.cuMemFree(address)[0], "memory cannot be freed")

    def free_bytes(self) -> int:
        status, left, _ = driver.cuMemGetInfo()
        _check(status, "its memory cannot be read")
        return int(left)

    def upload(self, address: int, array: Array) -> None:
        """From pageable memory: the driver has its own copy when this returns."""
        _check(driver.cuMemcpyHtoDAsync(address, array.ctypes.data, array.nbytes, self.stream)[0], "upload failed")

    def download(self, address: int, array: Array) -> None:
        _check(driver.cuMemcpyDtoHAsync(array.ctypes.data, address, array.nbytes, self.stream)[0], "download failed")
        self.synchronize()

    def synchronize(self) -> None:
        _check(driver.cuStreamSynchronize(self.stream)[0], "the GPU failed")

    def record(self, launch: Callable[[], None]) -> CudaGraph:
        mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        _check(driver.cuStreamBeginCapture(self.stream, mode)[0], "recording cannot begin")
        try:
            launch()
        finally:
            status, graph = driver.cuStreamEndCapture(self.stream)
        _check(status, "recording failed: leave cuda_graph out")
        status, ready = driver.cuGraphInstantiate(graph, 0)
        _check(status, "the recorded graph cannot be used: leave cuda_graph out")
        _check(driver.cuGraphDestroy(graph)[0], "the recorded graph cannot be freed")
        return CudaGraph(ready, self.stream)


class CudaGraph:
    """A loop that was recorded on a stream."""

    def __init__(self, graph: Any, stream: int) -> None:
        self._graph, self._stream = graph, stream

    def __call__(self) -> None:
        _check(driver.cuGraphLaunch(self._graph, self._stream)[0], "the recorded graph failed")

    def close(self) -> None:
        _check(driver.cuGraphExecDestroy(self._graph)[0], "the recorded graph cannot be freed")


def _check(status: Any, what: str) -> None:
    if status != driver.CUresult.CUDA_SUCCESS:
        raise HostError(
            f"{what}: found CUDA's {one_line(status.name)}: look at nvidia-smi, and load the artifact again"
        )
