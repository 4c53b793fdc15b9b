"""Where a request's time goes: parts, stages and steps. Consumes marks from `Sampler` and `Trunk`, produces a `Timing`.

Every moment belongs to exactly one part, so that the parts add up to the total:

    wait        for the device while other requests have it (and in a `Service`, for the request's turn)
    encode      tokenizers and text encoder
    embed, blocks, head     the stages of the trunk
    forecast    residuals of a program that caches them: taken, weighed, added
    decode      latents → pictures
    overhead    everything else: noise, updates of the latents, copies into buffers, the caller's progress callback

A backend is expected to have finished a stage when its call returns, as ONNX Runtime has on the CPU and with CUDA. One
that keeps everything on a GPU (`resident`) has only whole steps to time: all of a step is `overhead` there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

PARTS = ("wait", "encode", "embed", "blocks", "forecast", "head", "decode", "overhead")
PART_OF_KIND = {"text_encoder": "encode", "embed": "embed", "block": "blocks", "head": "head", "decoder": "decode"}
"""Part of a stage, by the stage's kind."""


@dataclass(frozen=True, kw_only=True)
class StepTiming:
    """One step of the program. Seconds."""

    step_index: int
    """On the timeline of the full sampler."""
    compute: bool
    total_s: float
    parts: dict[str, float]
    stages: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One request. Seconds; `parts` has all of PARTS and adds up to `total_s`."""

    total_s: float
    parts: dict[str, float]
    stages: dict[str, float]
    """Time inside the engine of each stage, by its name."""
    steps: tuple[StepTiming, ...]

    @property
    def latency_s(self) -> float:
        """What the request would have taken alone: all but waiting."""
        return self.total_s - self.parts["wait"]

    def as_json(self) -> dict[str, Any]:
        """The same as JSON's types, in microseconds' resolution."""
        return {**_round(asdict(self)), "latency_s": round(self.latency_s, 6)}


class Timer:
    """Collects the times of one request, which begins when the timer is made. Used by one thread at a time."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._begin = clock()
        self._all = _Spent()
        self._step = _Spent()
        self._step_begin = self._begin
        self._steps: list[StepTiming] = []
        self._inner = [0.0]
        """For every open mark, outermost first, the time that marks inside it took."""

    @contextmanager
    def part(self, part: str, stage: str | None = None) -> Iterator[None]:
        """Time spent inside belongs to `part` (and to `stage`), less what marks inside claim."""
        start = self._clock()
        self._inner.append(0.0)
        try:
            yield
        finally:
            seconds = self._clock() - start
            own = seconds - self._inner.pop()
            self._inner[-1] += seconds
            for spent in (self._all, self._step):
                spent.add(part, stage, own)

    def waited(self) -> None:
        """All time since the timer was made has been spent in a queue."""
        self._all.add("wait", None, self._clock() - self._begin)

    def begin_steps(self) -> None:
        """The first step begins now."""
        self._step, self._step_begin = _Spent(), self._clock()

    def end_step(self, step_index: int, compute: bool) -> None:
        """A step has ended and the next one begins."""
        now = self._clock()
        total = now - self._step_begin
        parts = {**self._step.parts, "overhead": total - sum(self._step.parts.values())}
        self._steps.append(
            StepTiming(step_index=step_index, compute=compute, total_s=total, parts=parts, stages=self._step.stages)
        )
        self._step, self._step_begin = _Spent(), now

    def timing(self) -> Timing:
        """What has been collected until now."""
        total = self._clock() - self._begin
        parts = {part: self._all.parts.get(part, 0.0) for part in PARTS}
        parts["overhead"] = total - sum(parts.values())
        return Timing(total_s=total, parts=parts, stages=dict(self._all.stages), steps=tuple(self._steps))


class _Spent:
    """Seconds by part and by stage."""

    def __init__(self) -> None:
        self.parts: dict[str, float] = {}
        self.stages: dict[str, float] = {}

    def add(self, part: str, stage: str | None, seconds: float) -> None:
        self.parts[part] = self.parts.get(part, 0.0) + seconds
        if stage is not None:
            self.stages[stage] = self.stages.get(stage, 0.0) + seconds


def _round(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _round(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_round(part) for part in value]
    return round(value, 6) if isinstance(value, float) else value
