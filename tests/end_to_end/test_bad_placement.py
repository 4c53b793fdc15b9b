"""What a device does not have is said in one line before anything is computed, through the command line."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from command import otc
from diffusers import FluxTransformer2DModel, TorchAoConfig

from otcache.runtime.artifact.reader import Artifact

ALT = Path(__file__).parents[1] / "support" / "alt_device.py"
SMALL = "--budgets 2 --num-inference-steps 5 --trials 0 --calibration-prompts 2 --evaluation-prompts 1 --threads 1"
PLAIN = (*SMALL.split(), "--payload", "output", "--engines", "none")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            ["--device", "cuda:7"],
            "--device is cuda:7: this host has {count} CUDA devices: give cpu, or run on a GPU host",
        ),
        (["--device", "banana"], "--device is 'banana': expected auto, cpu, cuda, cuda:1 or another that torch knows"),
        (["--device", "meta"], "--device is meta: torch cannot use it here: give cpu, or run where it is"),
        (["--device", "cpu", "--offload", "model"], "--offload model gives a device's memory back, and the model is"),
        (["--device", "cpu", "--offload", "group"], "--offload group gives a device's memory back, and the model is"),
        (["--micro-batch", "0"], "--micro-batch is '0': expected auto, or a whole number from 1 to 4096"),
        (["--micro-batch", "-1"], "--micro-batch is '-1': expected auto, or a whole number from 1 to 4096"),
        (["--offload", "model", "--payload", "residual"], "--offload model with --payload residual: residuals run the"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(tiny_flux_folder, tmp_path, options, said):
    folder = tmp_path / "cache"
    result = otc("compile", str(tiny_flux_folder), *PLAIN, *options, "-o", str(tmp_path / "a"), workspace=folder)
    assert result.exit_code not in (0, 1), result.output
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert said.format(count=torch.cuda.device_count()) in lines[-1]
    assert not folder.exists() or not list(folder.glob("*/capture*")), "nothing was evaluated"
    assert not (tmp_path / "a").exists()


def compile_on_alt(folder: Path, work: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ALT), "compile", str(folder), "--device", "alt", *PLAIN, *options]
    return subprocess.run(
        [*command, "-o", str(work / "a")],
        env={**os.environ, "OTC_CACHE": str(work / "cache"), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_precision_that_the_device_lacks(tiny_flux_folder, tmp_path):
    done = compile_on_alt(tiny_flux_folder, tmp_path, "--precision", "bfloat16", ALT_LACKS="torch.bfloat16")
    assert done.returncode > 1
    assert "--precision is bfloat16, which alt lacks: give float32" in done.stderr.strip().splitlines()[-1]


def test_memory_that_the_weights_do_not_fit(tiny_flux_folder, tmp_path):
    done = compile_on_alt(tiny_flux_folder, tmp_path, ALT_FREE_BYTES="20000")
    assert done.returncode == 6
    last = done.stderr.strip().splitlines()[-1]
    assert "the model's weights take " in last and "MB in float32, and 0.02 MB are free on alt: give --pre" in last


def test_memory_that_one_sample_does_not_fit(tiny_flux_folder, tmp_path):
    done = compile_on_alt(tiny_flux_folder, tmp_path, ALT_FREE_BYTES=f"{1 << 30},20000")
    assert done.returncode > 1
    last = done.stderr.strip().splitlines()[-1]
    assert "one sample's evaluation takes about " in last and "MB beside the model, and 0.02 MB are free" in last
    assert not list((tmp_path / "cache").glob("*/capture*"))


def test_a_quantised_model_with_engines_asked_for(tiny_flux_folder, tmp_path):
    torchao = pytest.importorskip("torchao.quantization", reason="pip install --no-deps torchao")
    folder, options = tmp_path / "quantised", TorchAoConfig(torchao.Int8DynamicActivationInt8WeightConfig())
    shutil.copytree(tiny_flux_folder, folder, ignore=shutil.ignore_patterns("transformer"))
    transformer = FluxTransformer2DModel.from_pretrained(tiny_flux_folder / "transformer", quantization_config=options)
    transformer.save_pretrained(folder / "transformer")
    arguments = ["compile", str(folder), *PLAIN, "--device", "cpu", "-o", str(tmp_path / "a")]
    result = otc(*arguments, "--engines", "onnx", workspace=tmp_path / "cache")
    assert result.exit_code == 3
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert "is quantised (torchao: " in line and line.endswith("or leave engines out with --engines none")
    assert not (tmp_path / "cache").exists() or not list((tmp_path / "cache").glob("*/capture*"))
    assert otc(*arguments, workspace=tmp_path / "cache").exit_code == 0
    assert not Artifact.open(tmp_path / "a").manifest.stages


@pytest.mark.skipif(
    not Path("/dev/shm").is_dir() or os.stat("/dev/shm").st_dev == os.stat(tempfile.gettempdir()).st_dev,
    reason="/dev/shm is no file system of its own",
)
def test_a_workspace_on_another_file_system(tiny_flux_folder, tmp_path):
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        made = str(tmp_path / "a")
        result = otc("compile", str(tiny_flux_folder), *PLAIN, "-o", made, workspace=Path(folder))
        assert result.exit_code == 0, result.output
        assert any(Path(folder).iterdir())
    Artifact.open(tmp_path / "a").verify()
