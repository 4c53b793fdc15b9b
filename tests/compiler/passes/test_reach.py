"""A quality as the request of a compile: the smallest budget that reaches it, through the command line."""

from __future__ import annotations

import json
import re

import pytest
from command import COMPILE, otc

from otcache.compiler.passes.reach import smallest
from otcache.runtime.artifact.reader import Artifact

SMALL = (*COMPILE[2:], "--engines", "none", "--payload", "output")
"""A compile of programs alone, whose budgets are to be found."""


@pytest.fixture
def compile_for(tiny_flux_folder, workspace, tmp_path):
    def run(*options):
        output = str(tmp_path / "made")
        return otc("compile", str(tiny_flux_folder), *SMALL, *options, "-o", output, workspace=workspace)

    return run


@pytest.mark.parametrize("most", [1, 2, 7, 49])
@pytest.mark.parametrize("start", [1, 2, 4])
def test_smallest(start, most):
    for wanted in range(1, most + 2):
        asked = []

        def reaches(budget, wanted=wanted, asked=asked):
            assert 1 <= budget <= most
            asked.append(budget)
            return budget >= wanted

        assert smallest(reaches, start, most) == (wanted if wanted <= most else None)
        assert len(asked) == len(set(asked)) <= 12, "nothing is asked twice"


def tried(stderr):
    """Decibels by budget, as the note about a target lists them."""
    listed = re.search(r"tried (.*); [\d,]+ model evaluations", stderr).group(1)
    return {int(budget): float(value) for budget, value in re.findall(r"(\d+): ([\d.]+) dB", listed)}


def test_the_smallest_budget_is_compiled(compile_for, tmp_path):
    result = compile_for("--target", "psnr>=50")
    assert result.exit_code == 0, result.output
    manifest = Artifact.open(tmp_path / "made").manifest
    found, full = manifest.budgets
    values, budget = tried(result.stderr), int(found)
    assert full == "full" and 1 < budget < 7 and budget in values and budget - 1 in values
    assert all((value >= 50) == (each >= budget) for each, value in values.items()), "one less was tried, and misses"
    assert manifest.program(found).quality.psnr_db.mean == pytest.approx(values[budget], abs=0.005)
    costs = {cost.name: cost.full_runs for cost in manifest.costs}
    others = sum(each for each in values if each != budget)  # evaluations of one held-out prompt
    assert costs["target"] == pytest.approx(others * 3 / (8 * 8), abs=1e-4), "3 held out; 8 full runs of 8 steps"


def test_several_targets_beside_budgets(compile_for, tmp_path):
    """The worst prompt, several conditions, and a budget that was asked for by number."""
    result = compile_for("--target", "worst psnr>=30, ssim>=0.9", "--target", "psnr>=50", "--budgets", "6", "--json")
    assert result.exit_code == 0, result.output
    manifest = Artifact.open(tmp_path / "made").manifest
    low, high, given, _ = manifest.budgets
    assert given == "6" and int(low) < int(high) < 6
    assert manifest.program(low).quality.psnr_db.worst >= 30 > manifest.program(low).quality.ssim.mean * 30 - 0.1
    events = [json.loads(line) for line in result.stderr.splitlines()]
    passes = [event for event in events if event["event"] == "pass" and event["name"] == "target"]
    assert [each["budget"] for each in passes] == [int(low), int(high)]
    assert passes[0]["budgets_tried"] >= 1 and passes[0]["evaluations"] >= 0
    assert set(json.loads(result.stdout)["budgets"]) == {low, high, "6"}


def test_a_target_that_is_not_reached_says_the_best(compile_for, tmp_path):
    result = compile_for("--target", "psnr>=99.5")
    assert result.exit_code == 3 and not (tmp_path / "made").exists()
    (line,) = result.stderr.strip().splitlines()
    assert re.fullmatch(
        r"Error: target psnr>=99.5 is not reached within 7 evaluations, of 8 that the full run makes: the best was "
        r"psnr \d\d\.\d\d dB at 7 evaluations: ask for less, or serve budget full",
        line,
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--target", "psnr<=35"], "--target has 'psnr<=35'"),
        (["--target", "psnr>=35", "--search-size", "8x8"], "--target with --search-size"),
        (["--target", "psnr>=35", "--dry-run"], "--dry-run with --target"),
        (["--target", "psnr>=35", "--target", "sm_89"], "without a backend that has targets"),
    ],
)
def test_what_cannot_be_combined_is_refused(compile_for, options, message):
    result = compile_for(*options)
    assert result.exit_code == 2 and message in result.stderr
