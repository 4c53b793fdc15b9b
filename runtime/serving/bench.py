"""Latency of an artifact on this host: percentiles over requests, by budget and batch, with the parts they consist of.

Requests of all budgets and batches take turns, round by round, so that a disturbance of the host hits all of them.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from otcache.schemas.errors import ArtifactError, UsageError
from otcache.schemas.manifest import MANIFEST_NAME
from otcache.schemas.manifest_file import read_manifest, write_manifest
from otcache.schemas.messages import one_line
from otcache.schemas.places import check_writable

from ..artifact.reader import Artifact
from ..loop.timing import PARTS, StepTiming, Timer, Timing
from .sampler import LATENCY, Sampler

PERCENTILES = (50, 90, 95, 99)
PROMPT = "a photograph"
"""What is drawn; the cost does not depend on it."""


def measure(
    sampler: Sampler,
    budgets: Sequence[str],
    batches: Sequence[int],
    *,
    repeat: int,
    warmup: int = 1,
    prompt: str = PROMPT,
    seconds: float | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """`repeat` requests of every budget and batch, after `warmup` that do not count; see `summarise` for the result.

    A batch is one prompt with that many pictures. seconds: after so many of rounds that count no further one begins.
    progress: called with (finished, all) requests. Raises RequestError.
    """
    kinds = [(budget, batch) for budget in budgets for batch in batches]
    for budget, batch in kinds:
        sampler.check(prompt, budget=budget, images_per_prompt=batch)
    timings: dict[tuple[str, int], list[Timing]] = {kind: [] for kind in kinds}
    for round_ in range(warmup + repeat):
        if round_ <= warmup:
            start = time.perf_counter()
        elif seconds is not None and time.perf_counter() - start > seconds:
            break
        for index, (budget, batch) in enumerate(kinds):
            timer = Timer()
            sampler(prompt, budget=budget, images_per_prompt=batch, seed=round_, timer=timer)
            if round_ >= warmup:
                timings[budget, batch].append(timer.timing())
            if progress is not None:
                progress(round_ * len(kinds) + index + 1, (warmup + repeat) * len(kinds))
    return [{"budget": budget, "batch": batch, **summarise(found)} for (budget, batch), found in timings.items()]


def summarise(timings: Sequence[Timing]) -> dict[str, Any]:
    """`requests`, statistics of `latency_s` and of every part and stage, and of steps by whether they were computed."""
    steps = {True: "computed", False: "cached"}
    return {
        "requests": len(timings),
        "latency_s": statistics_of([timing.latency_s for timing in timings]),
        "parts": {part: statistics_of([timing.parts[part] for timing in timings]) for part in PARTS},
        "stages": {name: statistics_of([timing.stages[name] for timing in timings]) for name in timings[0].stages},
        "steps": {
            name: _summarise_steps(found)
            for compute, name in steps.items()
            if (found := [step for timing in timings for step in timing.steps if step.compute == compute])
        },
    }


def _summarise_steps(steps: Sequence[StepTiming]) -> dict[str, Any]:
    names = [part for part in PARTS if any(part in step.parts for step in steps)]
    parts = {part: statistics_of([step.parts.get(part, 0.0) for step in steps]) for part in names}
    return {"count": len(steps), "total_s": statistics_of([step.total_s for step in steps]), "parts": parts}


def statistics_of(seconds: Sequence[float]) -> dict[str, float]:
    """Mean, extremes and percentiles (linear between the two nearest), in seconds to the microsecond."""
    values = np.asarray(seconds)
    found = {"mean": values.mean(), "min": values.min()}
    found |= {f"p{rank}": np.percentile(values, rank) for rank in PERCENTILES}
    return {name: round(float(value), 6) for name, value in {**found, "max": values.max()}.items()}


def host_facts() -> dict[str, Any]:
    """What the times depend on, beside the artifact."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    facts = {"name": platform.node(), "system": platform.platform(), "machine": platform.machine()}
    return {**facts, "cpu": _cpu_name(), "cpus": cpus}


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("otcache", "numpy", "onnxruntime", "onnxruntime-gpu"):
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def check_saveable(artifact: str | os.PathLike[str]) -> None:
    """Raise UsageError if an artifact's manifest cannot be replaced, before anything is measured for it."""
    if (folder := Path(artifact)).is_dir():
        check_writable(folder / MANIFEST_NAME, "--save")


def save_latencies(artifact: Artifact, latencies_s: Mapping[str, float]) -> None:
    """Put the latency of one picture at each budget into the manifest's measurements, where `budget_for` finds it.

    They stand outside the digested core: the digest stays, and so does a signature of it. Other measurements are kept.
    Whole or not at all. Raises ArtifactError if the artifact is another one by now, UsageError if it cannot be written.
    """
    target = artifact.folder / MANIFEST_NAME
    read = read_manifest(artifact.folder)
    if read.manifest.digest != artifact.manifest.digest:
        raise ArtifactError(f"{artifact.folder}: it has changed while it was measured: measure it again")
    names = {LATENCY + budget for budget in latencies_s}
    kept = [entry for entry in read.stated.get("measurements", []) if entry["name"] not in names]
    new = [{"name": LATENCY + name, "value": seconds, "unit": "s"} for name, seconds in latencies_s.items()]
    try:
        write_manifest(artifact.folder, {**read.stated, "measurements": kept + new})
    except OSError as error:
        raise UsageError(
            f"--save: {target} cannot be written: {one_line(error.strerror or error)}: copy the artifact to where it "
            "can"
        ) from None


def _cpu_name() -> str:
    with suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        for line in file:
            if line.startswith("model name"):
                return one_line(line.partition(":")[2])
    return platform.processor()
