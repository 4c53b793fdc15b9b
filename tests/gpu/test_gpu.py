"""What needs a GPU: `python -m pytest -m gpu tests/gpu`, at most ten minutes on one with 80 GB.

The same scripts run on the CPU with narrow models, so that their code is tested everywhere. `OTC_GPU_RESULTS` names a
JSON file that takes the figures.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import full_size
import numpy as np
import pytest
import torch
from command import COMPILE, otc

from otcache.runtime.artifact.reader import Artifact

CPU = torch.device("cpu")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU that torch can use")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("offload", ["none", "model", "group"])
def test_a_whole_compile_in_bfloat16(tiny_flux_folder, tmp_path, offload):
    where = ["--device", "cuda", "--precision", "bfloat16", "--offload", offload, "--payload", "output"]
    made = tmp_path / "artifact"
    result = otc("compile", str(tiny_flux_folder), *COMPILE, *where, "-o", str(made), workspace=tmp_path / "cache")
    assert result.exit_code == 0, result.output
    artifact = Artifact.open(made)
    artifact.verify()
    assert artifact.manifest.producer["device"] == "cuda" and artifact.manifest.stages
    assert otc("verify", str(made), "--level", "golden").exit_code == 0


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("case", full_size.CASES)
def test_full_size(case, tmp_path):
    device = torch.device("cuda", 0)
    found = full_size.measure(case, device, tmp_path)
    torch.cuda.empty_cache()
    _keep({**full_size.describe(device), "narrow": False}, case, found)
    assert found["parameters"] > 1e10
    assert found["speed_up"] > 0.8 * found["num_inference_steps"] / found["budget"]
    assert np.isfinite(found["latent_error"])


def _keep(described: dict, case: str, found: dict) -> None:
    target = os.environ.get("OTC_GPU_RESULTS")
    if target is None:
        return
    path = Path(target)
    results = json.loads(path.read_text()) if path.is_file() else {**described, "cases": {}}
    results["cases"][case] = found
    path.write_text(json.dumps(results, indent=2) + "\n")


@pytest.mark.parametrize("case", full_size.CASES)
def test_the_same_code_with_a_narrow_model(case, tmp_path):
    found = full_size.measure(case, CPU, tmp_path, narrow=True)
    assert found["parameters"] < 1e7 and found["precision"] == "bfloat16"
    assert found["latent_error"] < 0.5 and found["speed_up"] > 0 and found["micro_batch"] >= 1
    json.dumps(found)
