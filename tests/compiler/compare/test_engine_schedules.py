"""Schedules for other engines: cache-dit and diffusers run what is written, and sglang's variables make that mask."""

from __future__ import annotations

import json
import subprocess

import numpy as np
import pytest
import torch
from command import COMPILE, otc

from otcache.compiler.compare.cells import Cell, Comparison, Spread
from otcache.compiler.compare.engine_schedules import export_schedule, read_comparison
from otcache.compiler.models.load import load_model
from otcache.runtime.artifact.reader import Artifact
from otcache.schemas.errors import RequestError, UsageError

CALL = {"height": 16, "width": 16, "max_sequence_length": 12, "true_cfg_scale": 4.0, "negative_prompt": ""}


@pytest.fixture(scope="module")
def artifact(tiny_flux_folder, workspace, tmp_path_factory):
    """Programs alone, of 2 and 4 of 8 steps."""
    folder = tmp_path_factory.mktemp("artifacts") / "made"
    options = (*COMPILE, "--engines", "none", "--payload", "output", "-o", str(folder))
    result = otc("compile", str(tiny_flux_folder), *options, workspace=workspace)
    assert result.exit_code == 0, result.output
    return folder


@pytest.fixture(scope="module")
def manifest(artifact):
    return Artifact.open(artifact).manifest


@pytest.fixture
def pipeline(tiny_flux_folder):
    return load_model(str(tiny_flux_folder)).pipeline


def written(artifact, engine, folder, *options):
    path = folder / f"schedule-{engine}"
    result = otc("export-schedule", str(artifact), "--for", engine, "--budget", "4", "-o", str(path), *options)
    assert result.exit_code == 0, result.output
    return path, result


def computed_steps(pipeline, module, **call):
    """At which of the run's steps a module is computed, and the final latents; two branches of guidance."""
    step, seen = [0], []
    handle = module.register_forward_hook(lambda *_: seen.append(step[0]))

    def end_step(pipe, index, timestep, values):
        step[0] += 1
        return values

    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        found = pipeline(
            "a red ring", generator=generator, output_type="latent", callback_on_step_end=end_step, **CALL, **call
        ).images
    handle.remove()
    assert [seen.count(index) for index in sorted(set(seen))] == [2] * len(set(seen)), "both branches"
    return tuple(sorted(set(seen))), found


@pytest.mark.parametrize("calibrator", ["taylor-1", "reuse"])
def test_cache_dit_computes_the_steps_that_are_written(artifact, manifest, pipeline, tmp_path, calibrator):
    cache_dit = pytest.importorskip("cache_dit")
    path, result = written(artifact, "cache-dit", tmp_path, "--calibrator", calibrator)
    assert (
        f"4 of 8 steps, {calibrator}. What is lost" in result.stdout
        and "was not measured for cache-dit" in result.stdout
    )
    last, call = pipeline.transformer.single_transformer_blocks[-1], type(pipeline).__call__
    every, full = computed_steps(pipeline, last, num_inference_steps=8)
    try:
        cache_dit.enable_cache(pipeline, **cache_dit.load_configs(str(path)))
        steps, found = computed_steps(pipeline, last, num_inference_steps=8)
    finally:
        cache_dit.disable_cache(pipeline)
        type(pipeline).__call__ = call
    assert every == tuple(range(8)) and steps == manifest.program(4).program.schedule
    assert 0 < float((found - full).norm() / full.norm()) < 0.5


def test_diffusers_skips_the_steps_that_are_written(artifact, manifest, pipeline, tmp_path):
    from diffusers import MagCacheConfig

    path, _ = written(artifact, "diffusers", tmp_path)
    value, program = json.loads(path.read_text()), manifest.program(4).program
    last = pipeline.transformer.single_transformer_blocks[-1].attn  # a skipped block is called, and calls nothing
    pipeline.transformer.enable_cache(MagCacheConfig(**value["mag_cache"]))
    steps, _ = computed_steps(pipeline, last, num_inference_steps=8)
    pipeline.transformer.disable_cache()
    assert steps == program.schedule
    few, _ = computed_steps(pipeline, last, **value["pipeline_call"])
    assert few == (0, 1, 2, 3)
    wanted = [step.timestep for step in program.steps if step.compute]
    np.testing.assert_allclose(pipeline.scheduler.timesteps.tolist(), wanted, atol=1e-3)


def test_sglangs_variables_make_the_mask(artifact, manifest, tmp_path):
    """As its `cache_dit_integration.py` reads them: bins through `steps_mask`, kept when the context is refreshed."""
    cache_dit = pytest.importorskip("cache_dit")
    path, _ = written(artifact, "sglang", tmp_path, "--calibrator", "taylor-2")
    shell = ["bash", "-c", f'set -eu; source "{path}"; env | grep ^SGLANG_']
    lines = subprocess.run(shell, capture_output=True, text=True, check=True).stdout.splitlines()
    values = {name.removeprefix("SGLANG_CACHE_DIT_"): value for name, value in (line.split("=", 1) for line in lines)}
    bins = [[int(part) for part in values[f"SCM_{name}_BINS"].split(",")] for name in ("COMPUTE", "CACHE")]
    mask = cache_dit.steps_mask(compute_bins=bins[0], cache_bins=bins[1], total_steps=8, mask_policy="medium")
    assert tuple(np.flatnonzero(mask)) == manifest.program(4).program.schedule and len(mask) == 8
    settings = {
        name: values[name] for name in ("ENABLED", "SCM_POLICY", "TAYLORSEER", "TS_ORDER", "FN", "BN", "WARMUP")
    }
    assert settings == {
        "ENABLED": "true",
        "SCM_POLICY": "static",
        "TAYLORSEER": "true",
        "TS_ORDER": "2",
        "FN": "1",
        "BN": "0",
        "WARMUP": "1",
    }
    config = cache_dit.DBCacheConfig(steps_computation_mask=mask, steps_computation_policy=values["SCM_POLICY"])
    config.update(**cache_dit.DBCacheConfig().reset(num_inference_steps=8).as_dict())
    assert config.steps_computation_mask == mask and config.steps_computation_policy == "static"


def comparison_of(manifest, setting, lower=0.0, below=2.5):
    """A comparison of the artifact's program of 4 evaluations, and of cache-dit so far below."""
    quality = manifest.program(4).quality

    def cell(method, below, setting):
        psnr = {name: getattr(quality.psnr_db, name) - below for name in ("mean", "worst")}
        return Cell(
            method=method,
            group="library",
            budget=4,
            nfe_mean=4.0,
            nfe_worst=4.0,
            psnr_db=Spread(std=quality.psnr_db.std, **psnr),
            ssim=Spread(mean=0.9, std=0.0, worst=0.9),
            lpips=None,
            seconds=1.0,
            setting=setting,
            full_runs=0.0,
            blocks_mean=5.5,
        )

    return Comparison(
        model=manifest.model.name,
        pipeline=manifest.model.pipeline,
        scheduler=manifest.sampler.scheduler,
        num_inference_steps=8,
        guidance_scale=4.0,
        prompts=manifest.conditions.evaluation_prompts,
        calibration_prompts=8,
        size=(16, 16),
        budgets=(4,),
        cells=(cell("otcache", lower, ""), cell("cache-dit mask", below, setting)),
        skipped=(),
        verdicts=(),
        claims=(),
        costs={},
        lemica_full_runs=None,
        versions={},
    )


def test_what_is_lost_is_that_of_the_comparison(artifact, manifest, tmp_path):
    (tmp_path / "comparison.json").write_text(json.dumps(comparison_of(manifest, "otcache mask, taylor-2").json()))
    path, result = written(artifact, "cache-dit", tmp_path, "--comparison", str(tmp_path), "--json")
    said = json.loads(result.stdout)
    assert said["calibrator"] == "taylor-2" and said["lost_db"] == pytest.approx(2.5)
    own = manifest.program(4).quality.psnr_db.mean
    said_so = f"Lost: 2.5 dB, measured on 3 held-out prompts by `otc compare`: it comes to {own - 2.5:.1f} dB (SSIM 0.9"
    assert said_so in path.read_text() and ", for 5.5 full runs of the blocks, where" in path.read_text()
    better = comparison_of(manifest, "otcache mask, reuse", below=-1.5)
    assert "Lost: nothing, it gains 1.5 dB, measured" in export_schedule(manifest, "cache-dit", "4", None, better).text
    sglang = export_schedule(manifest, "sglang", "4", None, read_comparison(tmp_path))
    assert "measured in diffusers with cache-dit, not in sglang itself" in sglang.text and sglang.lost_db is not None


@pytest.mark.parametrize(
    ("engine", "calibrator", "setting", "lower"),
    [
        ("cache-dit", "reuse", "otcache mask, taylor-2", 0.0),
        ("cache-dit", None, "lemica mask, taylor-2", 0.0),
        ("cache-dit", None, "otcache mask, taylor-2", 0.1),
        ("diffusers", None, "otcache mask, reuse", 0.0),
    ],
    ids=["another calibrator", "another mask", "another program", "another engine"],
)
def test_what_was_not_measured_is_said_plainly(manifest, engine, calibrator, setting, lower):
    made = export_schedule(manifest, engine, "4", calibrator, comparison_of(manifest, setting, lower))
    assert made.lost_db is None and f"was not measured for {engine}" in made.text


def test_no_name_gets_out_of_its_line(manifest):
    named = manifest.model.model_copy(update={"name": "x\nexport EVIL=1\n"})
    text = export_schedule(manifest.model_copy(update={"model": named}), "sglang", "4", None, None).text
    assert [line for line in text.splitlines() if "EVIL" in line and not line.startswith("#")] == []


def test_what_cannot_be_written_is_refused(artifact, manifest, tmp_path):
    for budget, error, message in (
        (None, UsageError, "expected one of 2, 4"),
        ("full", RequestError, "budget is 'full': expected one of 2, 4"),
        ("9", RequestError, "budget is '9'"),
    ):
        with pytest.raises(error, match=message):
            export_schedule(manifest, "cache-dit", budget, None, None)
    with pytest.raises(UsageError, match="expected one of reuse, which diffusers has"):
        export_schedule(manifest, "diffusers", "4", "dmd", None)
    path, _ = written(artifact, "sglang", tmp_path)
    base = ("export-schedule", str(artifact), "--for", "sglang", "--budget", "4")
    for options, message in (
        (["-o", str(path)], "it exists"),
        (["-o", str(tmp_path / "none" / "x")], "its folder does not exist"),
        (["--json"], "give -o as well"),
        (["--comparison", str(tmp_path)], "comparison.json cannot be read"),
    ):
        result = otc(*base, *options)
        assert result.exit_code == 2 and message in result.stderr and len(result.stderr.splitlines()) == 1
    assert otc(*base).stdout == path.read_text(), "without -o it is printed"
