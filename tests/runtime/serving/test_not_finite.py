"""Numbers that are not finite end a request with an error that names stage and step, and never become a picture."""

from __future__ import annotations

import numpy as np
import pytest
import small_artifact as small
from click.testing import CliRunner
from host_device import HostBackend
from spoilt_artifact import spoil

from otcache.runtime import HostError, RequestError, Sampler, Service, http_status
from otcache.runtime.artifact.reader import Artifact
from otcache.runtime.cli import main as cli
from otcache.runtime.engines.choose import Selection
from otcache.runtime.loop import finite


@pytest.fixture
def folder(tmp_path):
    return small.write_artifact(tmp_path / "small")


@pytest.mark.parametrize("stage", ["embed", "block_0", "block_1", "head"])
@pytest.mark.parametrize("budget", ["2", "3", "full"])
def test_the_stage_is_named(folder, stage, budget):
    spoil(folder, stage)
    with Sampler.load(folder, threads=1) as sampler:
        with pytest.raises(HostError) as caught:
            sampler("a red ring", budget=budget)
        message = str(caught.value)
        assert message.startswith(f"stage {stage}: found numbers that are not finite (NaN or infinity) at step 1 of ")
        assert f"of budget {budget} (step_index 0)" in message and "--level golden" in message and "\n" not in message
        assert http_status(caught.value) == 500


def test_the_step_is_named_and_others_are_served_after_it(folder):
    """The head gives NaN below a time that the steps at 0 and 3 of budget 2 do not both reach."""
    times = [step.timestep * 0.001 for step in Artifact.open(folder).manifest.program("full").program.steps]
    spoil(folder, "head", below=(times[3] + times[4]) / 2)
    with Sampler.load(folder, threads=1) as sampler:
        with pytest.raises(HostError, match=r"stage head: .* at step 5 of 6 of budget full \(step_index 4\)"):
            sampler("a red ring", budget="full")
        assert np.isfinite(sampler("a red ring", budget=2)).all()


def test_overflow_is_told_with_its_cure_in_half_precision(folder):
    spoil(folder, "block_1", factor=np.inf)
    manifest = Artifact.open(folder).manifest
    half = tuple(
        stage.model_copy(
            update={"outputs": tuple(tensor.model_copy(update={"dtype": "float16"}) for tensor in stage.outputs)}
        )
        for stage in manifest.stages
    )
    with pytest.raises(HostError, match="float16 overflows beyond 65504: compile with --dtype bfloat16 or"):
        finite.check_output(np.float32([np.inf]), "block_1", manifest.model_copy(update={"stages": half}))
    with Sampler.load(folder, threads=1) as sampler, pytest.raises(HostError, match="stage block_1"):
        sampler("a red ring", budget="full")


def test_encoder_and_decoder_are_named(folder):
    spoil(folder, "text")
    with (
        Sampler.load(folder, threads=1) as sampler,
        pytest.raises(HostError, match=r"stage text: .* outside of the steps"),
    ):
        sampler("a red ring", budget=2)
    small.write_artifact(folder.parent / "other")
    spoil(folder.parent / "other", "decoder")
    with Sampler.load(folder.parent / "other", threads=1) as sampler, pytest.raises(HostError, match="stage decoder"):
        sampler("a red ring", budget=2)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_a_caller_brings_is_the_callers_fault(artifact_folder, value):
    with Sampler.load(artifact_folder, threads=1) as sampler:
        conditioning = sampler.encode("a red ring")
        spoilt = {name: array.copy() for name, array in conditioning.items()}
        spoilt["text"][0, 0, 0] = value
        with pytest.raises(RequestError, match="conditioning text holds NaN or infinity"):
            sampler.sample(spoilt, budget=2)
        latents = np.zeros((1, *sampler.manifest.latents.shape), np.float32)
        latents[0, 0, 0] = value
        for call in (lambda: sampler.sample(conditioning, budget=2, latents=latents), lambda: sampler.decode(latents)):
            with pytest.raises(RequestError, match="latents holds NaN or infinity"):
                call()


def test_the_command_line_says_so_and_writes_nothing(folder, tmp_path):
    spoil(folder, "embed")
    target = tmp_path / "out.png"
    line = ["run", str(folder), "--budget", "2", "--prompt", "a red ring", "-o", str(target)]
    result = CliRunner().invoke(cli.main, line)
    assert result.exit_code == 6 and "stage embed" in result.stderr and len(result.stderr.splitlines()) == 1
    assert not target.exists()


def test_a_service_fails_that_request_alone(folder):
    times = [step.timestep * 0.001 for step in Artifact.open(folder).manifest.program("full").program.steps]
    spoil(folder, "head", below=(times[3] + times[4]) / 2)
    with Service(Sampler.load(folder, threads=1)) as service:
        bad, good = service.submit("a red ring", budget="full"), service.submit("a red ring", budget=2)
        assert http_status(bad.exception(30)) == 500 and "step 5 of 6" in str(bad.exception())
        assert np.isfinite(good.result(30)).all()


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_a_device_loop_finds_the_launch(artifact_folder, cuda_graph):
    """A head that writes NaN in the last step, into memory that the loop does not look at."""
    backend = HostBackend(cuda_graph=cuda_graph)
    with Sampler(Artifact.open(artifact_folder), Selection(backend, {})) as sampler:
        expected = sampler("a red ring", budget="full")
        if cuda_graph:
            np.testing.assert_array_equal(sampler("a red ring", budget="full"), expected)
        head, steps = backend.engines["head"], len(sampler.manifest.program("full").program.steps)
        clean, runs = head.run, [0]

        def spoilt(inputs):
            runs[0] += 1
            found = clean(inputs)
            return {k: v * np.nan for k, v in found.items()} if runs[0] % steps == 0 else found

        for context in head.contexts:
            context.run = spoilt
        head.run = spoilt
        with pytest.raises(HostError, match=r"stage head: .* at step 6 of 6 of budget full"):
            sampler("a red ring", budget="full")
        for context in head.contexts:
            context.run = clean
        head.run = clean
        np.testing.assert_array_equal(sampler("a red ring", budget="full"), expected)
