"""What `otc inspect` prints where there is little room, or no terminal at all."""

from __future__ import annotations

import pytest
import small_artifact as small
from click.testing import CliRunner

from otcache.runtime.cli import main as cli


@pytest.mark.parametrize("columns", ["40", "60", "80", "200"])
@pytest.mark.parametrize("options", [[], ["--memory"]])
def test_no_name_and_no_digest_is_cut(artifact_folder, columns, options):
    value = small.read_manifest(artifact_folder)
    lines = CliRunner(env={"COLUMNS": columns}).invoke(cli.main, ["inspect", str(artifact_folder), *options])
    assert lines.exit_code == 0 and "…" not in lines.stdout
    words = set(lines.stdout.split())
    if options:
        assert {"velocity", "latents", "text"} <= words
        return
    assert value["digest"] in words
    for stage in value["stages"]:
        assert {stage["name"], *(tensor["name"] for side in ("inputs", "outputs") for tensor in stage[side])} <= words
