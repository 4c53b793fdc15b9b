"""Sizes that a request chooses: served as the specification says, refused with the range, and never from a manifest
that does not add up.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
from click.testing import CliRunner
from host_device import HostBackend
from sized_artifact import listed, shapes, term, with_sizes
from small_artifact import WIDTH, oracle, output_program, read_manifest, write_artifact, write_manifest

from otcache.runtime import Sampler
from otcache.runtime.artifact.reader import Artifact
from otcache.runtime.cli import main as cli
from otcache.runtime.engines.choose import Selection
from otcache.runtime.loop.address_plan import plan_addresses
from otcache.runtime.serving.noise import noise
from otcache.runtime.serving.request_size import Sizes
from otcache.schemas.digest import digest_of_bytes
from otcache.schemas.errors import ArtifactError, RequestError

TEXT = np.linspace(-1.0, 1.0, 2 * WIDTH, dtype=np.float32).reshape(2, 1, WIDTH)


@pytest.fixture
def folder(tmp_path):
    return write_artifact(tmp_path / "small")


def noise_for(height, width, seed):
    return noise((3, height, width), seed, 1)


@pytest.mark.parametrize(("height", "width"), [(4, 4), (2, 4), (12, 8), (8, 4)])
@pytest.mark.parametrize("backend", ["onnxruntime", "resident"])
def test_every_size_of_a_range_is_what_the_program_gives_there(folder, backend, height, width):
    with_sizes(folder)
    with _sampler(folder, backend) as sampler:
        for budget in sampler.budgets:
            found = sampler.sample({"text": TEXT}, budget=budget, seed=5, height=height, width=width)
            program = sampler.manifest.program(budget).program
            expected = oracle(TEXT, noise_for(height, width, 5), program, (-3.0, 4.0))
            assert found.shape == (1, height * width // 4, WIDTH)
            assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


def _sampler(folder, backend):
    if backend == "onnxruntime":
        return Sampler.load(folder, backend)
    return Sampler(Artifact.open(folder), Selection(HostBackend(), {}))


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ({"height": 3}, "height is 3: expected 2 to 12 in steps of 2: compile with --sizes that hold it"),
        ({"height": 14}, "height is 14: expected 2 to 12 in steps of 2"),
        ({"width": 6}, "width is 6: expected 4 to 8 in steps of 4"),
        ({"width": True}, "width is True: expected a whole number"),
        ({"num_frames": 5}, "num_frames is 5: expected none, because the artifact draws pictures"),
        (
            {"max_sequence_length": 9},
            "max_sequence_length is 9: expected 3, the only one it serves: compile with --text-lengths",
        ),
    ],
)
def test_outside_is_refused_with_the_range(folder, size, message):
    with Sampler.load(with_sizes(folder)) as sampler, pytest.raises(RequestError) as error:
        sampler.check("a red ring", budget=2, **size)
    assert message in str(error.value)


def test_an_artifact_of_one_size_refuses_every_other(folder):
    with Sampler.load(folder) as sampler:
        sampler.check("a red ring", budget=2, height=4, width=4)
        with pytest.raises(RequestError, match="height is 8: expected 4, the only one it serves: compile with --sizes"):
            sampler.check("a red ring", budget=2, height=8)


def test_a_decoder_of_one_size_is_absent_at_others(folder):
    with Sampler.load(with_sizes(folder)) as sampler:
        assert sampler("a red ring", budget=2).shape == (1, 4, 4, 3)
        with pytest.raises(RequestError, match="no decoder at this size: decode the latents of `sample` elsewhere"):
            sampler("a red ring", budget=2, height=8)


@pytest.mark.parametrize("backend", ["onnxruntime", "resident"])
def test_a_size_with_another_sampler_serves_its_own_programs(folder, backend):
    """Its last step adds three outputs, as no step of the artifact's own programs does: that sum has an engine, too."""
    program = output_program((0, 1))
    program["steps"][1]["output_coefs"] = [0.5, -1.5]
    program["steps"].append({"step_index": 4, "timestep": 300.0, "latent_coef": 1.0, "output_coefs": [0.1, 0.2, -0.4]})
    with _sampler(listed(folder, programs=[{"budget": "3", "program": program}]), backend) as sampler:
        found = sampler.sample({"text": TEXT}, budget=3, seed=5, height=8)
        own = Sizes(sampler.artifact).at({"height": 8}).manifest.program(3).program
        assert own.schedule == (0, 1, 4) != sampler.manifest.program(3).program.schedule
        expected = oracle(TEXT, noise_for(8, 4, 5), own, (-3.0, 4.0))
        assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()
        with pytest.raises(RequestError, match="budget is 2: expected one of 3"):
            sampler.sample({"text": TEXT}, budget=2, seed=5, height=8)
        with pytest.raises(RequestError, match="height is 6"):
            sampler.check("a", budget=2, height=6)


def constant_artifact(folder):
    """`block_0` reads its text as a constant of the size instead."""
    manifest = read_manifest(listed(folder))
    manifest["stages"] = [stage for stage in manifest["stages"] if stage["kind"] != "text_encoder"]
    manifest["tokenizers"] = []
    for stage in manifest["stages"]:
        for tensor in stage["inputs"]:
            if tensor["name"] == "text":
                tensor["shape"] = [2, WIDTH]
    manifest["shapes"]["constants"] = ["text"]
    for number, entry in enumerate(manifest["shapes"]["sizes"]):
        data = ((1 + number) * TEXT[:, 0]).astype("<f4").tobytes()
        path = f"sizes/text-{number}.bin"
        (folder / "sizes").mkdir(exist_ok=True)
        (folder / path).write_bytes(data)
        manifest["files"].append({"path": path, "size_bytes": len(data), "digest": digest_of_bytes(data)})
        entry["constants"] = {"text": path}
    write_manifest(folder, manifest)
    return folder


def test_constants_of_a_size_come_from_its_file(folder):
    with Sampler.load(constant_artifact(folder)) as sampler:
        assert sampler.manifest.conditioning == ()
        for number, height in enumerate((4, 8)):
            found = sampler.sample({}, budget=2, seed=5, height=height)
            program = sampler.manifest.program(2).program
            expected = oracle((1 + number) * TEXT, noise_for(height, 4, 5), program, (-3.0, 4.0))
            assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


def test_a_constant_of_another_length_is_refused(folder):
    constant_artifact(folder)
    manifest = read_manifest(folder)
    (folder / "sizes/text-1.bin").write_bytes(b"\0" * 4)
    entry = next(entry for entry in manifest["files"] if entry["path"] == "sizes/text-1.bin")
    entry |= {"size_bytes": 4, "digest": digest_of_bytes(b"\0" * 4)}
    write_manifest(folder, manifest)
    with (
        Sampler.load(folder) as sampler,
        pytest.raises(ArtifactError, match="found 4 bytes: expected 96 bytes for text at 8x4"),
    ):
        sampler.sample({}, budget=2, seed=5, height=8)


def _symbol(place, **fields):
    value = shapes()
    value["symbols"][place] |= fields
    return value


HOSTILE = {
    "a symbol that is not whole": (_symbol(0, divisor=5), "symbol tokens (height*width/5) is 3.2 at 4x4"),
    "a symbol that is nothing": (_symbol(3, terms=[term(1, "height"), term(-4)]), "symbol h (height - 4) is 0 at 4x4"),
    "a symbol beyond 2^31": (_symbol(0, terms=[term(1 << 40, "height", "width")]), "symbol tokens"),
    "an axis squared": (_symbol(0, terms=[term(1, "height", "height")]), "each once"),
    "an axis that is none": (_symbol(0, terms=[term(1, "num_frames")]), "which is no axis"),
    "two symbols of a name": (_symbol(1, name="tokens"), "two have the same name"),
    "a symbol that is missing": (_symbol(0, name="other"), "expected one of"),
    "other sizes than the artifact's": (_symbol(0, divisor=2), "expected the same"),
    "shapes that part at a corner": (
        _symbol(0, terms=[term(1, "height"), term(1, "width"), term(-4)], divisor=1),
        "latents",
    ),
    "an axis without the own size": (
        shapes(axes=[{"name": "height", "minimum": 6, "maximum": 8, "step": 2}, shapes()["axes"][1]]),
        "height is 4 in conditions",
    ),
    "steps that miss the end": (
        shapes(axes=[{"name": "height", "minimum": 2, "maximum": 9, "step": 2}]),
        "expected steps",
    ),
    "frames of a picture": (
        shapes(axes=[*shapes()["axes"], {"name": "num_frames", "minimum": 1, "maximum": 9, "step": 1}]),
        "num_frames is None",
    ),
    "a list without the own size": (
        shapes(sizes=[{"size": {"height": 8, "width": 4}}]),
        "the artifact's own among them",
    ),
    "a size out of the ranges": (shapes(sizes=[{"size": {"height": 40, "width": 4}}]), "not within the ranges"),
    "a size of some axes": (shapes(sizes=[{"size": {"height": 4}}]), "not within the ranges"),
    "constants of no size": (shapes(constants=["text"]), "there are no sizes"),
    "a constant that is no input": (
        shapes(constants=["x"], sizes=[{"size": {"height": 4, "width": 4}, "constants": {"x": "a.bin"}}]),
        "a.bin is used but not listed",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_does_not_add_up_is_refused_on_reading(folder, name):
    value, message = HOSTILE[name]
    with pytest.raises(ArtifactError) as error:
        Artifact.open(with_sizes(folder, value))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_the_command_line_shows_and_takes_sizes(folder, tmp_path):
    with_sizes(folder)
    shown = CliRunner().invoke(cli.main, ["inspect", str(folder)])
    assert "height: 2 to 12 in steps of 2" in shown.output and "tokens = height*width/4" in shown.output
    as_json = json.loads(CliRunner().invoke(cli.main, ["inspect", str(folder), "--json"]).output)
    assert [axis["name"] for axis in as_json["shapes"]["axes"]] == ["height", "width"]
    line = ["run", str(folder), "--budget", "2", "--prompt", "a red ring", "-o", str(tmp_path / "x.png")]
    assert CliRunner().invoke(cli.main, [*line, "--height", "4"]).exit_code == 0
    refused = CliRunner().invoke(cli.main, [*line, "--height", "5", "--force"])
    assert refused.exit_code == 5 and "height is 5: expected 2 to 12 in steps of 2" in refused.stderr


def test_every_size_is_recorded_when_it_is_first_asked_for(folder, caplog):
    """One graph for each budget and shape, with the bits that the loop gives without."""
    caplog.set_level("INFO", "otcache.runtime.loop.device_loop")
    backend = HostBackend(cuda_graph=True)
    sizes = [{"height": 12, "width": 8}, {}, {"height": 8}, {"height": 2, "width": 8}]
    with (
        Sampler(Artifact.open(with_sizes(folder)), Selection(backend, {})) as sampler,
        _sampler(folder, "resident") as plain,
    ):
        sampler.sample(
            {"text": TEXT}, budget="full", seed=5, **sizes[0]
        )  # the largest arena: nothing is prepared twice
        for number, size in enumerate(sizes, start=1):
            draw = lambda s, size=size: s.sample({"text": TEXT}, budget="full", seed=5, **size)  # noqa: E731
            first, replayed = draw(sampler), draw(sampler)
            assert backend.device.calls["record"] == number and backend.device.calls["replay"] >= number
            np.testing.assert_array_equal(first, replayed)
            np.testing.assert_array_equal(first, draw(plain))
    assert "budget full, 12x8, 3 tokens, 1 at once: recorded" in caplog.text
    assert "budget full, 2x8, 3 tokens, 1 at once: recorded" in caplog.text


def test_memory_is_shown_for_the_size(folder):
    with_sizes(folder)
    line = ["inspect", str(folder), "--memory", "-n", "64", "--json"]
    own, large = (
        json.loads(CliRunner().invoke(cli.main, [*line, *size]).stdout)
        for size in ([], ["--height", "12", "--width", "8"])
    )
    assert own["size"]["height"] == 4 and large["size"] == {"height": 12, "width": 8, "max_sequence_length": 3}
    assert large["budgets"]["2"]["size_bytes"] > 4 * own["budgets"]["2"]["size_bytes"]
    refused = CliRunner().invoke(cli.main, [*line, "--height", "5"])
    assert refused.exit_code == 5 and "height is 5: expected 2 to 12 in steps of 2" in refused.stderr
    shown = CliRunner().invoke(cli.main, ["inspect", str(folder), "--memory", "--height", "8"])
    assert "Device memory beside weights, 8x4, 3 tokens, 1 at once" in " ".join(shown.stdout.split())


def test_memory_is_planned_for_the_size(folder):
    sizes = Sizes(Artifact.open(with_sizes(folder)))
    small, large = (sizes.at({"height": height, "width": 8}).manifest for height in (2, 12))
    first, second = (plan_addresses(each, each.program(2).program, 64).size_bytes for each in (small, large))
    assert 3 * first < second < 6.5 * first
