"""`otc build-engines` with the real library for RTX, which needs no GPU: plans, the manifest, interruptions,
bad input.
"""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import shutil
from pathlib import Path

import numpy as np
import pytest
import small_artifact as small
from click.testing import CliRunner
from onnx import TensorProto, helper

from otcache.runtime import Sampler
from otcache.runtime.artifact.reader import Artifact
from otcache.runtime.build.build_engines import build_engines
from otcache.runtime.build.plan import BuildJob, build_plan
from otcache.runtime.cli import main as cli
from otcache.runtime.engines.tensorrt import plan_parts
from otcache.runtime.shipping.verify import verify
from otcache.schemas.combinations import combinations
from otcache.schemas.errors import ArtifactError, HostError, UsageError
from otcache.schemas.manifest import SCHEMA_VERSION
from otcache.schemas.segments import segments_of

pytest.importorskip("tensorrt_rtx")
RTX = "tensorrt-rtx"


def otc(*arguments):
    return CliRunner().invoke(cli.main, ["build-engines", *map(str, arguments)])


@pytest.fixture
def copy(built, tmp_path):
    return Path(shutil.copytree(built, tmp_path / "small"))


def entries(folder):
    return {(e.backend, e.target): e for e in Artifact.open(folder).manifest.engines}


def test_plans_are_listed(built):
    artifact = Artifact.open(built)
    manifest = artifact.manifest
    (engine,) = manifest.engines
    assert (engine.backend, engine.target, engine.profile) == (RTX, "sm_89", {"batch": (1, 1, 4)})
    assert set(engine.stages) == {stage.name for stage in manifest.stages}
    assert set(engine.combinations) == {combination.name for combination in combinations(manifest)}
    assert manifest.schema_version == SCHEMA_VERSION and engine.version in engine.stages["embed"]
    assert engine.layers["embed"]["float32"] >= 2 and engine.layers["text"]["float32"] >= 1
    times = {m.name for m in manifest.measurements if m.name.startswith("build_s/tensorrt-rtx/sm_89/")}
    assert len(times) == len(engine.stages) + len(engine.combinations)
    assert verify(built).unlisted == (), "no records are left"


def test_plans_are_reproducible(built, artifact_folder, tmp_path):
    again = Path(shutil.copytree(artifact_folder, tmp_path / "again"))
    build_engines(again, backend=RTX, targets=("sm_89",), jobs=2)
    manifests = [Artifact.open(folder).manifest for folder in (built, again)]
    digests = [{entry.path: entry.digest for entry in manifest.files} for manifest in manifests]
    (spread,) = [path for path in digests[0] if path.endswith("/spread.plan")]
    for found in digests:  # it has two extents of its own, which the library numbers now this way, now that
        found.pop(spread)
    assert digests[0] == digests[1] and manifests[0].engines == manifests[1].engines


def test_the_artifact_is_served_as_before(built, artifact_folder):
    pictures = []
    for folder in (built, artifact_folder):
        with Sampler.load(folder, "onnxruntime") as sampler:
            pictures.append(sampler("a red ring", budget=3, seed=1))
    np.testing.assert_array_equal(*pictures)


def test_nothing_is_built_twice_and_targets_stay(copy):
    events = []
    (kept, added) = build_engines(copy, backend=RTX, targets=("sm_89", "sm_120"), progress=events.append)
    assert (kept.reused, kept.build_s, added.reused) == (kept.plans, 0, 0) and kept.plans == 14
    assert set(entries(copy)) == {(RTX, "sm_89"), (RTX, "sm_120")}
    assert [event.done for event in events] == [*range(1, 15), *range(1, 15)]
    assert [event.reused for event in events] == [True] * 14 + [False] * 14


def test_another_profile_takes_the_place(copy):
    before = set(entries(copy)[RTX, "sm_89"].stages.values())
    result = otc(
        copy, "--backend", RTX, "--target", "sm_89", "--profile", "batch=1:2:2", "--workspace", "64MiB", "--json"
    )
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)["engines"][0]
    engine = entries(copy)[RTX, "sm_89"]
    assert engine.profile == {"batch": (1, 2, 2)} and engine.workspace_bytes == 64 << 20 and found["reused"] == 0
    assert not any((copy / path).exists() for path in before) and verify(copy).unlisted == ()
    assert json.loads(result.stderr.splitlines()[0])["event"] == "engine"


def test_blocks_share_a_plan(damaged):
    """Plans for both blocks at once; the manifest says so, and what serves them loads one for both."""
    result = otc(damaged, "--backend", RTX, "--target", "sm_89", "--granularity", "segment", "--json")
    assert result.exit_code == 0, result.output
    manifest = Artifact.open(damaged).manifest
    engine = entries(damaged)[RTX, "sm_89"]
    assert engine.stages["block_0"] == engine.stages["block_1"] and engine.stages["block_0"].endswith(
        "/block_0..block_1.plan"
    )
    assert (
        segments_of(engine, manifest) == (("block_0", "block_1"),)
        and json.loads(result.stdout)["engines"][0]["plans"] == 13
    )
    assert set(engine.sources) == {stage.name for stage in manifest.stages} and "block_0..block_1" in engine.layers
    parts = {part.name: part for part in plan_parts(engine, manifest)}
    assert [tensor.name for tensor in parts["block_0..block_1"].contract.outputs] == ["h2"] and "block_0" not in parts
    assert verify(damaged).unlisted == (), "the graph that was put together is gone"
    shown = CliRunner().invoke(cli.main, ["inspect", str(damaged), "--json"])
    assert json.loads(shown.stdout)["engines"][0]["blocks_per_plan"] == 2


def test_what_shares_a_plan_must_be_blocks_in_a_row(copy):
    value = small.read_manifest(copy)
    stages = value["engines"][0]["stages"]
    stages["head"] = stages["block_1"]
    small.write_manifest(copy, value)
    with pytest.raises(ArtifactError, match=r"block_1\.plan for sm_89 holds stages that are no consecutive blocks"):
        Artifact.open(copy)


def test_an_interrupted_build_goes_on(damaged):
    manifest = (damaged / "manifest.json").read_bytes()

    def stop(event):
        if event.done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_engines(damaged, backend=RTX, targets=("sm_89",), progress=stop)
    assert (damaged / "manifest.json").read_bytes() == manifest and not multiprocessing.active_children()
    with Sampler.load(damaged) as sampler:
        assert sampler("a ring", budget=2).shape == (1, 4, 4, 3)
    (result,) = build_engines(damaged, backend=RTX, targets=("sm_89",))
    assert result.reused == 3 and verify(damaged).unlisted == ()


def test_a_build_that_is_killed_says_what_may_help(damaged):
    def kill(event):
        for process in multiprocessing.active_children():
            process.kill()
            process.join()

    with pytest.raises(HostError, match=r"block_0: its build for sm_89 ended with code -9.*--jobs 1.*is kept"):
        build_engines(damaged, backend=RTX, targets=("sm_89",), progress=kill)
    assert not Artifact.open(damaged).manifest.engines


@pytest.mark.parametrize("how", ["truncated", "gone"])
def test_a_damaged_plan_is_refused_and_built_again(copy, how):
    path = copy / entries(copy)[RTX, "sm_89"].stages["block_1"]
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1])
    mends = f"otc build-engines {copy} --backend tensorrt-rtx --target sm_89 --profile batch=1:1:4"
    for level in ("structure", "digests"):
        with pytest.raises(ArtifactError, match=r"block_1\.plan: found .*: expected .*: " + mends):
            verify(copy, level)
    (result,) = build_engines(copy, backend=RTX, targets=("sm_89",))
    assert result.reused == 13 and verify(copy, "digests").files


def test_plans_of_another_artifact_are_refused(copy):
    value = small.read_manifest(copy)
    value["engines"][0]["sources"]["block_0"] = value["engines"][0]["sources"]["block_1"]
    small.write_manifest(copy, value)
    with pytest.raises(ArtifactError, match="block_0 for sm_89 was built from another ONNX file"):
        Artifact.open(copy)


def test_a_stage_that_cannot_be_built_names_its_node(damaged):
    hidden = helper.make_tensor_value_info
    node = helper.make_node("Det", ["h1"], ["d"], name="the_determinant")
    graph = helper.make_graph(
        [node, helper.make_node("Add", ["h1", "d"], ["h2"])],
        "block_1",
        [hidden("h1", TensorProto.FLOAT, list(small.HIDDEN))],
        [hidden("h2", TensorProto.FLOAT, list(small.HIDDEN))],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    (damaged / "engines/onnx/block_1.onnx").write_bytes(model.SerializeToString())
    small.reseal_file(damaged, "engines/onnx/block_1.onnx")
    result = otc(damaged, "--backend", RTX, "--target", "sm_89")
    assert result.exit_code == 6 and len(result.stderr.splitlines()) == 1
    for words in ("block_1: tensorrt-rtx", "sm_89", "the_determinant (Det)", "--backend onnxruntime"):
        assert words in result.stderr
    assert not Artifact.open(damaged).manifest.engines


def test_a_signed_artifact_is_refused(copy):
    (copy / "manifest.sig").write_text("{}")
    with pytest.raises(ArtifactError, match=r"is signed.*--unsign"):
        build_engines(copy, backend=RTX, targets=("sm_89",))
    assert (copy / "manifest.sig").exists()
    (result,) = build_engines(copy, backend=RTX, targets=("sm_89",), unsign=True)
    assert not (copy / "manifest.sig").exists() and result.reused == result.plans


@pytest.mark.parametrize(
    ("options", "exit_code", "words"),
    [
        (["--target", "sm_90"], 2, "sm_90: tensorrt-rtx builds for sm_75"),
        (["--target", "89"], 2, "such as sm_89"),
        (["--target", "sm_89", "--profile", "batch=2:1:4"], 2, "increasing sizes"),
        (["--target", "sm_89", "--profile", "tokens=1:1:4"], 2, "expected batch"),
        (["--target", "sm_89", "--profile", "batch"], 2, "batch=1:1:4"),
        (["--target", "sm_89", "--workspace", "much"], 2, "4GB"),
    ],
)
def test_options_that_are_refused(artifact_folder, options, exit_code, words):
    before = sorted(artifact_folder.rglob("*"))
    result = otc(artifact_folder, "--backend", RTX, *options)
    assert result.exit_code == exit_code and words in result.stderr
    assert sorted(artifact_folder.rglob("*")) == before


def test_without_a_gpu_a_target_is_needed(artifact_folder, monkeypatch):
    monkeypatch.setattr("otcache.runtime.engines.gpu.why_no_gpu", lambda: ("no driver", None))
    with pytest.raises(UsageError, match="no GPU here: expected some of sm_75"):
        build_engines(artifact_folder, backend=RTX)


def test_the_full_library_is_named_where_it_is_missing(artifact_folder):
    if importlib.util.find_spec("tensorrt"):
        pytest.skip("tensorrt is installed")
    result = otc(artifact_folder, "--backend", "tensorrt")
    assert (
        result.exit_code == 6
        and "tensorrt is not installed: expected its package: pip install tensorrt" in result.stderr
    )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_stage_of_half_precision(tmp_path, dtype):
    """Types are those of the file: nothing becomes float32."""
    kind, shape = getattr(TensorProto, dtype.upper()), [None, 4, 8]
    ends = [helper.make_tensor_value_info(name, kind, shape) for name in ("h0", "h1")]
    nodes = [
        helper.make_node("MatMul", ["h0", "w"], ["y"]),
        helper.make_node("Tanh", ["y"], ["z"]),
        helper.make_node("Add", ["h0", "z"], ["h1"]),
    ]
    graph = helper.make_graph(nodes, "block", ends[:1], ends[1:], [helper.make_tensor("w", kind, [8, 8], [0.125] * 64)])
    path = tmp_path / "block.onnx"
    path.write_bytes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10).SerializeToString()
    )
    plan = build_plan(
        BuildJob(
            name="block",
            source=path,
            backend=RTX,
            target="sm_86",
            shapes={"h0": ((1, 4, 8), (2, 4, 8), (4, 4, 8))},
            workspace_bytes=None,
            output=tmp_path / "block.plan",
            timing_cache=tmp_path / "cache",
        )
    )
    assert plan.layers[dtype] >= 3 and "float32" not in plan.layers


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sums_between_stages_of_half_precision(artifact_folder, tmp_path, dtype):
    """Terms and totals have the stages' type, sums are float32: a plan of every kind, `cfg_norm` among them."""
    manifest = Artifact.open(artifact_folder).manifest
    manifest = manifest.model_copy(update={"guidance": manifest.guidance.model_copy(update={"kind": "cfg_norm"})})
    half = lambda t: t.model_copy(update={"dtype": dtype}) if t.dtype == "float32" else t  # noqa: E731
    stages = tuple(
        stage.model_copy(update={side: tuple(map(half, getattr(stage, side))) for side in ("inputs", "outputs")})
        for stage in manifest.stages
    )
    for one in combinations(manifest.model_copy(update={"stages": stages})):
        rows = ((2, 4, 12), (2, 4, 12), (8, 4, 12))
        plan = build_plan(
            BuildJob(
                name=one.name,
                source=one,
                backend=RTX,
                target="sm_89",
                shapes={term.name: rows for term in one.terms},
                workspace_bytes=None,
                output=tmp_path / f"{one.name}.plan",
                timing_cache=tmp_path / "cache",
            )
        )
        assert plan.layers["float32"] >= 1, one.name
        touches_a_stage = one.kind in ("spread", "forecast")
        assert (dtype in plan.layers) == touches_a_stage, (one.name, plan.layers)


@pytest.fixture
def flux(tmp_path):
    """A real export: CLIP and T5, blocks with attention and rotation, the decoder's convolutions; float32."""
    newest = max((Path(__file__).parents[2] / "golden").glob("1.*"), key=lambda path: int(path.name[2:]))
    return Path(shutil.copytree(newest / "artifact", tmp_path / "flux"))


def test_a_layer_that_a_target_has_not_is_named(flux):
    with pytest.raises(HostError, match=r"embed: .*sm_75.*'node_MatMul_\w+'.*FP32.*another --target or type"):
        build_engines(flux, backend=RTX, targets=("sm_75",))
