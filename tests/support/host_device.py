"""A device that is this host's memory, and engines that check everything they are told before they run on it.

What a GPU does at addresses happens here at addresses too: stages run on ONNX Runtime, combinations in numpy, on views
of raw memory. So the whole resident loop runs without a GPU, and its result is that of the artifact.
"""

from __future__ import annotations

import threading
from collections import Counter

import numpy as np
import onnxruntime as ort

from otcache.runtime.build.segments import OnnxSegment, model_from_segment
from otcache.runtime.loop.address_plan import ALIGNMENT
from otcache.runtime.loop.backend import DTYPES, Part
from otcache.runtime.loop.device_loop import resident_denoiser
from otcache.schemas.combinations import COEFS, combinations
from otcache.schemas.errors import HostError
from otcache.schemas.segments import coarsen, name_of, segments


class HostDevice:
    """Memory full of NaN until it is written, a log of what was asked for, and graphs that are lists of calls."""

    stream = 1

    def __init__(self, capacity_bytes=1 << 30):
        self.memory, self.left, self.calls, self.recorded = {}, capacity_bytes, Counter(), None
        self.threads = set()

    def activate(self):
        self.threads.add(threading.get_ident())

    def allocate(self, size_bytes):
        self.activate()
        if size_bytes > self.left:
            raise HostError("no room on the GPU: ask for fewer pictures at once")
        self.left -= size_bytes
        block = np.full(size_bytes + ALIGNMENT, 0xFF, np.uint8)
        start = -block.ctypes.data % ALIGNMENT
        self.memory[block.ctypes.data + start] = block[start : start + size_bytes]
        return block.ctypes.data + start

    def free(self, address):
        self.left += self.memory.pop(address).nbytes

    def free_bytes(self):
        return self.left

    def view(self, address, shape, dtype):
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        for base, block in self.memory.items():
            if base <= address and address + size <= base + block.nbytes:
                return block[address - base : address - base + size].view(dtype).reshape(shape)
        raise AssertionError(f"{address} is not in memory")

    def upload(self, address, array):
        assert threading.get_ident() in self.threads, "a thread uses the device that it has not made its own"
        assert array.flags.c_contiguous
        self.view(address, array.shape, array.dtype)[...] = array
        self.calls["upload"] += 1

    def download(self, address, array):
        array[...] = self.view(address, array.shape, array.dtype)
        self.calls["download"] += 1

    def synchronize(self):
        assert self.recorded is None, "a stream that is recorded cannot be waited for"
        self.calls["synchronize"] += 1

    def record(self, launch):
        self.recorded = recorded = []
        launch()
        self.recorded = None
        self.calls["record"] += 1
        return HostGraph(self, recorded)


def unwritten(array):
    """Whether some of an array is as memory is at first: all ones, a NaN that no arithmetic on numbers gives."""
    return (array.reshape(-1).view(np.uint8).reshape(-1, array.itemsize) == 0xFF).all(axis=1).any()


class HostGraph:
    """Launches in a row. As with a CUDA graph of TensorRT's, what they were recorded in must stay as it was then."""

    def __init__(self, device, recorded):
        self.device, self.runs = device, [run for run, _ in recorded]
        self.contexts = {context: dict(context.calls) for _, context in recorded}

    def __call__(self):
        self.device.calls["replay"] += 1
        for context, calls in self.contexts.items():
            assert dict(context.calls) == calls, f"{context.part.name} was touched after it was recorded"
        for run in self.runs:
            run()

    def close(self):
        self.runs = None


class HostEngine:
    """A part that is loaded."""

    workspace_bytes = 4096

    def __init__(self, part, run, device):
        self.part, self.run, self.device, self.contexts = part, run, device, []

    def context(self):
        self.contexts.append(HostContext(self.part, self.run, self.device))
        return self.contexts[-1]

    @property
    def calls(self):
        return sum((context.calls for context in self.contexts), Counter())

    def bind(self, inputs, outputs):
        def run():
            for name, array in self.run({name: tensor.host for name, tensor in inputs.items()}).items():
                outputs[name].host = array

        return run

    def close(self):
        self.run = None


class HostContext:
    """Runs a part on memory; refuses what a GPU would have silently spoilt."""

    workspace_bytes = 4096

    def __init__(self, part, run, device):
        self.part, self.run, self.device = part, run, device
        self.addresses, self.shapes, self.calls = {}, {}, Counter()

    def use_workspace(self, address, size_bytes):
        assert size_bytes >= self.workspace_bytes
        self.workspace = self.device.view(address, (size_bytes,), np.uint8)

    def set_shape(self, tensor, shape):
        self.shapes[tensor] = shape
        self.calls["set_shape"] += 1

    def set_address(self, tensor, address):
        assert address % ALIGNMENT == 0
        self.addresses[tensor] = address
        self.calls["set_address"] += 1

    def enqueue(self):
        self.calls["enqueue"] += 1
        contract, addresses = self.part.contract, dict(self.addresses)
        for tensor in contract.inputs:
            varies = "batch" in tensor.shape or any(tensor.symbols)
            assert (tensor.name in self.shapes) == varies, (
                f"{self.part.name} was told no shape of {tensor.name}, or a fixed one"
            )
        inputs = {
            tensor.name: self.device.view(
                addresses[tensor.name], self.shapes.get(tensor.name, tensor.shape), DTYPES[tensor.dtype]
            )
            for tensor in contract.inputs
        }

        def launch():
            for name, array in inputs.items():
                assert array.dtype.kind != "f" or not unwritten(array), f"{self.part.name} reads {name} unwritten"
            found = self.run({key: array.copy() for key, array in inputs.items()})
            taken = list(inputs.values())
            for tensor in contract.outputs:
                array = found[tensor.name]
                output = self.device.view(addresses[tensor.name], array.shape, DTYPES[tensor.dtype])
                assert not any(np.may_share_memory(output, other) for other in taken), (self.part.name, tensor.name)
                output[...] = array
                taken.append(output)
            self.workspace[...] = 0xAA

        if self.device.recorded is None:
            launch()
        else:
            self.device.recorded.append((launch, self))


class HostTensor:
    def __init__(self, shape, dtype):
        self.shape, self.host = tuple(shape), np.empty(shape, DTYPES[dtype])

    def write(self, array):
        np.copyto(self.host, array, casting="unsafe")

    def read(self):
        return self.host


class HostBackend:
    """A `Backend` that is resident in this host's memory."""

    name = "host"

    def __init__(self, *, cuda_graph=False, capacity_bytes=1 << 30, granularity="block"):
        self.device, self.cuda_graph, self.engines = HostDevice(capacity_bytes), cuda_graph, {}
        self.granularity = granularity

    def parts(self, manifest):
        self.manifest, self.segments = manifest, segments(manifest, self.granularity)
        stages = [Part(stage.name, stage, stage.onnx) for stage in coarsen(manifest, self.segments).stages]
        return (*stages, *(Part("@" + one.name, one, "") for one in combinations(manifest)))

    def load(self, part, artifact):
        if part.file:
            session = ort.InferenceSession(self.graph(part, artifact), providers=["CPUExecutionProvider"])
            names = [tensor.name for tensor in part.contract.outputs]
            run = lambda inputs: dict(zip(names, session.run(names, inputs), strict=True))  # noqa: E731
        else:
            run = lambda inputs: {"total": combine(part.contract, **inputs)}  # noqa: E731
        self.engines[part.name] = HostEngine(part, run, self.device)
        return self.engines[part.name]

    def graph(self, part, artifact):
        """The ONNX bytes of a stage or a segment."""
        names = next((names for names in self.segments if name_of(names) == part.name), (part.name,))
        stages = tuple(stage for stage in self.manifest.stages if stage.name in names)
        paths = tuple(artifact.engine_path(stage.onnx) for stage in stages)
        if len(stages) == 1:
            return paths[0].read_bytes()
        outputs = tuple(tensor.name for tensor in part.contract.outputs)
        return model_from_segment(OnnxSegment(stages, paths, outputs)).SerializeToString()

    def empty(self, shape, dtype):
        return HostTensor(shape, dtype)

    def denoiser(self, manifest, engines):
        return resident_denoiser(manifest, engines, self.device, segments=self.segments, cuda_graph=self.cuda_graph)

    def check(self, samples, manifest):
        pass


def _updated(combination, coefs, terms):
    """Latents after a step, from its coefficients, those of means if it has any, their slopes if it has any, centre and
    spread.
    """
    place, count = 0.0, len(terms) * (2 if combination.means else 1)
    if combination.kind == "follow":
        length = lambda x: np.sqrt(np.square(x).sum(axis=tuple(range(1, x.ndim)), keepdims=True))  # noqa: E731
        centre, spread = coefs[-2:]
        place = np.clip((np.log(length(terms[-1] - terms[-2]) / length(terms[-1])) - centre) / spread, -2.5, 2.5)
    else:
        coefs = np.concatenate([coefs, np.zeros_like(coefs)])
    each = [(c + place * slope) * term for c, slope, term in zip(coefs, coefs[count:], [*terms, *terms][:count])]  # noqa: B905
    axes = 1 if terms[0].ndim == 3 else (-2, -1)
    return sum(each[: len(terms)]) + sum(part.mean(axis=axes, keepdims=True) for part in each[len(terms) :])


def combine(combination, **inputs):
    """A combination, from its specification."""
    coefs = inputs.pop(COEFS, None)
    terms = [inputs[f"term_{index}"].astype(np.float32) for index in range(len(inputs))]
    if combination.kind == "spread":
        total = np.concatenate([coefs[0] * terms[0]] * combination.branches)
    elif combination.kind == "residual":
        total = terms[0] - terms[1]
    elif combination.kind == "forecast":
        total = terms[0] + sum(c * term for c, term in zip(coefs, terms[1:], strict=True))
    elif combination.kind == "guide":
        branches = np.split(terms[0], combination.branches)
        total = sum(c * branch for c, branch in zip(coefs, branches, strict=True))
        if combination.keep_norm:
            length = np.linalg.norm(total, axis=-1, keepdims=True)
            total = total * (np.linalg.norm(branches[-1], axis=-1, keepdims=True) / np.maximum(length, 1e-30))
    else:
        total = _updated(combination, coefs, terms)
    return total.astype(DTYPES[combination.total.dtype])
