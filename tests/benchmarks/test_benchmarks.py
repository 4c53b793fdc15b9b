"""Every script of this folder runs, as the pages name it and at a tiny size, and what it prints is whole."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pages
import pytest
from tables import TABLES, marks, write_tables

HERE = Path(__file__).parent
NEWEST = max((HERE.parent / "golden").glob("1.*"), key=lambda path: int(path.name[2:])) / "artifact"
SCRIPTS = sorted(
    {path.name for path in HERE.glob("*.py") if '__name__ == "__main__"' in path.read_text("utf-8")}
    - {Path(__file__).name}
)
PREFIX = "python tests/benchmarks/"
TINY = {
    "effort.py": "--efforts quick",
    "granularity.py": "--images 1 --rounds 1",
    "hosts.py": "--rounds 1",
    "memory.py": "--heads 1 --double 1 --single 1 --stored float32 --dtype float32 --directly",
    "resident.py": "--rounds 1",
    "residual_positions.py": "shapes --prompts 1",
    "search_size.py": "--calibration-prompts 4 --evaluation-prompts 1",
    "serve_load.py": "--seconds 1 --clients 20",
    "serving.py": "--images 1 --rounds 1",
    "sessions.py": "--images 1 --rounds 1 --threads 1",
    "soak.py": "--requests 100",
}
"""Options that make a script small; others are small as they are."""
LINES = [
    line for page in pages.NAMES for block in pages.blocks(page) for _, line in pages.commands(block) if PREFIX in line
]
ON_PAGES = {Path(shlex.split(line, comments=True)[1]).name for line in LINES}


def run(line: str) -> tuple[str, int]:
    """What a command of the pages prints on stdout when it is made tiny, and its exit code."""
    _, script, *arguments = shlex.split(line.replace("artifacts/shapes", str(NEWEST)), comments=True)
    command = [sys.executable, str(pages.ROOT / script), *arguments, *shlex.split(TINY.get(Path(script).name, ""))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.stdout, done.stderr
    return done.stdout, done.returncode


def figures(line: str) -> dict[str, Any]:
    printed, code = run(line)
    assert code == 0, printed
    return json.loads(printed)


def line_of(script: str) -> str:
    """The one command of the pages that runs a script, however often it stands there.

    Without the file that it writes: what is kept was measured at full size.
    """
    (line,) = {line.split("  #")[0].split(" -o ")[0].strip() for line in LINES if f"/{script}" in line}
    return line


def test_options_are_of_scripts_that_are_here():
    assert set(TINY) <= set(SCRIPTS) and set(SCRIPTS) >= ON_PAGES >= set(TINY)


def test_budgets_against_the_full_program_and_stages_against_one_graph():
    found = figures(line_of("serving.py"))
    assert set(found["budgets"]) == {"2", "3"} and all(one["ratio"] > 0 for one in found["budgets"].values())
    assert found["chain_against_single_graph"]["max_relative_difference"] < 1e-5


def test_a_server_under_load():
    pytest.importorskip("starlette")
    found = figures(next(line for line in LINES if "serve_load.py" in line and "--max-batch" in line))
    assert found["pictures_a_second"] > 0 and found["latency_s"]["p50"] <= found["latency_s"]["p99"]
    assert set(found["statuses"]) <= {"200", "503"} and found["refused_503"] == found["statuses"].get("503", 0)
    assert found["exit_code"] == found["logged_lines"] == 0 and found["memory_bytes"]["most"] > 1e6


def test_sessions():
    found = figures(line_of("sessions.py"))
    assert all(found[name]["ms"] > 0 for name in ("as_served", "spinning", "own_arenas"))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_soak():
    found = figures(line_of("soak.py"))
    assert found["served"] + found["cancelled"] == 100 and found["threads"] == [2, 1]


def test_blocks_one_by_one_and_together():
    found = figures(line_of("granularity.py"))
    assert found["versions"] and "name" not in found["host"]
    steps = found["images"]["1"]
    assert [entry["sessions_for_blocks"] for entry in steps.values()] == [2, 1, 1]
    assert all(entry["max_relative_difference"] < 1e-5 and entry["step_ms"] > 0 for entry in steps.values())


def test_figures_are_kept_in_a_file(tmp_path):
    printed, _ = run(f"{line_of('granularity.py').split('#')[0]} -o {tmp_path / 'kept.json'}")
    assert json.loads((tmp_path / "kept.json").read_text("utf-8")) == json.loads(printed)


@pytest.mark.slow
def test_the_resident_loop():
    """On a GPU, where there is one; else at reduced size in this host's memory, which it says."""
    pytest.importorskip("torch")
    found = figures(line_of("resident.py"))
    assert found["versions"] and "name" not in found["host"]
    assert ("nothing here was executed on a GPU" in found["what"]) == (found["device"] == "none")
    assert max(found["agreement_with_the_cpu"].values()) < 1e-4
    cost = found["host_cost_at_flux_blocks"]
    assert cost["block"]["launches_a_step"] > 57 > cost["trunk"]["launches_a_step"]


@pytest.mark.slow
def test_the_drop_in_scheduler_in_a_pipeline():
    pytest.importorskip("torch")
    found = figures(line_of("hosts.py"))
    assert found["model"] == "flux" and set(found["seconds"]) == {"full", "11", "8"}
    assert set(found["speed_up"]) == {"11", "8"} and all(speed > 0 for speed in found["speed_up"].values())


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_memory_of_cut_and_export():
    """A model of a few megabytes takes more than its bound, which is one for billions of parameters; it says so."""
    pytest.importorskip("torch")
    printed, code = run(line_of("memory.py"))
    found = json.loads(printed.splitlines()[-1])
    assert set(found["peak_bytes"]) == {"cut", "export"}
    assert code == int(max(found["peak_bytes"].values()) > found["allowed_bytes"])


@pytest.mark.slow
@pytest.mark.parametrize("script", sorted(set(SCRIPTS) - ON_PAGES))
def test_a_script_that_is_on_no_page_runs(script):
    printed, code = run(f"{PREFIX}{script}")
    assert code == 0 and [json.loads(line) for line in printed.splitlines() if line.startswith("{")], printed


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_prompts():
    """Twelve samples more would be 80 MB: a seventh of what this compile takes."""
    pytest.importorskip("torch")
    printed, code = run(f"{PREFIX}calibration_memory.py prompts --side 512 --num-inference-steps 8")
    found = json.loads(printed)
    assert code == 0 and found["holds"] and found["apart"] <= 0.05, found
    assert set(found["compiles"]) == {"4", "16"}


@pytest.mark.slow
def test_fidelity_against_effort():
    """What a quick compile spends is its own bound at most, and its curve is drawn."""
    pytest.importorskip("torch")
    from otcache.compiler.effort import EFFORTS

    found = figures(line_of("effort.py"))
    quick = found["efforts"]["quick"]
    assert 1 < quick["full_runs"] <= EFFORTS["quick"].full_runs
    assert quick["budgets"]["4"]["psnr_db"] < quick["budgets"]["8"]["psnr_db"] < quick["budgets"]["16"]["psnr_db"]


def test_evaluations_that_walks_share():
    pytest.importorskip("torch")
    found = figures(line_of("shared_evaluations.py"))
    bounds = found["full_runs_at_most"]
    assert set(bounds) == {"quick", "standard", "thorough"}
    assert all(0 < each[way]["after"] <= each[way]["before"] for each in bounds.values() for way in ("auto", "output"))


@pytest.mark.slow
def test_residuals_on_a_quarter_of_the_positions():
    pytest.importorskip("torch")
    found = figures(line_of("residual_positions.py"))
    assert set(found["models"]) == {"shapes"}


@pytest.mark.slow
def test_what_a_search_size_costs_and_saves():
    pytest.importorskip("torch")
    found = figures(line_of("search_size.py"))
    served, small = found["ways"].values()
    flops = found["flops_of_an_evaluation"]
    assert 0 < flops[" at 32x32"] < flops[""] and small["flops"] > 0 and served["flops"] > 0
    assert set(small["budgets"]) == set(served["budgets"]) == {"4", "8", "16"}


def test_a_pages_tables_are_those_of_the_kept_runs():
    page = (pages.ROOT / "compiler/README.md").read_text("utf-8")
    assert all(marks(name)[0] in page for name in TABLES)
    assert write_tables(page) == page


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_written_by_their_command(name, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("\n".join(("before", *marks(name), "after")), encoding="utf-8")
    command = [sys.executable, str(HERE / "tables.py"), str(page)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert TABLES[name]() in page.read_text("utf-8")
