"""Artifacts of every released version load, verify and give what they gave when they were made (see
tests/golden/make.py).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from otcache.runtime import Sampler
from otcache.runtime.artifact.reader import Artifact
from otcache.runtime.cli import main as cli
from otcache.runtime.shipping.verify import LEVELS, verify
from otcache.schemas.manifest import SCHEMA_MINOR, core_digest

FOLDER = Path(__file__).parents[2] / "golden"
VERSIONS = sorted(path.name for path in FOLDER.iterdir() if path.is_dir() and path.name[0].isdigit())
RELATIVE = 1e-4
"""Of latents: what other processors and versions of ONNX Runtime may differ by."""


def test_every_version_has_one():
    assert [f"1.{minor}" for minor in range(SCHEMA_MINOR + 1)] == VERSIONS


@pytest.mark.parametrize("version", VERSIONS)
def test_small_and_untouched(version):
    """Sizes and digests as they were committed; no file but these."""
    folder = FOLDER / version / "artifact"
    value = json.loads((folder / "manifest.json").read_bytes())
    assert value["schema_version"] == version and core_digest(value) == value["digest"]
    assert not verify(folder).unlisted
    assert sum(path.stat().st_size for path in (FOLDER / version).rglob("*") if path.is_file()) < 300_000


@pytest.mark.parametrize("version", VERSIONS)
def test_golden_output(version):
    folder = FOLDER / version
    request = json.loads((folder / "request.json").read_text())
    with Sampler.load(folder / "artifact") as sampler:
        assert set(sampler.budgets) == {path.stem.removeprefix("latents-") for path in folder.glob("latents-*.npy")}
        for budget in sampler.budgets:
            expected = np.load(folder / f"latents-{budget}.npy", allow_pickle=False)
            found = sampler.sample(sampler.encode(request["prompt"]), budget=budget, seed=request["seed"])
            assert np.linalg.norm(found - expected) <= RELATIVE * np.linalg.norm(expected), budget
            pictures = np.round(255 * sampler(request["prompt"], budget=budget, seed=request["seed"]))
            expected = np.load(folder / f"pictures-{budget}.npy", allow_pickle=False)
            assert np.abs(pictures - expected).max() <= 1, budget
            if size := request.get("size"):
                encoded = sampler.encode(request["prompt"], max_sequence_length=size["max_sequence_length"])
                found = sampler.sample(encoded, budget=budget, seed=request["seed"], **size)
                expected = np.load(folder / f"sized-{budget}.npy", allow_pickle=False)
                assert np.linalg.norm(found - expected) <= RELATIVE * np.linalg.norm(expected), (budget, size)


def test_a_golden_request_is_run_again(tmp_path):
    folder = FOLDER / VERSIONS[-1] / "artifact"
    outcome = verify(folder, "golden")
    assert outcome.golden and outcome.golden.relative_error < 1e-5 < outcome.golden.max_relative_error
    copy = Path(shutil.copytree(folder, tmp_path / "a"))
    value = json.loads((copy / "manifest.json").read_bytes())
    value["golden"]["seed"] += 1
    value["digest"] = core_digest(value)
    (copy / "manifest.json").write_text(json.dumps(value))
    result = CliRunner().invoke(cli.main, ["verify", str(copy), "--level", "golden"])
    assert result.exit_code == 6 and "golden request: onnxruntime of this host" in result.stderr
    for level in LEVELS[:-1]:
        assert CliRunner().invoke(cli.main, ["verify", str(copy), "--level", level]).exit_code == 0


def test_an_old_version_is_read_as_the_newest():
    manifest = Artifact.open(FOLDER / "1.0" / "artifact").manifest
    assert manifest.schema_version == "1.0" and manifest.golden is None
    assert all(stage.external_data == () for stage in manifest.stages)
