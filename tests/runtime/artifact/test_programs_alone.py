"""An artifact of programs alone: read, shown, checked and packed as any; whatever runs engines says what is missing."""

from __future__ import annotations

import json
import shutil

import pytest
import small_artifact as small
from click.testing import CliRunner

from otcache.runtime import ArtifactError, Sampler
from otcache.runtime.artifact.reader import Artifact
from otcache.runtime.cli import main as cli
from otcache.schemas.manifest_file import seal


@pytest.fixture
def alone(artifact_folder, tmp_path):
    """The small artifact without stages, engines and their files."""
    folder = tmp_path / "alone"
    folder.mkdir()
    value = small.read_manifest(artifact_folder)
    for name in ("stages", "features", "tokenizers", "engines", "files"):
        value[name] = []
    value["golden"] = None
    value["schema_version"] = "1.8"
    (folder / "manifest.json").write_text(json.dumps(seal(value)))
    return folder


def otc(*arguments):
    return CliRunner().invoke(cli.main, [*map(str, arguments)])


def test_it_is_read_shown_checked_and_packed(alone, tmp_path):
    manifest = Artifact.open(alone).manifest
    assert manifest.programs_alone and manifest.budgets
    for line in (["inspect", alone], ["inspect", alone, "--json"], ["verify", alone]):
        result = otc(*line)
        assert result.exit_code == 0, result.output
    assert otc("pack", alone, "-o", tmp_path / "a.otc").exit_code == 0
    assert otc("unpack", tmp_path / "a.otc", "-o", tmp_path / "b").exit_code == 0
    assert Artifact.open(tmp_path / "b").manifest == manifest


@pytest.mark.parametrize(
    "line",
    [
        ["run", "--budget", "2", "--prompt", "x"],
        ["bench"],
        ["verify", "--level", "host"],
        ["build-engines", "--backend", "tensorrt-rtx", "--target", "sm_89"],
    ],
)
def test_what_runs_engines_says_what_is_missing(alone, line):
    result = otc(line[0], alone, *line[1:])
    assert result.exit_code == 4
    assert "this artifact holds programs alone: expected engines: add them" in result.stderr
    assert "otc export" in result.stderr and len(result.stderr.strip().splitlines()) == 1


def test_a_sampler_says_so_too(alone):
    with pytest.raises(ArtifactError, match="programs alone"):
        Sampler.load(alone)


@pytest.mark.parametrize("name", ["features", "tokenizers", "engines"])
def test_it_has_nothing_that_goes_with_stages(artifact_folder, alone, name):
    value = json.loads((alone / "manifest.json").read_text())
    whole = small.read_manifest(artifact_folder)
    if not whole[name]:
        pytest.skip(f"the small artifact has no {name}")
    value[name] = whole[name]
    (alone / "manifest.json").write_text(json.dumps(seal(value)))
    with pytest.raises(ArtifactError, match=f"{name}: expected none|not listed|names no stage"):
        Artifact.open(alone)
    shutil.rmtree(alone)
