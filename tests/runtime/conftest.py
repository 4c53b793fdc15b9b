"""The small artifact, once for reading and anew for tests that damage it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import small_artifact as small

MANY = 600
"""Steps of the artifact's full program."""


@pytest.fixture(scope="session")
def artifact_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be changed."""
    return small.write_artifact(tmp_path_factory.mktemp("artifacts") / "small")


@pytest.fixture
def damaged(artifact_folder: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(artifact_folder, tmp_path / "small"))


@pytest.fixture(scope="session")
def built(artifact_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small artifact with plans for sm_89, built where no package of the compiler can be imported. Not to be
    changed.
    """
    pytest.importorskip("tensorrt_rtx")
    folder = Path(shutil.copytree(artifact_folder, tmp_path_factory.mktemp("artifacts") / "small"))
    absent = tmp_path_factory.mktemp("absent")
    for name in ("torch", "diffusers", "transformers", "onnx", "optuna", "ot", "scipy"):
        (absent / f"{name}.py").write_text(f"raise ImportError('{name} is not here')\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(absent), os.environ.get("PYTHONPATH", "")])}
    line = [sys.executable, "-m", "otcache.runtime.cli.main", "build-engines", str(folder)]
    line += ["--backend", "tensorrt-rtx", "--target", "sm_89"]
    subprocess.run(line, check=True, env=environment)
    return folder


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
