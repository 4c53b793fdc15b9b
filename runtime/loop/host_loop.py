"""Embed, blocks and head of an artifact as the loop's `SplitModel`: engines bound to one set of buffers.

Every trunk tensor has a name and a slot; slots are shared by tensors of one type and shape that are never needed at
the same time, so a stage's output buffer is the next stage's input buffer and memory does not grow with depth.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from itertools import count

import numpy as np

from otcache.schemas.consistency import check_wiring
from otcache.schemas.errors import ArtifactError
from otcache.schemas.manifest import Manifest, Stage, TensorInfo

from .backend import Array, Backend, Engine, Origin, Run, Tensor, shape_of
from .finite import is_spoilt
from .loop import Float32, Residual, sample
from .timing import PART_OF_KIND, Timer


def plan_buffers(manifest: Manifest) -> dict[str, int]:
    """Slot of every trunk tensor. A pure function of the manifest.

    Request inputs stay for the whole run. Another tensor lives from the stage that writes it to the last one that
    reads it; a feature's source and result from the embed (a cached step writes the result there) to the head.
    """
    trunk = manifest.trunk
    last = len(trunk) - 1
    info: dict[str, TensorInfo] = {}
    start: dict[str, int] = {}
    end: dict[str, int] = {}
    for index, stage in enumerate(trunk):
        for tensor in stage.inputs:
            info.setdefault(tensor.name, tensor)
            start.setdefault(tensor.name, -1)
            end[tensor.name] = last + 1 if start[tensor.name] < 0 else index
        for tensor in stage.outputs:
            info[tensor.name], start[tensor.name], end[tensor.name] = tensor, index, index
    end[manifest.output] = last + 1
    for feature in manifest.features:
        start[feature.result] = min(start[feature.result], 0)
        for name in (feature.source, feature.result):
            end[name] = max(end[name], last)

    slots: dict[str, int] = {}
    free_after: dict[int, int] = {}
    kind: dict[int, tuple[object, ...]] = {}
    new = count()
    for name in sorted(info, key=lambda name: (start[name], list(info).index(name))):
        wanted = (info[name].dtype, *info[name].shape)
        slot = next((s for s, after in free_after.items() if after < start[name] and kind[s] == wanted), None)
        slots[name] = next(new) if slot is None else slot
        kind[slots[name]], free_after[slots[name]] = wanted, end[name]
    return slots


def check_trunk(manifest: Manifest) -> None:
    """What the loop relies on; a manifest that was read has passed it already. Raises ArtifactError."""
    try:
        check_wiring(manifest)
    except ValueError as error:
        raise ArtifactError(f"artifact is damaged: manifest.json: {error}") from None


class Trunk:
    """Engines bound to buffers for n samples. Not shared between requests; holds no state that outlives one."""

    def __init__(
        self,
        manifest: Manifest,
        engines: Mapping[str, Engine],
        backend: Backend,
        n: int,
        timer: Timer | None = None,
        look: Callable[[str, Mapping[str, Array]], None] | None = None,
    ) -> None:
        """look: called after each stage with its name and what it has written."""
        self._manifest, self._look = manifest, look
        self._n = n
        self._timer = timer or Timer()
        self._buffers = _make_buffers(manifest, backend, manifest.guidance.branches * n)
        self._calls = [(stage, self._bind(stage, engines[stage.name])) for stage in manifest.trunk]

    def hold(self, inputs: Mapping[str, Array]) -> None:
        """Put in place what stays for all steps: with a batch (g, n, …), others as the manifest has them."""
        for tensor in self._manifest.steady_inputs:
            self._buffers[tensor.name].write(inputs[tensor.name].reshape(self._buffers[tensor.name].shape))

    def embed(self, x: Float32, timestep: float) -> None:
        branches = self._manifest.guidance.branches
        latents = self._buffers[self._manifest.latents_input]
        latents.write(np.broadcast_to(x, (branches, *x.shape)).reshape(latents.shape))
        time = self._buffers[self._manifest.timestep_input]
        time.write(np.full(time.shape, timestep, np.float32))
        self._run("embed")

    def blocks(self) -> None:
        self._run("block")

    def residual(self) -> Residual:
        with self._timer.part("forecast"):
            return tuple(
                np.subtract(self._read(feature.result), self._read(feature.source), dtype=np.float32)
                for feature in self._manifest.features
            )

    def apply(self, residual: Residual) -> None:
        with self._timer.part("forecast"):
            for feature, part in zip(self._manifest.features, residual, strict=True):
                self._buffers[feature.result].write(self._read(feature.source) + part)

    def head(self) -> Float32:
        self._run("head")
        output = self._read(self._manifest.output)
        return output.reshape(self._manifest.guidance.branches, self._n, *output.shape[1:]).astype(np.float32)

    def _read(self, name: str) -> Array:
        return self._buffers[name].read()

    def _run(self, kind: str) -> None:
        for stage, call in self._calls:
            if stage.kind != kind:
                continue
            with self._timer.part(PART_OF_KIND[kind], stage.name):
                call()
            if self._look is not None:
                self._look(stage.name, {tensor.name: self._read(tensor.name) for tensor in stage.outputs})

    def _bind(self, stage: Stage, engine: Engine) -> Callable[[], None]:
        inputs = {tensor.name: self._buffers[tensor.name] for tensor in stage.inputs}
        return engine.bind(inputs, {tensor.name: self._buffers[tensor.name] for tensor in stage.outputs})


class HostLoop:
    """A `Denoiser` with its arithmetic on the host: engines run one after the other, each to its end."""

    def __init__(self, engines: Mapping[str, Engine], backend: Backend) -> None:
        self._engines, self._backend = engines, backend

    def __call__(self, run: Run) -> Float32:
        return self._run(run)

    def origin_of_spoilt(self, run: Run) -> Origin | None:
        done = 0

        def look(stage: str, outputs: Mapping[str, Array]) -> None:
            if any(map(is_spoilt, outputs.values())):
                raise _FoundError(Origin(stage, done))

        def count(finished: int, _: int) -> None:
            nonlocal done
            done = finished

        try:
            self._run(dataclasses.replace(run, timer=Timer(), step_done=count), look)
        except _FoundError as found:
            return found.origin
        return None

    def _run(self, run: Run, look: Callable[[str, Mapping[str, Array]], None] | None = None) -> Float32:
        manifest = run.manifest
        trunk = Trunk(manifest, self._engines, self._backend, len(run.latents), run.timer, look)
        trunk.hold(run.inputs)
        run.timer.begin_steps()
        return sample(
            trunk,
            run.program,
            run.latents,
            guidance_weights=run.guidance_weights,
            keep_norm=manifest.guidance.kind == "cfg_norm",
            timestep_scale=manifest.timestep_scale,
            callback=run.step_done,
        )

    def close(self) -> None:
        """Buffers end with their request."""


class _FoundError(Exception):
    """Ends a run that looks for the first number that is not finite."""

    def __init__(self, origin: Origin) -> None:
        super().__init__(origin)
        self.origin = origin


def run_stage(
    stage: Stage, engine: Engine, backend: Backend, inputs: Mapping[str, Array], timer: Timer
) -> dict[str, Array]:
    """Run a stage on its own, such as text encoder or decoder: arrays of one batch in, new arrays out."""
    batch = max((len(inputs[tensor.name]) for tensor in stage.inputs if tensor.shape[:1] == ("batch",)), default=1)
    reading = {tensor.name: backend.empty(shape_of(tensor, batch), tensor.dtype) for tensor in stage.inputs}
    writing = {tensor.name: backend.empty(shape_of(tensor, batch), tensor.dtype) for tensor in stage.outputs}
    for name, tensor in reading.items():
        tensor.write(inputs[name])
    call = engine.bind(reading, writing)
    with timer.part(PART_OF_KIND[stage.kind], stage.name):
        call()
    return {name: tensor.read() for name, tensor in writing.items()}


def _make_buffers(manifest: Manifest, backend: Backend, batch: int) -> dict[str, Tensor]:
    info = {t.name: t for stage in manifest.trunk for t in (*stage.inputs, *stage.outputs)}
    slots: dict[int, Tensor] = {}
    result: dict[str, Tensor] = {}
    for name, slot in plan_buffers(manifest).items():
        if slot not in slots:
            slots[slot] = backend.empty(shape_of(info[name], batch), info[name].dtype)
        result[name] = slots[slot]
    return result
