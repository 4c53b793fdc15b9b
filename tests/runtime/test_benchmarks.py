"""The scripts that measure engines run, and what they say of this host is whole."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "benchmarks"
NEWEST = max((SCRIPTS.parent / "golden").glob("1.*"), key=lambda path: int(path.name[2:])) / "artifact"


def figures(tmp_path, script, *arguments):
    target = tmp_path / "found.json"
    line = [sys.executable, str(SCRIPTS / script), *map(str, arguments), "-o", str(target)]
    printed = subprocess.run(line, check=True, capture_output=True, text=True).stdout
    found = json.loads(target.read_text())
    assert json.loads(printed) == found and found["versions"] and "name" not in found["host"]
    return found


def test_blocks_one_by_one_and_together(tmp_path):
    steps = figures(tmp_path, "granularity.py", NEWEST, "--images", "1", "--rounds", "1")["images"]["1"]
    assert [entry["sessions_for_blocks"] for entry in steps.values()] == [2, 1, 1]
    assert all(entry["max_relative_difference"] < 1e-5 and entry["step_ms"] > 0 for entry in steps.values())


@pytest.mark.long
def test_the_resident_loop(tmp_path):
    """On a GPU, where there is one; else at reduced size in this host's memory, which it says."""
    pytest.importorskip("torch")
    found = figures(tmp_path, "resident.py", "--rounds", "1")
    assert ("nothing here was executed on a GPU" in found["what"]) == (found["device"] == "none")
    assert max(found["agreement_with_the_cpu"].values()) < 1e-4
    cost = found["host_cost_at_flux_blocks"]
    assert cost["block"]["launches_a_step"] > 57 > cost["trunk"]["launches_a_step"]
