"""The GPU as the driver is asked for it: the calls that are made, their order, and what is said of each that fails."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import numpy as np
import pytest

from otcache.runtime import HostError

cuda_device = pytest.importorskip("otcache.runtime.engines.cuda_device")
REAL = cuda_device.driver
FINE = REAL.CUresult.CUDA_SUCCESS
RETURNED = {"cuMemAlloc": (4096,), "cuMemGetInfo": (4096, 8192), "cuStreamEndCapture": (1,), "cuGraphInstantiate": (2,)}
"""What calls give beside their status."""


class Driver:
    """Answers as it was told to, and else that all went well.

    Names, arguments and statuses are those of the real one.
    """

    CUresult, CUstreamCaptureMode = REAL.CUresult, REAL.CUstreamCaptureMode

    def __init__(self):
        self.asked, self.answers = [], {}

    def __getattr__(self, name):
        signature = inspect.signature(getattr(REAL, name))

        def call(*arguments):
            signature.bind(*arguments)
            self.asked.append(name)
            return self.answers.get(name, (FINE, *RETURNED.get(name, ())))

        return call


@pytest.fixture
def driver(monkeypatch):
    found, gpu = Driver(), SimpleNamespace(set_current=lambda: None, create_stream=lambda: SimpleNamespace(handle=7))
    monkeypatch.setattr(cuda_device, "driver", found)
    monkeypatch.setattr(cuda_device, "Device", lambda number: gpu)
    return found


def test_a_loop_is_recorded_replayed_and_freed(driver):
    device = cuda_device.CudaDevice()
    graph = device.record(lambda: driver.asked.append("launch"))
    assert driver.asked == [
        "cuStreamBeginCapture",
        "launch",
        "cuStreamEndCapture",
        "cuGraphInstantiate",
        "cuGraphDestroy",
    ]
    driver.asked.clear()
    graph()
    graph.close()
    assert driver.asked == ["cuGraphLaunch", "cuGraphExecDestroy"]


def test_a_launch_that_fails_ends_the_recording(driver):
    def launch():
        raise HostError("block_0 failed")

    with pytest.raises(HostError, match="block_0 failed"):
        cuda_device.CudaDevice().record(launch)
    assert driver.asked[-1] == "cuStreamEndCapture", "the stream can be used again"


def test_copies_go_through_the_stream(driver):
    device, array = cuda_device.CudaDevice(), np.zeros(4, np.float32)
    assert device.allocate(16) == 4096 and device.free_bytes() == 4096
    device.upload(4096, array)
    device.download(4096, array)
    device.free(4096)
    assert driver.asked == [
        "cuMemAlloc",
        "cuMemGetInfo",
        "cuMemcpyHtoDAsync",
        "cuMemcpyDtoHAsync",
        "cuStreamSynchronize",
        "cuMemFree",
    ]


def test_memory_that_runs_out_is_said_with_what_helps(driver):
    driver.answers = {
        "cuMemAlloc": (REAL.CUresult.CUDA_ERROR_OUT_OF_MEMORY, None),
        "cuMemGetInfo": (FINE, 3 * 10**9, 8 * 10**9),
    }
    with pytest.raises(HostError) as error:
        cuda_device.CudaDevice().allocate(5 * 10**9)
    assert str(error.value) == (
        "no room for 5.0 GB on the GPU: found 3.0 GB: ask for fewer pictures at once, or smaller ones (otc inspect "
        "ARTIFACT --memory -n N --height H --width W says what they take), or free its memory"
    )


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ("cuMemFree", "memory cannot be freed"),
        ("cuMemcpyHtoDAsync", "upload failed"),
        ("cuStreamSynchronize", "the GPU failed"),
        ("cuStreamEndCapture", "recording failed: leave cuda_graph out"),
        ("cuGraphLaunch", "the recorded graph failed"),
        ("cuGraphInstantiate", "the recorded graph cannot be used: leave cuda_graph out"),
    ],
)
def test_every_call_that_fails_is_named(driver, call, words):
    driver.answers = {call: (REAL.CUresult.CUDA_ERROR_ILLEGAL_ADDRESS, None)}
    device, array = cuda_device.CudaDevice(), np.zeros(4, np.float32)
    with pytest.raises(HostError, match=f"^{words}: found CUDA's CUDA_ERROR_ILLEGAL_ADDRESS: look at nvidia-smi"):
        device.upload(4096, array)
        device.synchronize()
        device.record(lambda: None)()
        device.free(4096)
