"""Whole compiles on a second device, which raises wherever tensors of two devices meet: the CPU's programs come out.

Residuals are left out: a cut is `torch.export`'s, which takes no tensors of a device that is written in Python.
They run in processes of their own, because a device stays known to torch for as long as a process lives.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from command import otc
from model_zoo import pipelines

from otcache.runtime.artifact.reader import Artifact

ALT = Path(__file__).parents[1] / "support" / "alt_device.py"
SMALL = (
    "--payload output --budgets 2 --num-inference-steps 6 --trials 1 --calibration-prompts 2 --evaluation-prompts 1 "
    "--threads 1 --no-bench"
)
PROMPTS = "a red ring on black\na blue star on black\na white cross on black\n"


def compile_on(device: str, folder: Path, work: Path, *options: str) -> Path:
    (work / "prompts.txt").write_text(PROMPTS)
    target = work / device
    arguments = [*SMALL.split(), "--prompts", str(work / "prompts.txt"), *options]
    command = [sys.executable, str(ALT), "compile", str(folder), "--device", device, "-o", str(target), *arguments]
    done = subprocess.run(
        command, env={**os.environ, "OTC_CACHE": str(work / "cache")}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return target


def coefficients(artifact: Path):
    """Of all programs, schedules among them."""
    steps = [(each.budget, step) for each in Artifact.open(artifact).manifest.programs for step in each.program.steps]
    return {
        (budget, step.step_index, step.compute): [step.latent_coef, *step.output_coefs, *step.residual_coefs]
        for budget, step in steps
    }


def same_programs(artifact: Path, other: Path) -> bool:
    found, expected = coefficients(artifact), coefficients(other)
    return found == {key: pytest.approx(value, rel=1e-4, abs=1e-6) for key, value in expected.items()}


def test_flux_without_engines(tiny_flux_folder, tmp_path):
    made = [
        compile_on(device, tiny_flux_folder, tmp_path, "--engines", "none", "--micro-batch", "2")
        for device in ("alt", "cpu")
    ]
    assert Artifact.open(made[0]).manifest.producer["device"] == "alt"
    assert same_programs(*made)


def test_flux_with_engines(tiny_flux_folder, tmp_path):
    """Exported from the model on the CPU, to which the programs that were made on the device belong."""
    made = compile_on("alt", tiny_flux_folder, tmp_path)
    artifact = Artifact.open(made)
    artifact.verify()
    result = otc("verify", str(made), "--level", "golden")
    assert result.exit_code == 0, result.output
    assert artifact.manifest.stages and artifact.manifest.producer["device"] == "alt"


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (pipelines.stable_diffusion_3, ["--guidance-scale", "2:4"]),
        (pipelines.wan, ["--num-frames", "5"]),
    ],
    ids=["guided", "video"],
)
def test_other_pipelines(make, options, tmp_path):
    pipeline = make()
    pipeline.save_pretrained(tmp_path / "model")
    size = ["--height", "16", "--width", "16", "--max-sequence-length", "12"]
    made = [
        compile_on(device, tmp_path / "model", tmp_path, *size, *options, "--engines", "none", "--micro-batch", "2")
        for device in ("alt", "cpu")
    ]
    assert same_programs(*made)
