"""The sampling loop with everything on the device: latents, features, caches and coefficients, from the first step to
the last.

Consumes engines that read and write at addresses, and the `AddressPlan` of a program, which is computed at load for the
size and batch that are most frequent, and for others when they are first asked for; what a step needs of the host is to
enqueue its launches, and to set the few addresses that differ from the step before. One stream; one workspace for all
engines, because they run one after another; one arena for all programs, because requests do. A loop that is recorded as
a graph has execution contexts of its own, which nothing touches afterwards: the graph refers to them.

Only the request's own tensors go up (conditioning, constants of its size, first latents, weights of guidance), and only
the final latents come down.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from otcache.schemas.combinations import combinations
from otcache.schemas.manifest import Manifest, TensorInfo
from otcache.schemas.program import Program
from otcache.schemas.segments import Segment, coarsen
from otcache.schemas.shapes import describe_size
from otcache.schemas.sized import whole_size

from ..messages import readable_size
from .address_plan import AddressPlan, align, plan_addresses
from .backend import DTYPES, Array, Denoiser, Origin, Run, shape_of
from .finite import is_spoilt
from .launches import GUIDANCE, Value

_log = logging.getLogger(__name__)
Shape = tuple[int, ...]
_Key = tuple[object, ...]
"""Of a program: budget, batch, size."""
MOST_PREPARED = 64
"""Programs (of a budget, a batch and a size) that are kept: requests choose them, and each holds memory of the device.
"""


class Recording(Protocol):
    """Launches that were recorded once."""

    def __call__(self) -> None:
        """Enqueue all of them."""

    def close(self) -> None: ...


class Device(Protocol):
    """Memory of a GPU, and one stream on which everything happens in order."""

    def activate(self) -> None:
        """Make the calling thread use the device."""

    def allocate(self, size_bytes: int) -> int:
        """Address of new memory. Raises HostError if there is no room."""

    def free(self, address: int) -> None: ...

    def free_bytes(self) -> int:
        """Memory that is left."""

    def upload(self, address: int, array: Array) -> None:
        """Copy to the device, in stream order; the array may change after the call."""

    def download(self, address: int, array: Array) -> None:
        """Fill the array from the device, after everything before it in the stream."""

    def synchronize(self) -> None:
        """Wait for the stream."""

    def record(self, launch: Callable[[], None]) -> Recording:
        """What `launch` enqueues, as a graph that is enqueued as a whole. Nothing runs while recording."""


class Context(Protocol):
    """A state in which an engine runs: on memory that it is told of."""

    def use_workspace(self, address: int, size_bytes: int) -> None: ...

    def set_shape(self, tensor: str, shape: Shape) -> None: ...

    def set_address(self, tensor: str, address: int) -> None: ...

    def enqueue(self) -> None:
        """Run on the device's stream. Raises HostError."""


class ResidentEngine(Protocol):
    """An engine that keeps nothing but its weights."""

    workspace_bytes: int
    """What it needs beside its inputs and outputs, while it runs."""

    def context(self) -> Context:
        """A new one. Raises HostError if there is no room."""


@dataclass(frozen=True)
class _Call:
    engine: str
    addresses: tuple[tuple[str, int], ...]
    shapes: tuple[tuple[str, Shape], ...]


class _Told:
    """A context that is told only what it has not been told before."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._shapes: dict[str, Shape] = {}
        self._addresses: dict[str, int] = {}

    def run(self, call: _Call) -> None:
        for tensor, shape in call.shapes:
            if self._shapes.get(tensor) != shape:
                self._context.set_shape(tensor, shape)
                self._shapes[tensor] = shape
        for tensor, address in call.addresses:
            if self._addresses.get(tensor) != address:
                self._context.set_address(tensor, address)
                self._addresses[tensor] = address
        self._context.enqueue()


@dataclass
class _Prepared:
    """A program for a number of samples, with the addresses of everything."""

    plan: AddressPlan
    arena: int
    guidance: int
    """Where the weights of the branches go."""
    steps: tuple[tuple[_Call, ...], ...]
    contexts: Mapping[str, _Told]
    """By engine."""
    recording: Recording | None = None

    def address(self, value: Value) -> int:
        return self.arena + self.plan.places[value].offset


class ResidentLoop:
    """A `Denoiser` over resident engines. One request at a time."""

    def __init__(
        self,
        manifest: Manifest,
        engines: Mapping[str, ResidentEngine],
        device: Device,
        *,
        segments: tuple[Segment, ...],
        cuda_graph: bool = False,
        samples: int = 1,
    ) -> None:
        """manifest, samples: at the size and batch that most requests have; their programs are planned now."""
        self._segments, self._branches = segments, manifest.guidance.branches
        self._engines, self._device, self._cuda_graph = engines, device, cuda_graph
        self._arena, self._arena_bytes, self._workspace = 0, 0, 0
        self._tables: list[int] = []
        self._plans: dict[_Key, AddressPlan] = {}
        self._prepared: dict[_Key, _Prepared] = {}
        self._contexts: dict[str, _Told] = {}
        """Of all programs, unless they are recorded."""
        self._workspace_bytes = max(1, *(engine.workspace_bytes for engine in engines.values()))
        device.activate()
        try:
            self._workspace = device.allocate(self._workspace_bytes)
            if not cuda_graph:
                self._contexts = self._make_contexts(engines)
            plans = [self._plan(manifest, entry.budget, entry.program, samples)[1] for entry in manifest.programs]
            self._grow(max(plan.size_bytes for plan in plans))
        except BaseException:
            self.close()
            raise

    def __call__(self, run: Run) -> NDArray[np.float32]:
        self._device.activate()
        n = len(run.latents)
        prepared = self._prepare(run, n)
        self._upload(prepared, run)
        run.timer.begin_steps()
        total = len(prepared.steps)
        if prepared.recording is not None:
            prepared.recording()
            self._device.synchronize()
            for done in range(1, total + 1):
                run.step_done(done, total)
        else:
            for done, calls in enumerate(prepared.steps, start=1):
                self._enqueue(prepared, calls)
                if run.watched:
                    self._device.synchronize()
                run.step_done(done, total)
        final = np.empty(run.latents.shape, np.float32)
        self._device.download(prepared.address(prepared.plan.listing.final), final)
        if self._cuda_graph and prepared.recording is None:  # after one run, in which libraries have set themselves up
            self._record(prepared, f"budget {run.budget}, {describe_size(whole_size(run.manifest))}, {n} at once")
        return final

    def origin_of_spoilt(self, run: Run) -> Origin | None:
        self._device.activate()
        n = len(run.latents)
        if self._cuda_graph:  # what a recorded graph refers to may not be touched
            self._forget()
        prepared = self._prepare(run, n)
        self._upload(prepared, run)
        listing = prepared.plan.listing
        calls = (call for step in prepared.steps for call in step)
        for launch, call in zip(listing.launches, calls, strict=True):
            self._enqueue(prepared, [call])
            for value in launch.writes.values():
                rows = n if listing.counts_samples(value) else n * self._branches
                info = listing.tensors[value]
                array = np.empty(shape_of(info, rows), DTYPES[info.dtype])
                self._device.download(prepared.address(value), array)
                if is_spoilt(array):
                    return Origin(launch.engine, launch.step)
        return None

    def close(self) -> None:
        """Free what the loop has allocated."""
        self._device.activate()
        self._forget()
        self._contexts = {}
        if self._workspace:
            self._device.free(self._workspace)
        self._workspace = 0

    def _forget(self) -> None:
        """Free the arena, and with it every program that was prepared in it."""
        self._device.synchronize()
        for prepared in self._prepared.values():
            if prepared.recording is not None:
                prepared.recording.close()
        for address in (self._arena, *self._tables):
            if address:
                self._device.free(address)
        self._prepared, self._tables, self._arena, self._arena_bytes = {}, [], 0, 0

    def _plan(self, manifest: Manifest, budget: str, program: Program, n: int) -> tuple[_Key, AddressPlan]:
        key = (budget, n, *whole_size(manifest).items())
        if key not in self._plans:
            if len(self._plans) >= MOST_PREPARED:
                self._plans.clear()
            self._plans[key] = plan_addresses(coarsen(manifest, self._segments), program, n)
        return key, self._plans[key]

    def _prepare(self, run: Run, n: int) -> _Prepared:
        key, plan = self._plan(run.manifest, run.budget, run.program, n)
        if key not in self._prepared:
            if len(self._prepared) >= MOST_PREPARED:
                self._forget()
            self._grow(plan.size_bytes)
            tables, content = _tables(plan, run)
            base = self._device.allocate(len(content))
            self._tables.append(base)
            self._device.upload(base, np.frombuffer(content, np.uint8))
            placed = {value: base + offset for value, offset in tables.items()}
            self._prepared[key] = self._bind(coarsen(run.manifest, self._segments), plan, placed, n)
        return self._prepared[key]

    def _grow(self, size_bytes: int) -> None:
        """An arena of at least that size. A new one has other addresses, so what was prepared is prepared again."""
        if size_bytes <= self._arena_bytes:
            return
        self._forget()
        self._arena = self._device.allocate(size_bytes)
        self._arena_bytes = size_bytes

    def _bind(self, manifest: Manifest, plan: AddressPlan, tables: Mapping[Value, int], n: int) -> _Prepared:
        info = {t.name: t for stage in manifest.trunk for t in (*stage.inputs, *stage.outputs)}
        sums = {"@" + combination.name: combination for combination in combinations(manifest)}
        addresses = {value: self._arena + place.offset for value, place in plan.places.items()} | dict(tables)
        steps: list[list[_Call]] = []
        for launch in plan.listing.launches:
            if launch.step == len(steps):
                steps.append([])
            both = (*launch.reads.items(), *launch.writes.items())
            pairs = tuple((name, addresses[value]) for name, value in both)
            rows, inputs = n * self._branches, [info[name] for name in launch.reads if name in info]
            if combination := sums.get(launch.engine):
                rows, inputs = n if combination.counts_samples else rows, list(combination.inputs)
            steps[-1].append(_Call(launch.engine, pairs, _shapes(inputs, rows)))
        contexts = self._contexts or self._make_contexts(launch.engine for launch in plan.listing.launches)
        return _Prepared(plan, self._arena, tables[GUIDANCE], tuple(tuple(calls) for calls in steps), contexts)

    def _upload(self, prepared: _Prepared, run: Run) -> None:
        x, *_ = (value for value in prepared.plan.listing.brought if value.name == "@x")
        self._device.upload(prepared.address(x), np.ascontiguousarray(run.latents, np.float32))
        self._device.upload(prepared.guidance, np.array(run.guidance_weights, np.float32))
        for tensor in run.manifest.steady_inputs:
            array = as_type(run.inputs[tensor.name], tensor.dtype)
            self._device.upload(prepared.address(Value(tensor.name, 0)), array)

    def _make_contexts(self, names: Iterable[str]) -> dict[str, _Told]:
        found = {}
        for name in dict.fromkeys(names):
            context = self._engines[name].context()
            context.use_workspace(self._workspace, self._workspace_bytes)
            found[name] = _Told(context)
        return found

    def _record(self, prepared: _Prepared, what: str) -> None:
        def launch() -> None:
            for calls in prepared.steps:
                self._enqueue(prepared, calls)

        before = self._device.free_bytes()
        prepared.recording = self._device.record(launch)
        _log.info(
            "%s: recorded %d launches in %d contexts: %s of values, %s of workspace, %s for the graph",
            what,
            sum(map(len, prepared.steps)),
            len(prepared.contexts),
            readable_size(prepared.plan.size_bytes),
            readable_size(self._workspace_bytes),
            readable_size(max(0, before - self._device.free_bytes())),
        )

    def _enqueue(self, prepared: _Prepared, calls: Sequence[_Call]) -> None:
        for call in calls:
            prepared.contexts[call.engine].run(call)


def _shapes(inputs: Sequence[TensorInfo], rows: int) -> tuple[tuple[str, Shape], ...]:
    """Of the inputs whose shapes vary."""
    varying = [tensor for tensor in inputs if "batch" in tensor.shape or any(tensor.symbols)]
    return tuple((tensor.name, shape_of(tensor, rows)) for tensor in varying)


def _tables(plan: AddressPlan, run: Run) -> tuple[dict[Value, int], bytes]:
    """Offset of every constant of a program, and their content.

    They are timesteps, coefficients and room for guidance's weights.
    """
    manifest = run.manifest
    info = {tensor.name: tensor for tensor in manifest.trunk[0].inputs}.get(manifest.timestep_input) or next(
        tensor for stage in manifest.trunk for tensor in stage.inputs if tensor.name == manifest.timestep_input
    )
    rows = len(run.latents) * manifest.guidance.branches
    offsets: dict[Value, int] = {}
    known: dict[bytes, int] = {}
    content = bytearray(align(4 * manifest.guidance.branches))
    offsets[GUIDANCE] = 0

    def place(value: Value, array: Array) -> None:
        data = array.tobytes()
        if data not in known:
            known[data] = len(content)
            content.extend(data.ljust(align(len(data)), b"\0"))
        offsets[value] = known[data]

    for number, step in enumerate(run.program.steps):
        time = np.full(shape_of(info, rows), step.timestep * manifest.timestep_scale, np.float32)
        place(Value("@timestep", number), as_type(time, info.dtype))
    for launch in plan.listing.launches:
        for value in launch.reads.values():
            if value.name == "@coefs":
                place(value, np.array(launch.coefs, np.float32))
    return offsets, bytes(content)


def as_type(array: Array, dtype: str) -> Array:
    """In C order and in one of the manifest's types, rounded to nearest."""
    if dtype == "bfloat16":
        array = np.asarray(array, np.float32)  # rounded twice from float64, as torch does
    return np.ascontiguousarray(array, DTYPES[dtype])


def resident_denoiser(
    manifest: Manifest,
    engines: Mapping[str, Any],
    device: Device,
    *,
    segments: tuple[Segment, ...],
    cuda_graph: bool,
    samples: int = 1,
) -> Denoiser:
    """The loop over the engines that it needs: the trunk's and the combinations'. segments: blocks with an engine
    together.

    manifest, samples: at the size and batch that most requests have.
    """
    names = {stage.name for stage in coarsen(manifest, segments).trunk}
    needed = {name: engine for name, engine in engines.items() if name in names or name.startswith("@")}
    return ResidentLoop(manifest, needed, device, segments=segments, cuda_graph=cuda_graph, samples=samples)
