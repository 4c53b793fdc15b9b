"""A running server of an artifact whose full program takes long enough for requests to overlap."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import small_artifact as small
from http_server import serving

MANY = 600
"""Steps of the artifact's full program."""
CAPACITY = 8


@pytest.fixture(scope="session")
def slow_artifact(artifact_folder, tmp_path_factory):
    """The small artifact with a full program of hundreds of steps."""
    folder = Path(shutil.copytree(artifact_folder, tmp_path_factory.mktemp("slow") / "small"))
    value = small.read_manifest(folder)
    for part in ("sampler", "reference", "anchor"):
        value[part]["num_inference_steps"] = MANY
    steps = [
        {"step_index": i, "timestep": 1000 * (1 - i / MANY), "latent_coef": 1.0, "output_coefs": [-1 / MANY]}
        for i in range(MANY)
    ]
    value["programs"][-1]["program"]["steps"] = steps
    small.write_manifest(folder, value)
    return folder


@pytest.fixture(scope="module")
def server(slow_artifact):
    pytest.importorskip("starlette")
    pytest.importorskip("uvicorn")
    with serving(slow_artifact, "--capacity", str(CAPACITY)) as server:
        yield server
