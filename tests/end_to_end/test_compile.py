"""From a diffusers folder through the command line to pictures, against the pipeline itself."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from command import COMPILE, otc

from otcache.compiler.calibration.rollout import roll_out
from otcache.compiler.graph.cut import cut
from otcache.compiler.models.load import load_model
from otcache.compiler.pipelines.call import call_options
from otcache.compiler.pipelines.denoiser import denoiser_of
from otcache.compiler.pipelines.full_run import capture
from otcache.compiler.pipelines.probe import probe
from otcache.compiler.report.figures import FIGURES
from otcache.runtime import Sampler
from otcache.runtime.artifact.reader import Artifact


@pytest.fixture(scope="module")
def sampler(compiled):
    with Sampler.load(compiled) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def model(tiny_flux_folder):
    return load_model(str(tiny_flux_folder))


@pytest.fixture(scope="module")
def options(model):
    return call_options(model.pipeline, num_inference_steps=8, height=16, width=16, max_sequence_length=12)


def pipeline_run(model, options, prompts, seed, output_type="latent"):
    arguments = {**options.arguments(4.0, len(prompts)), "output_type": output_type}
    with torch.no_grad():
        return model.pipeline(prompts, generator=torch.Generator().manual_seed(seed), **arguments).images


def test_budget_full_reproduces_the_pipeline(sampler, model, options):
    prompts = ["a red ring on black", "a blue star on white"]
    latents = sampler.sample(sampler.encode(prompts), budget="full", seed=11)
    expected = pipeline_run(model, options, prompts, 11).numpy()
    assert np.linalg.norm(latents - expected) / np.linalg.norm(expected) < 1e-3
    pictures = sampler(prompts, budget="full", seed=11)
    reference = pipeline_run(model, options, prompts, 11, "np")
    assert -10 * np.log10(np.mean((pictures - reference) ** 2)) > 45


def test_a_list_of_seeds_is_a_list_of_generators(sampler, model, options):
    latents = sampler.sample(sampler.encode(["a red ring on black"] * 2), budget="full", seed=[5, 6])
    expected = pipeline_run(model, options, ["a red ring on black"], 6).numpy()
    assert np.allclose(latents[1:], expected, atol=2e-3)


@pytest.mark.parametrize("budget", ["2", "4"])
def test_a_program_gives_the_same_latents_in_torch_and_in_the_runtime(sampler, model, options, budget):
    prompts = ["a green cross on black", "a red star on white", "a white ring on blue"]
    interface = probe(model.pipeline, options, 4.0, prompts)
    trajectory = capture(model.pipeline, interface, options, prompts, [1, 2, 3], [4.0] * 3)
    denoiser = denoiser_of(model.transformer, interface, trajectory)
    stages = cut(model.transformer, denoiser.inputs(trajectory.latents[4], 500.0, 1.0), constants=interface.constants)
    program = sampler.manifest.program(budget).program
    expected = roll_out(program, denoiser, trajectory.latents[0], stages).numpy()
    found = sampler.sample(sampler.encode(prompts), budget=budget, seed=[1, 2, 3])
    assert np.linalg.norm(found - expected) / np.linalg.norm(expected) < 1e-4


def test_manifest_records_what_was_tried(compiled):
    manifest = Artifact.open(compiled).manifest
    assert manifest.budgets == ("2", "4", "full")
    assert manifest.conditions.calibration_prompts == 8 and manifest.conditions.evaluation_prompts == 3
    for budget in ("2", "4"):
        entry = manifest.program(budget)
        assert entry.program.nfe == int(budget) == len(entry.program.schedule)
        scores = [candidate.ssim for candidate in entry.candidates]
        assert entry.candidates[0].chosen and scores[0] == max(scores)
        assert {"interpolated"} <= {candidate.name for candidate in entry.candidates}
        assert any(candidate.name.startswith("graph") for candidate in entry.candidates)
        assert {candidate.payload for candidate in entry.candidates} == {"banded", "residual"}
        assert {peer.name for peer in entry.baselines} == {
            "euler",
            "dpm++2m",
            "unipc",
            "uniform reuse",
            "uniform taylor-1",
        }
        assert all(peer.nfe <= int(budget) for peer in entry.baselines)
    assert {cost.name for cost in manifest.costs} >= {"capture", "reference", "anchor", "interpolate and fit"}
    assert [stage.kind for stage in manifest.stages] == ["embed", *["block"] * 3, "head", "text_encoder", "decoder"]
    assert all(stage.max_relative_error < 1e-4 for stage in manifest.stages)


def test_no_path_of_this_host_is_in_the_artifact(compiled, tiny_flux_folder):
    for path in compiled.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            for secret in (str(tiny_flux_folder), str(Path(torch.__file__).parent), str(Path.home() / ".cache")):
                assert secret.encode() not in data, f"{path.name} holds {secret}"


def test_report_is_whole(compiled):
    page = (compiled / "report.html").read_text()
    assert "data:image/png;base64," in page and "://" not in page.split("<body>")[1]
    names = {"evidence.json", "pictures.png", "worst.png", *FIGURES}
    assert {path.name for path in (compiled / "report").iterdir()} == names


def test_same_options_give_the_same_digest(compiled, tiny_flux_folder, workspace, tmp_path):
    """Once with everything computed anew, once from the workspace."""
    expected = Artifact.open(compiled).manifest.digest
    for name, folder in (("anew", tmp_path / "empty"), ("resumed", workspace)):
        target = tmp_path / name
        result = otc("compile", str(tiny_flux_folder), *COMPILE, "-o", str(target), "--json", workspace=folder)
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["digest"] == expected
    assert Artifact.open(tmp_path / "resumed").verify().digest == expected


@pytest.mark.parametrize("edges", ["statistics", "end-to-end"])
def test_residual_payload_is_served(edges, compiled, tiny_flux_folder, workspace, tmp_path, model, options):
    target = tmp_path / "residual"
    choices = ("--payload", "residual", "--edge-costs", edges)
    result = otc("compile", str(tiny_flux_folder), *COMPILE, *choices, "-o", str(target), workspace=workspace)
    assert result.exit_code == 0, result.output
    with Sampler.load(target) as sampler:
        assert sampler.manifest.program("4").program.payload == "residual"
        latents = sampler.sample(sampler.encode("a red ring on black"), budget="4", seed=0)
        expected = pipeline_run(model, options, ["a red ring on black"], 0).numpy()
        assert np.linalg.norm(latents - expected) / np.linalg.norm(expected) < 0.2


def test_an_existing_folder_is_kept_without_force(compiled, tiny_flux_folder, workspace, tmp_path):
    target = tmp_path / "mine"
    target.mkdir()
    (target / "notes.txt").write_text("keep me")
    result = otc("compile", str(tiny_flux_folder), *COMPILE, "-o", str(target), workspace=workspace)
    assert result.exit_code == 2 and "--force" in result.stderr and "Traceback" not in result.stderr
    result = otc("compile", str(tiny_flux_folder), *COMPILE, "-o", str(target), "--force", workspace=workspace)
    assert result.exit_code == 2 and "it is no artifact" in result.stderr
    assert [path.name for path in target.iterdir()] == ["notes.txt"]
    shutil.rmtree(target)
    shutil.copytree(compiled, target)
    result = otc("compile", str(tiny_flux_folder), *COMPILE, "-o", str(target), "--force", workspace=workspace)
    assert result.exit_code == 0, result.output
    assert [path.name for path in tmp_path.iterdir()] == ["mine"], "no temporary folder is left"


@pytest.mark.parametrize(
    ("arguments", "exit_code", "expected"),
    [
        (["nothing-here"], 3, "expected a bundled name"),
        (["--budgets", "0"], 2, "expected whole numbers"),
        (["--budgets", "4,x"], 2, "expected whole numbers"),
        (["--budgets", "9"], 2, "expected 1 … 8"),
        (["--budgets", "2.5"], 2, "expected whole numbers"),
        (["--prompts", "missing.txt"], 3, "cannot be read"),
        (["--prompts", "empty.txt"], 3, "has no prompts"),
        (["--guidance-scale", "x"], 2, "expected a number such as 4"),
        (["--objective", "lpips"], 6, "OTC_LPIPS names none"),
    ],
)
def test_bad_input_ends_in_one_line(arguments, exit_code, expected, tiny_flux_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n \n")
    model = [] if arguments[0] == "nothing-here" else [str(tiny_flux_folder)]
    result = otc("compile", *model, *COMPILE, *arguments, "-o", "out", workspace=tmp_path / "work")
    assert result.exit_code == exit_code, result.output
    assert expected in result.stderr
    assert len(result.stderr.strip().splitlines()) <= 2 and "Traceback" not in result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.txt"]


def test_a_stochastic_scheduler_is_refused(tiny_flux_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_flux_folder, folder)
    config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps({**config, "stochastic_sampling": True}))
    result = otc("compile", str(folder), *COMPILE, "-o", str(tmp_path / "out"), workspace=tmp_path / "work")
    assert result.exit_code == 3
    assert "stochastic" in result.stderr and "FlowMatchEulerDiscreteScheduler" in result.stderr
    assert not (tmp_path / "out").exists()
