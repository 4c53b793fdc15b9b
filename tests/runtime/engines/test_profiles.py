"""Profiles of plans: from an artifact's axes to the shapes that the library is given, and what is said of requests
outside.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import host_device
import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sized_artifact import listed, term, with_sizes
from small_artifact import read_manifest, write_artifact, write_manifest

from otcache.runtime import ArtifactError, RequestError, Sampler, UsageError
from otcache.runtime.artifact.reader import Artifact
from otcache.runtime.build import build_engines
from otcache.runtime.build import plan as tensorrt_build
from otcache.runtime.build.plan import build_plan
from otcache.runtime.cli import main as cli
from otcache.runtime.engines import plan_hosts
from otcache.runtime.engines.choose import select_backend
from otcache.runtime.engines.gpu import why_no_gpu
from otcache.runtime.engines.profiles import input_shapes, narrower, profile_for, request_of, why_outside
from otcache.runtime.engines.tensorrt import TensorrtBackend
from otcache.runtime.loop.backend import Options
from otcache.runtime.messages import profile_text
from otcache.runtime.serving.request_size import Sizes
from otcache.schemas.manifest import Manifest, Shapes, TensorInfo

RTX = "tensorrt-rtx"
WHOLE = {"batch": (1, 1, 4), "height": (2, 4, 12), "width": (4, 4, 8)}


@pytest.fixture(scope="module")
def ranged(tmp_path_factory):
    """For heights 2 to 12 and widths 4 to 8. Not to be changed."""
    return with_sizes(write_artifact(tmp_path_factory.mktemp("artifacts") / "ranged"))


@pytest.fixture
def copy(ranged, tmp_path):
    return Path(shutil.copytree(ranged, tmp_path / "copy"))


def manifest_of(folder):
    return Artifact.open(folder).manifest


# --- from axes to shapes
# ---------------------------------------------------------------------------------------------------


def test_all_that_is_served_unless_asked_otherwise(ranged, artifact_folder, tmp_path):
    assert profile_for(manifest_of(ranged), {}) == WHOLE
    assert profile_for(manifest_of(ranged), {"height": (4, 6, 8)}) == {**WHOLE, "height": (4, 6, 8)}
    assert profile_for(manifest_of(artifact_folder), {}) == {"batch": (1, 1, 4)}
    two = manifest_of(listed(write_artifact(tmp_path / "listed")))
    assert profile_for(two, {}) == {"batch": (1, 1, 4), "height": (4, 4, 8), "width": (4, 4, 4)}


def sizes_of(axes, symbols, sizes=()):
    """A manifest that has nothing but sizes; its own one is the first that is listed, or the smallest."""
    own = sizes[0] if sizes else {name: least for name, (least, _) in axes.items()}
    return Manifest.model_construct(
        conditions=SimpleNamespace(**own),
        shapes=Shapes.model_validate(
            {
                "axes": [
                    {"name": name, "minimum": least, "maximum": most, "step": 1} for name, (least, most) in axes.items()
                ],
                "symbols": [{"name": f"s{index}", "terms": terms} for index, terms in enumerate(symbols)],
                "sizes": [{"size": size} for size in sizes],
            }
        ),
    )


NAMES = ("height", "width", "max_sequence_length")


@st.composite
def served(draw):
    axes = {name: tuple(sorted(draw(st.tuples(*[st.integers(1, 40)] * 2)))) for name in NAMES}
    some = st.lists(st.sampled_from(NAMES), unique=True, max_size=2)
    terms = st.builds(lambda factor, names: term(factor, *names), st.integers(-2, 5).filter(bool), some)
    symbols = draw(st.lists(st.lists(terms, min_size=1, max_size=2), min_size=1, max_size=3))
    requests = st.fixed_dictionaries({name: st.integers(*ends) for name, ends in axes.items()})
    sizes = draw(st.lists(requests, max_size=4, unique_by=lambda size: tuple(size.items())))
    return sizes_of(axes, symbols, sizes), draw(st.sampled_from(sizes) if sizes else requests)


@settings(max_examples=60, deadline=None)
@given(drawn=served(), data=st.data())
def test_every_request_within_a_profile_fits_its_shapes(drawn, data):
    """Whatever the relations: no dimension of a request is below the smallest or above the largest shape."""
    manifest, usual = drawn
    asked = {}
    for axis in manifest.shapes.axes:
        often = usual[axis.name]
        below, above = st.integers(axis.minimum, often), st.integers(often, axis.maximum)
        asked[axis.name] = (data.draw(below), often, data.draw(above))
    names = [symbol.name for symbol in manifest.shapes.symbols]
    tensor = TensorInfo(name="x", dtype="float32", shape=("batch", *[2] * len(names)), symbols=(None, *names))
    try:
        found = input_shapes(manifest, profile_for(manifest, asked), (tensor,), (1, 2, 8))["x"]
    except UsageError as error:
        assume("symbol" not in str(error))  # a relation that is below 1 somewhere is refused when the artifact is read
        raise
    one_size = st.fixed_dictionaries({name: st.integers(least, most) for name, (least, _, most) in asked.items()})
    inside = [
        each.size for each in manifest.shapes.sizes if all(asked[n][0] <= each.size[n] <= asked[n][2] for n in NAMES)
    ]
    request = data.draw(st.sampled_from(inside) if inside else one_size)
    smallest, often, largest = found
    for index, symbol in enumerate(manifest.shapes.symbols, start=1):
        assert smallest[index] <= symbol.size(request) <= largest[index] and often[index] == symbol.size(usual)
    assert (smallest[0], often[0], largest[0]) == (1, 2, 8)


def test_extremes_of_listed_sizes_are_those_of_one_size_where_there_is_one():
    """Tokens alone bound what packed latents need; sides and tokens together are taken at the corners, where they fit
    together.
    """
    sizes = [{"height": 4, "width": 8}, {"height": 8, "width": 4}]
    manifest = sizes_of(
        {"height": (4, 8), "width": (4, 8)},
        [[term(1, "height")], [term(1, "width")], [term(1, "height", "width")]],
        sizes,
    )
    whole = profile_for(manifest, {})

    def shapes(*symbols):
        tensor = TensorInfo(name="x", dtype="float32", shape=(2,) * len(symbols), symbols=symbols)
        return input_shapes(manifest, whole, (tensor,), (1, 1, 4))["x"]

    assert shapes("s2") == ((32,), (32,), (32,))
    assert shapes("s0", "s1", "s2") == ((4, 4, 16), (4, 8, 32), (8, 8, 64))


@pytest.mark.parametrize(
    ("profile", "words"),
    [
        (
            "height=1:4:8",
            "--profile height=1:4:8: height is 1: expected 2 to 12 in steps of 2: choose from that, or compile with "
            "--sizes that hold it",
        ),
        ("batch=1:1:2,height=4:5:8", "height is 5: expected 2 to 12 in steps of 2"),
        ("width=4:4:16", "width is 16: expected 4 to 8 in steps of 4"),
        ("height=8:4:8", "expected increasing sizes"),
        (
            "num_frames=1:1:4",
            "expected batch, height, width, which the artifact leaves open: compile with --frame-counts to leave it "
            "open",
        ),
        ("tokens=1:1:4", "expected batch, height, width, which the artifact leaves open"),
        ("height=4:4:8,", "expected NAME=MIN:OPT:MAX"),
    ],
)
def test_what_the_artifact_does_not_serve_is_refused(ranged, profile, words):
    pytest.importorskip("tensorrt_rtx")
    line = ["build-engines", str(ranged), "--backend", RTX, "--target", "sm_89", "--profile", profile]
    result = CliRunner().invoke(cli.main, line)
    assert result.exit_code == 2 and words in result.stderr and not (ranged / f"engines/{RTX}").exists()
    assert len([line for line in result.stderr.splitlines() if line.startswith("Error")]) == 1


def test_the_most_frequent_size_is_one_of_those_listed():
    sizes = [{"height": 4, "width": 8}, {"height": 8, "width": 4}]
    manifest = sizes_of({"height": (4, 8), "width": (4, 8)}, [[term(1, "height")]], sizes)
    with pytest.raises(UsageError, match="most frequent size is 8x8: expected one of 4x8; 8x4: name the other axes"):
        profile_for(manifest, {"height": (8, 8, 8)})
    assert profile_for(manifest, {"height": (8, 8, 8), "width": (4, 4, 4)})["height"] == (8, 8, 8)


# --- plans
# -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planned(ranged, tmp_path_factory):
    """The artifact with real plans for all its sizes, and of each plan what the library was told of every input."""
    trt = pytest.importorskip("tensorrt_rtx")
    folder = Path(shutil.copytree(ranged, tmp_path_factory.mktemp("artifacts") / "planned"))
    told = {}
    network_of, profile_of = tensorrt_build._network, tensorrt_build._profile

    def network(job, *arguments):
        found = network_of(job, *arguments)
        inputs = [found[0].get_input(index) for index in range(found[0].num_inputs)]
        told[job.name] = {tensor.name: (tuple(tensor.shape), None) for tensor in inputs}
        return found

    def profile(job, builder):
        found = profile_of(job, builder)
        for name, (shape, _) in told[job.name].items():
            if -1 in shape:
                told[job.name][name] = (shape, tuple(map(tuple, found.get_shape(name))))
        return found

    def build_here(jobs, workers, finished):
        for job in jobs:
            finished(job, build_plan(job))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensorrt_build, "_network", network)
        patch.setattr(tensorrt_build, "_profile", profile)
        patch.setattr(build_engines, "build_all", build_here)
        build_engines.build_engines(folder, backend=RTX, targets=("sm_89",))
    assert trt.__version__ == manifest_of(folder).engines[0].version
    return folder, told


def test_the_library_gets_the_shapes_of_the_whole_range(planned):
    """Two branches for each of 1 to 4 samples, 2 to 24 tokens; what stays fixed has no range."""
    folder, told = planned
    hidden = ((-1, -1, 12), ((2, 2, 12), (2, 4, 12), (8, 24, 12)))
    latents = ((-1, -1, 12), ((1, 2, 12), (1, 4, 12), (4, 24, 12)))
    coefs = lambda count: ((count,), None)  # noqa: E731
    assert told["embed"] == {"latents": hidden, "timestep": ((-1,), ((2,), (2,), (8,)))}
    assert told["block_0"] == {"h0": hidden, "text": ((-1, 12), ((2, 12), (2, 12), (8, 12)))}
    assert told["decoder"] == {"decoder_latents": ((-1, 4, 12), ((1, 4, 12), (1, 4, 12), (4, 4, 12)))}
    assert told["text"] == {"ids": ((-1, 3), ((1, 3), (2, 3), (8, 3)))}
    assert told["combinations/spread"] == {"coefs": coefs(1), "term_0": latents}
    assert told["combinations/forecast_0_1"] == {"coefs": coefs(1), "term_0": hidden, "term_1": hidden}
    assert told["combinations/guide"] == {"coefs": coefs(2), "term_0": hidden}
    assert told["combinations/update_1"] == {"coefs": coefs(2), "term_0": latents, "term_1": latents}
    (engine,) = manifest_of(folder).engines
    assert engine.profile == WHOLE and len(told) == len(engine.stages) + len(engine.combinations)


@pytest.fixture
def on_sm_89(monkeypatch):
    monkeypatch.setattr(plan_hosts, "why_no_gpu", lambda: (None, "sm_89"))


@pytest.fixture
def narrow(planned):
    """The manifest of the same plans, had they been built for less."""
    manifest = manifest_of(planned[0])
    (engine,) = manifest.engines
    profile = {"batch": (1, 1, 4), "height": (4, 4, 8), "width": (4, 4, 4)}
    return manifest.model_copy(update={"engines": (engine.model_copy(update={"profile": profile}),)})


MENDED = "ARTIFACT --backend tensorrt-rtx --target sm_89 --profile"


def test_requests_within_and_beyond(planned, narrow, on_sm_89, monkeypatch):
    """A backend that was chosen says what was asked, what its plans cover, and what mends it."""
    monkeypatch.setattr("otcache.runtime.engines.cuda_device.CudaDevice", host_device.HostDevice)
    sizes, (engine,) = Sizes(Artifact.open(planned[0])), narrow.engines
    backend = TensorrtBackend(engine, narrow)
    for size in ({}, {"height": 8}, {"height": 6}):
        backend.check(4, sizes.at(size).manifest)
    for samples, size, words in (
        (
            1,
            {"height": 12},
            f"height is 12: expected 4 to 8, which plans of tensorrt-rtx for sm_89 cover: ask for that, serve it with "
            f"--backend onnxruntime, or otc build-engines {MENDED} batch=1:1:4,height=4:4:12,width=4:4:4",
        ),
        (
            8,
            {"width": 8},
            "8 pictures at once: expected 1 to 4, which plans of tensorrt-rtx for sm_89 cover: ask for that, serve it "
            f"with --backend onnxruntime, or otc build-engines {MENDED} batch=1:1:8,height=4:4:8,width=4:4:8",
        ),
        (1, {"width": 8}, "width is 8: expected 4, which plans"),
    ):
        with pytest.raises(RequestError) as error:
            backend.check(samples, sizes.at(size).manifest)
        assert str(error.value).startswith(words)
        profile_for(narrow, dict(cli_profile(str(error.value))))


def cli_profile(message):
    """What a message tells people to build for."""
    from otcache.runtime.cli.build import parse_profile

    return parse_profile(message.rpartition("--profile ")[2])


def test_plans_that_name_no_axes_are_for_the_own_size(planned, narrow):
    (engine,) = narrow.engines
    old = engine.model_copy(update={"profile": {"batch": (1, 1, 4)}})
    sizes = Sizes(Artifact.open(planned[0]))
    assert why_outside(old, narrow, request_of(sizes.at({}).manifest, 1)) is None
    assert "height is 6: expected 4, which plans" in why_outside(
        old, narrow, request_of(sizes.at({"height": 6}).manifest, 1)
    )


def test_a_profile_that_does_not_fit_the_artifact_is_refused(planned, narrow, on_sm_89, monkeypatch, tmp_path):
    monkeypatch.setattr("otcache.runtime.engines.cuda_device.CudaDevice", host_device.HostDevice)
    (engine,) = narrow.engines
    odd = engine.model_copy(update={"profile": {"batch": (1, 1, 4), "height": (3, 3, 3)}})
    with pytest.raises(ArtifactError) as error:
        TensorrtBackend(odd, narrow).denoiser(narrow, {})
    assert "plans for sm_89 are for batch=1:1:4,height=3:3:3" in str(error.value) and MENDED in str(error.value)
    folder = Path(shutil.copytree(planned[0], tmp_path / "decreasing"))
    value = read_manifest(folder)
    value["engines"][0]["profile"]["height"] = [8, 4, 12]
    write_manifest(folder, value)
    with pytest.raises(
        ArtifactError, match=r"height for sm_89 is \(8, 4, 12\): expected increasing sizes: build it again"
    ):
        Artifact.open(folder)


def test_auto_passes_over_plans_that_do_not_cover_the_request(narrow, on_sm_89):
    selection = select_backend("auto", narrow, Options(request={"batch": 1, "height": 12, "width": 4}))
    assert selection.backend.name == "onnxruntime"
    assert selection.passed_over[RTX].startswith("sm_89: height is 12: expected 4 to 8, which plans of tensorrt-rtx")
    assert plan_hosts.usable_plans(RTX, narrow, {"batch": 1, "height": 8, "width": 4})[1] is None


def test_the_command_line_serves_it_elsewhere_and_verify_says_what_is_missing(copy, on_sm_89, tmp_path, monkeypatch):
    """Plans for one size, built through the command line; every other size is served by ONNX Runtime."""
    pytest.importorskip("tensorrt_rtx")

    def otc(*arguments):
        result = CliRunner().invoke(cli.main, [*map(str, arguments)], env={"COLUMNS": "80"})
        assert result.exit_code == 0, result.output
        return result

    otc("build-engines", copy, "--backend", RTX, "--target", "sm_89", "--profile", "height=4:4:4,batch=1:2:2")
    assert "profile     batch 1:2:2, height 4:4:4, width 4:4:8" in otc("inspect", copy).stdout
    plain = json.loads(
        otc("run", copy, "--budget", 2, "--prompt", "a", "-n", 3, "--json", "-o", tmp_path / "x.png").stdout
    )
    assert plain["backend"] == "onnxruntime"
    monkeypatch.setattr(plan_hosts, "why_no_gpu", lambda: ("there is none", None))
    said = otc("verify", copy, "--level", "host", "--backend", "onnxruntime").stderr
    assert (
        f"note: tensorrt-rtx plans for sm_89 serve height 4 of 2 to 12 in steps of 2: otc build-engines {copy} "
        "--backend tensorrt-rtx --target sm_89 --profile batch=1:2:2,height=2:4:12,width=4:4:8" in said
    )
    shown = json.loads(otc("verify", copy, "--level", "host", "--json").stdout)["host"]["plans"][0]
    assert shown["narrower"].startswith("height 4 of 2 to 12")


def test_plans_for_everything_lack_nothing(planned):
    manifest = manifest_of(planned[0])
    assert (
        narrower(manifest.engines[0], manifest) is None
        and profile_text(WHOLE) == "batch=1:1:4,height=2:4:12,width=4:4:8"
    )


@pytest.mark.gpu
@pytest.mark.skipif(why_no_gpu()[1] is None, reason="no GPU: a plan's own shapes can be read on one only")
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_every_size_on_a_gpu(copy, cuda_graph):
    """The engine's own profile is that of the manifest, and latents at every size are those of ONNX Runtime."""
    build_engines.build_engines(copy, backend=RTX)
    with (
        Sampler.load(copy, RTX, cuda_graph=cuda_graph) as sampler,
        Sampler.load(copy, "onnxruntime", threads=1) as onnx,
    ):
        own = [tuple(shape) for shape in sampler._engines["embed"]._engine.get_tensor_profile_shape("latents", 0)]
        assert own == [(2, 2, 12), (2, 4, 12), (8, 24, 12)]
        for size in ({}, {"height": 12, "width": 8}, {"height": 2}, {"height": 8}):
            conditioning = onnx.encode(["a red ring", "a blue star"])
            found = [sampler.sample(conditioning, budget=3, seed=1, **size) for _ in range(3)]
            expected = onnx.sample(conditioning, budget=3, seed=1, **size)
            np.testing.assert_allclose(found[0], expected, atol=1e-3 * np.abs(expected).max())
            np.testing.assert_array_equal(found[1], found[2])
