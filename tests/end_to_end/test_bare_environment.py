"""The wheel with its base dependencies alone serves an artifact: no torch, no compiler."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FORBIDDEN = ("torch", "diffusers", "transformers", "ot", "optuna", "scipy", "onnx", "matplotlib")


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """The `bin` folder of a fresh environment with the built wheel."""
    work = tmp_path_factory.mktemp("bare")
    source = work / "source"
    ignored = shutil.ignore_patterns(".*", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, source, ignore=lambda folder, names: ignored(folder, names) | unpackaged(Path(folder), names))
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(work), str(source))
    (wheel,) = work.glob("*.whl")
    venv.create(work / "venv", with_pip=True)
    binaries = work / "venv" / ("Scripts" if os.name == "nt" else "bin")
    run(str(binaries / "python"), "-m", "pip", "install", "--quiet", "-c", str(ROOT / "constraints.txt"), str(wheel))
    return binaries


def unpackaged(folder: Path, names: list[str]) -> set[str]:
    """What a working tree may hold beside the package: builds, and artifacts beside its models and scripts."""
    if folder == ROOT:
        return set(names) & {"build", "dist"}
    return set(names) - {"__init__.py", "models", "training"} if folder == ROOT / "artifacts" else set()


def run(*command: str, check: bool = True, **options) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, **options)
    assert not check or result.returncode == 0, result.stderr
    return result


@pytest.mark.slow
def test_bare_environment_serves(bare, compiled, tmp_path):
    for module in FORBIDDEN:
        assert run(str(bare / "python"), "-c", f"import {module}", check=False).returncode != 0, (
            f"{module} is installed"
        )
    target = tmp_path / "out.png"
    result = run(
        str(bare / "otc"),
        "run",
        str(compiled),
        "--budget",
        "4,full",
        "--prompt",
        "a red ring",
        "-o",
        str(target),
        "--json",
        cwd=tmp_path,
    )
    assert json.loads(result.stdout)["images"] == 2 and target.stat().st_size > 500
    assert "ok" in run(str(bare / "otc"), "verify", str(compiled), cwd=tmp_path).stdout


@pytest.mark.slow
def test_compile_names_the_missing_extra(bare, tmp_path):
    result = run(str(bare / "otc"), "compile", "shapes", "-o", "out", check=False, cwd=tmp_path)
    assert result.returncode == 6
    assert "pip install 'otcache[compiler]'" in result.stderr and len(result.stderr.strip().splitlines()) == 1
    assert "compile" in run(str(bare / "otc"), "--help", cwd=tmp_path).stdout
    assert list(tmp_path.iterdir()) == []
