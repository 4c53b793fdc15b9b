"""One plan: ONNX files or a combination, a target and shapes → a file. Runs in a worker process (`workers`)."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from otcache.schemas.combinations import Combination
from otcache.schemas.digest import digest_of_bytes
from otcache.schemas.errors import HostError
from otcache.schemas.messages import one_line
from otcache.schemas.whole_files import write_whole

from ..engines.profiles import Range
from ..engines.tensorrt_library import buildable_targets, error_log, library
from . import timing_cache
from .network import NetworkError, add_combination, create_network, layers_by_type, parse_stage
from .segments import OnnxSegment, file_from_segment


@dataclass(frozen=True, kw_only=True)
class BuildJob:
    """What becomes a plan."""

    name: str
    """Of the stage, segment or combination."""
    source: Path | OnnxSegment | Combination
    backend: str
    target: str
    shapes: dict[str, Range]
    """Of the inputs whose shape varies."""
    workspace_bytes: int | None
    output: Path
    timing_cache: Path
    """The file of what builds share (`timing_cache`); the library for RTX writes none."""


@dataclass(frozen=True, kw_only=True)
class BuiltPlan:
    """A plan that was written."""

    size_bytes: int
    digest: str
    build_s: float
    layers: dict[str, int]
    """Number of layers by the type of what they write."""


def build_plan(job: BuildJob, lock: AbstractContextManager[object] | None = None) -> BuiltPlan:
    """Build and write the plan, whole or not at all.

    lock: held by one at a time of the builds that share a timing cache. Raises HostError, OSError.
    """
    begin = time.perf_counter()
    trt = library(job.backend)
    log = error_log(trt)
    builder = trt.Builder(log)
    with ExitStack() as files:
        network, _weights = _network(job, trt, builder, log, files)
        config = _config(job, trt, builder)
        timings = None if buildable_targets(trt) else timing_cache.attach(config, job.timing_cache)
        plan = builder.build_serialized_network(network, config)
    if plan is None:
        reason = one_line(log.errors[-1] if log.errors else "it gives no reason")
        fix = "build for another --target or type, or serve it with --backend onnxruntime"
        if "memory" in reason.lower():
            fix = "give it more with --workspace, or build fewer at once with --jobs 1"
        raise _error(job, trt, f"{reason}: {fix}")
    data = memoryview(plan)
    write_whole(job.output, data, alone=True)
    if timings is not None:
        timing_cache.keep(config, timings, job.timing_cache, lock or nullcontext())
    seconds = time.perf_counter() - begin
    return BuiltPlan(
        size_bytes=data.nbytes, digest=digest_of_bytes(data), build_s=seconds, layers=layers_by_type(network)
    )


def _network(job: BuildJob, trt: Any, builder: Any, log: Any, files: ExitStack) -> tuple[Any, Any]:
    """The job's network, and what owns its weights, which must live until the plan is built.

    files: closes what is temporary when it is closed.
    """
    network = create_network(builder, trt)
    try:
        if isinstance(job.source, Combination):
            return network, add_combination(trt, network, job.source)
        path = job.source
        if isinstance(path, OnnxSegment):
            path = files.enter_context(file_from_segment(path, job.output.with_name(f".{job.output.name}.onnx")))
        return network, parse_stage(trt, network, path, log)
    except NetworkError as error:
        fix = "serve it with --backend onnxruntime, or replace the operator in the model and compile it again"
        raise _error(job, trt, f"{error}: expected an operator that it has: {fix}") from None


def _config(job: BuildJob, trt: Any, builder: Any) -> Any:
    config = builder.create_builder_config()
    if job.target in buildable_targets(trt):
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, job.target.replace("sm_", "SM")), 0)
    config.clear_flag(trt.BuilderFlag.TF32)  # float32 in the manifest means float32
    if job.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, job.workspace_bytes)
    if job.shapes:
        config.add_optimization_profile(_profile(job, builder))
    return config


def _profile(job: BuildJob, builder: Any) -> Any:
    profile = builder.create_optimization_profile()
    for name, (smallest, usual, largest) in job.shapes.items():
        profile.set_shape(name, smallest, usual, largest)
    return profile


def _error(job: BuildJob, trt: Any, reason: str) -> HostError:
    return HostError(f"{job.name}: {job.backend} {trt.__version__} cannot build it for {job.target}: {reason}")
