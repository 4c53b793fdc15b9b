"""Which plans a host runs, what it says of the others, and that none is opened before everything about it is right."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import host_device
import numpy as np
import pytest
from click.testing import CliRunner

from otcache.runtime import ArtifactError, HostError, RequestError, Sampler
from otcache.runtime.artifact.reader import Artifact
from otcache.runtime.build.build_engines import build_engines
from otcache.runtime.cli import main as cli
from otcache.runtime.engines import plan_hosts
from otcache.runtime.engines import tensorrt as tensorrt_engine
from otcache.runtime.engines.choose import BACKENDS, select_backend
from otcache.runtime.engines.gpu import why_no_gpu
from otcache.runtime.engines.tensorrt import TensorrtBackend, plan_parts
from otcache.runtime.loop.backend import Options
from otcache.runtime.messages import readable_size
from otcache.runtime.shipping.verify import verify

pytest.importorskip("tensorrt_rtx")
RTX = "tensorrt-rtx"
NO_GPU = why_no_gpu()[1] is None


@pytest.fixture(scope="module")
def both(built, tmp_path_factory):
    """With plans for two targets. Not to be changed."""
    folder = Path(shutil.copytree(built, tmp_path_factory.mktemp("artifacts") / "small"))
    build_engines(folder, backend=RTX, targets=("sm_86", "sm_89"))
    return folder


@pytest.fixture
def on_sm_89(monkeypatch):
    monkeypatch.setattr(plan_hosts, "why_no_gpu", lambda: (None, "sm_89"))


def plans_of(folder, target="sm_89"):
    return next(engine for engine in Artifact.open(folder).manifest.engines if engine.target == target)


def test_plans_that_fit_are_chosen(built, on_sm_89):
    plans, reason = plan_hosts.usable_plans(RTX, Artifact.open(built).manifest)
    assert reason is None and plans.target == "sm_89"


@pytest.mark.parametrize(
    ("change", "host", "words"),
    [
        (
            {"version": "1.0.0.1"},
            "sm_89",
            r"built with version 1.0.0.1, and here is 1\..*: otc build-engines A --backend "
            r"tensorrt-rtx --target sm_89",
        ),
        (
            {},
            "sm_120",
            "built for sm_89, and this GPU is sm_120: otc build-engines A --backend tensorrt-rtx --target sm_120",
        ),
        ({}, "sm_90", "this GPU is sm_90: otc build-engines A --backend tensorrt --target sm_90"),
        ({"platform": "windows-amd64"}, "sm_89", "built for windows-amd64, and this is .*: otc build-engines A"),
        ({"backend": "tensorrt", "version": "11.4.0"}, "sm_89", "not installed: pip install tensorrt==11.4.0"),
        ({"profile": {}}, "sm_89", "built for sizes that the manifest does not name: otc build-engines A"),
        ({}, None, "no driver: expected a GPU of compute capability sm_89"),
    ],
)
def test_what_a_host_says_of_other_plans(built, monkeypatch, change, host, words):
    monkeypatch.setattr(plan_hosts, "why_no_gpu", lambda: ("no driver" if host is None else None, host))
    plans = plans_of(built).model_copy(update=change)

    assert re.search(words, plan_hosts.why_not(plans, "A"))
    with pytest.raises(HostError, match="cannot run the artifact's plans for sm_89"):
        TensorrtBackend(plans, Artifact.open(built).manifest)


@pytest.mark.skipif(not NO_GPU, reason="there is a GPU")
def test_auto_passes_over_with_a_reason_for_each(built):
    selection = select_backend("auto", Artifact.open(built).manifest)
    assert selection.backend.name == "onnxruntime" and list(selection.passed_over) == [RTX, "tensorrt"]
    assert "no NVIDIA GPU" in selection.passed_over[RTX]
    with pytest.raises(HostError, match="onnxruntime: it has no CUDA graphs"):
        select_backend("auto", Artifact.open(built).manifest, Options(cuda_graph=True))
    for name in ("onnxruntime-tensorrt", "onnxruntime-tensorrt-rtx"):
        with pytest.raises(HostError, match=r"has no \w+ExecutionProvider: pip install onnxruntime-gpu"):
            select_backend(name, Artifact.open(built).manifest)
    assert list(BACKENDS)[:2] == [RTX, "tensorrt"]


@pytest.mark.skipif(not NO_GPU, reason="there is a GPU")
def test_verify_says_what_runs_here(both):
    outcome = verify(both, "host")
    assert outcome.host.backend == "onnxruntime"
    assert [(plans.target, "no NVIDIA GPU" in plans.reason) for plans in outcome.host.plans] == [
        ("sm_86", True),
        ("sm_89", True),
    ]
    result = CliRunner().invoke(cli.main, ["verify", str(both), "--level", "host"])
    assert result.exit_code == 0 and result.stderr.count("note: tensorrt-rtx plans for sm_8") == 2
    assert "note: tensorrt-rtx was passed over: sm_86: no NVIDIA GPU" in result.stderr
    assert (
        "note: tensorrt was passed over: the artifact holds no engines for it: otc build-engines adds them"
        in result.stderr
    )
    shown = json.loads(CliRunner().invoke(cli.main, ["verify", str(both), "--level", "host", "--json"]).stdout)
    assert shown["host"]["plans"][0]["target"] == "sm_86"


class Recorder:
    """A runtime that says what it was given, and takes nothing."""

    def __init__(self, *_):
        self.given = []

    def deserialize_cuda_engine(self, data):
        self.given.append(data)


@pytest.fixture
def backend(built, on_sm_89, monkeypatch):
    """The real backend, but for the device and the library's runtime."""
    monkeypatch.setattr("otcache.runtime.engines.cuda_device.CudaDevice", host_device.HostDevice)
    monkeypatch.setattr(tensorrt_engine.library(RTX), "Runtime", Recorder)
    return TensorrtBackend(plans_of(built), Artifact.open(built).manifest)


def test_a_plan_is_opened_as_the_bytes_that_were_checked(built, backend):
    artifact = Artifact.open(built)
    parts = backend.parts(artifact.manifest)
    with pytest.raises(HostError, match=r"embed\.plan: tensorrt-rtx 1\..* cannot load it.*--backend onnxruntime"):
        backend.load(parts[0], artifact)
    assert backend._runtime.given == [(built / parts[0].file).read_bytes()]


@pytest.mark.parametrize("damage", ["truncated", "changed", "exchanged"])
def test_a_damaged_plan_is_never_opened(built, backend, tmp_path, damage):
    folder = Path(shutil.copytree(built, tmp_path / "small"))
    artifact = Artifact.open(folder)
    part, other = backend.parts(artifact.manifest)[:2]
    data = bytearray((folder / part.file).read_bytes())
    if damage == "changed":
        data[-1] ^= 1
    content = data[:-1] if damage == "truncated" else data
    (folder / part.file).write_bytes((folder / other.file).read_bytes() if damage == "exchanged" else content)
    with pytest.raises(ArtifactError, match=r"embed\.plan"):
        backend.load(part, artifact)
    assert backend._runtime.given == []
    with Sampler.load(folder, "onnxruntime") as sampler:
        assert sampler("a ring", budget=2).shape == (1, 4, 4, 3), "another backend serves it still"


CALLED = {
    "IExecutionContext": ("set_device_memory", "set_input_shape", "set_tensor_address", "execute_async_v3"),
    "ICudaEngine": (
        "create_execution_context",
        "create_runtime_config",
        "device_memory_size_v2",
        "get_tensor_dtype",
        "get_tensor_name",
        "num_io_tensors",
    ),
    "IRuntimeConfig": (
        "create_runtime_cache",
        "set_runtime_cache",
        "dynamic_shapes_kernel_specialization_strategy",
        "set_execution_context_allocation_strategy",
    ),
    "Runtime": ("deserialize_cuda_engine",),
}


@pytest.mark.parametrize("kind", CALLED)
def test_the_library_has_what_is_called(kind):
    """What runs on GPUs only is at least there by that name."""
    missing = [name for name in CALLED[kind] if not hasattr(getattr(tensorrt_engine.library(RTX), kind), name)]
    assert missing == []


class PlanWithoutGpu:
    """Records what contexts it is asked for."""

    def __init__(self):
        self.contexts = []

    def create_execution_context(self, given):
        self.contexts.append(given)
        return object()

    def create_runtime_config(self):
        return RuntimeConfig()


class RuntimeConfig:
    def create_runtime_cache(self):
        return object()

    def set_runtime_cache(self, cache):
        self.cache = cache

    def set_execution_context_allocation_strategy(self, strategy):
        self.strategy = strategy


def test_contexts_use_given_memory_and_wait_for_their_kernels():
    """For RTX with one cache of kernels for all; the full library has no such thing, and is asked for memory alone."""
    trt, plan = tensorrt_engine.library(RTX), PlanWithoutGpu()
    contexts = tensorrt_engine.Contexts(trt)
    for _ in range(2):
        contexts.create(plan)
    first, second = plan.contexts
    assert first.strategy == second.strategy == trt.ExecutionContextAllocationStrategy.USER_MANAGED
    assert first.dynamic_shapes_kernel_specialization_strategy == trt.DynamicShapesKernelSpecializationStrategy.EAGER
    assert first.cache is second.cache
    full = SimpleNamespace(ExecutionContextAllocationStrategy=trt.ExecutionContextAllocationStrategy)
    tensorrt_engine.Contexts(full).create(plan)
    assert plan.contexts[-1] == trt.ExecutionContextAllocationStrategy.USER_MANAGED


def test_a_combination_without_a_plan(built):
    plans = plans_of(built)
    fewer = {name: path for name, path in plans.combinations.items() if name != "guide"}
    with pytest.raises(ArtifactError, match=r"no plan of the combination guide.*otc build-engines"):
        plan_parts(plans.model_copy(update={"combinations": fewer}), Artifact.open(built).manifest)


def test_requests_beyond_the_profile_are_refused(built, backend):
    manifest = Artifact.open(built).manifest
    for samples in (1, 4):
        backend.check(samples, manifest)
    with pytest.raises(RequestError, match=r"8 pictures at once: expected 1 to 4.*--profile batch=1:1:8"):
        backend.check(8, manifest)


def test_inspect_shows_engines_and_memory(both):
    def otc(*arguments):
        result = CliRunner().invoke(cli.main, ["inspect", str(both), *arguments])
        assert result.exit_code == 0, result.output
        return result.stdout

    shown = json.loads(otc("--json"))["engines"]
    assert [engine["target"] for engine in shown] == ["sm_86", "sm_89"]
    assert shown[0]["size_bytes"] > 1e6 and shown[0]["build_s"] > 0 and shown[0]["layers_by_type"]["float32"] > 20
    text = otc()
    assert "sm_86" in text and "profile     batch 1:1:4" in text
    assert all(len(line) <= 80 for line in text.splitlines() if not line.startswith("digest")), "a digest is one word"
    for engine in shown:
        figures = f"14, {readable_size(engine['size_bytes'])}, built in {engine['build_s']:.1f} s"
        layers = ", ".join(f"{count} {dtype}" for dtype, count in engine["layers_by_type"].items())
        assert figures in text and layers in text, "nothing is cut at 80 columns"
    memory = json.loads(otc("--memory", "--json", "-n", "2"))
    for budget in memory["budgets"].values():
        assert (
            budget["lower_bound_bytes"]
            <= budget["size_bytes"]
            == max(value["offset"] + value["size_bytes"] for value in budget["values"])
        )
    assert "…" not in otc() + otc("--memory"), "nor anywhere else"
    assert "lower bound" in otc("--memory") and "@residual_0" in otc("--memory")


@pytest.mark.gpu
@pytest.mark.skipif(NO_GPU, reason="no GPU")
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_on_a_gpu(artifact_folder, tmp_path, cuda_graph):
    """Latents of every budget are those of ONNX Runtime; recorded ones are the same bits as those before."""
    folder = Path(shutil.copytree(artifact_folder, tmp_path / "small"))
    build_engines(folder, backend=RTX)
    with (
        Sampler.load(folder, RTX, cuda_graph=cuda_graph) as sampler,
        Sampler.load(folder, "onnxruntime", threads=1) as onnx,
    ):
        for budget in sampler.budgets:
            conditioning = onnx.encode(["a red ring", "a blue star"])
            found = [sampler.sample(conditioning, budget=budget, seed=1) for _ in range(3)]
            expected = onnx.sample(conditioning, budget=budget, seed=1)
            np.testing.assert_allclose(found[0], expected, atol=1e-3 * np.abs(expected).max())
            np.testing.assert_array_equal(found[1], found[2])
