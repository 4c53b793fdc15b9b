"""`otc compare` through the command line, on a tiny pipeline: what it writes, what its verdicts follow from, and where
it goes on.
"""

from __future__ import annotations

import dataclasses
import json

import pytest
from click.testing import CliRunner

from otcache.compiler.compare.cells import AHEAD_DB, DEFAULT, Cell, Comparison, Spread, budget_within_blocks, verdict_at
from otcache.runtime.cli.main import main

AGAINST = "euler,uniform reuse,fora,meancache,otcache (paper)"


def compare(folder, output, workspace, *options):
    arguments = [
        "compare",
        str(folder),
        "--budgets",
        "3,8",
        "--against",
        AGAINST,
        "--num-inference-steps",
        "10",
        "--trials",
        "4",
        "--calibration-prompts",
        "4",
        "--evaluation-prompts",
        "3",
        "-o",
        str(output),
        *options,
    ]
    return CliRunner().invoke(main, arguments, env={"OTC_CACHE": str(workspace)})


@pytest.fixture(scope="module")
def compared(tiny_flux_folder, workspace, tmp_path_factory):
    output = tmp_path_factory.mktemp("compared")
    result = compare(tiny_flux_folder, output, workspace)
    assert result.exit_code == 0, result.output
    return output, result.output


@pytest.fixture(scope="module")
def comparison(compared):
    return Comparison.from_json(json.loads((compared[0] / "comparison.json").read_text()))


def test_every_method_is_measured_or_says_why(comparison):
    rows = {(row.method, row.budget) for row in (*comparison.cells, *comparison.skipped)}
    assert rows >= {(name, budget) for name in (*AGAINST.split(","), DEFAULT) for budget in (3, 8)}
    assert all(cell.nfe_mean <= cell.budget + 1e-9 and cell.seconds > 0 for cell in comparison.cells)


def test_json_comes_back_as_it_went(comparison, compared):
    again = Comparison.from_json(json.loads(json.dumps(comparison.json())))
    assert again == comparison


def test_verdicts_follow_from_the_cells(comparison):
    assert [verdict.budget for verdict in comparison.verdicts] == [3, 8]
    for verdict in comparison.verdicts:
        cells = {cell.method: cell for cell in comparison.cells if cell.budget == verdict.budget}
        own = cells.pop(DEFAULT)
        best = max(cells.values(), key=lambda cell: cell.psnr_db.mean)
        assert (verdict.best_peer, verdict.ahead_db) == (best.method, own.psnr_db.mean - best.psnr_db.mean)
        ssim = max(cell.ssim.mean for cell in cells.values())
        assert verdict.must == (verdict.ahead_db >= AHEAD_DB and own.ssim.mean >= ssim)


def test_a_method_that_gets_worse_turns_the_verdict(comparison):
    def lowered(cell, by):
        spread = Spread(mean=cell.psnr_db.mean - by, std=cell.psnr_db.std, worst=cell.psnr_db.worst - by)
        return dataclasses.replace(cell, psnr_db=spread)

    cells = [lowered(cell, 1000.0) if cell.method == DEFAULT else cell for cell in comparison.cells]
    verdict = verdict_at(cells, 8)
    assert not verdict.must and not verdict.aim and not verdict.worst_within
    assert verdict.ahead_db == pytest.approx(verdict_at(comparison.cells, 8).ahead_db - 1000.0)


def cell(method, budget, psnr_db, blocks):
    spread = Spread(mean=psnr_db, std=0.0, worst=psnr_db)
    common = {"group": "cache", "nfe_mean": float(budget), "nfe_worst": float(budget), "lpips": None, "seconds": 1.0}
    return Cell(
        method=method,
        budget=budget,
        psnr_db=spread,
        ssim=spread,
        setting="",
        full_runs=0.0,
        blocks_mean=blocks,
        **common,
    )


def test_blocks_that_run_at_every_step_are_counted():
    """With 8 blocks, the first of which runs at all 50 steps, 16 evaluations are 20.25 full runs of the blocks."""
    own, peer = cell(DEFAULT, 16, 50.0, 16.0), cell("cache", 16, 52.0, 16 + 34 / 8)
    fewer = budget_within_blocks(peer, 50)
    assert fewer == 11 and fewer + (50 - fewer) / 8 <= 16 < fewer + 1 + (49 - fewer) / 8
    verdict = verdict_at([own, peer, cell("cache", fewer, 45.0, fewer + (50 - fewer) / 8)], 16)
    assert verdict.ahead_db == pytest.approx(-2.0) and verdict.blocks_ahead_db == pytest.approx(5.0)
    assert budget_within_blocks(own, 50) is None and budget_within_blocks(cell("cache", 4, 9.0, 9.75), 50) is None


def test_the_claim_has_every_way_at_every_budget(comparison):
    ways = {"interpolated, law in 1/B", "graph", "search, 8 trials", "search, 80 trials"}
    for budget in (3, 8):
        claims = {claim.way: claim for claim in comparison.claims if claim.budget == budget}
        assert claims.keys() >= ways
        assert all(len(claim.schedule) == budget and claim.schedule[0] == 0 for claim in claims.values())
        assert claims["interpolated, law in 1/B"].w2_to_interpolated == pytest.approx(0.0, abs=1e-9)


def test_robustness_holds_one_program_against_peers_of_each_scale(comparison):
    robustness = comparison.robustness
    assert [row.guidance_scale for row in robustness.at_scales] == [2.0, 4.0, 6.0]
    peers = {cell.method for cell in comparison.cells} - {DEFAULT}
    assert {row.best_peer for row in robustness.at_scales} <= peers
    counts = [row.calibration_prompts for row in robustness.calibrated]
    assert counts[0] == 4 and counts == sorted(set(counts))


def test_files_are_there_and_say_the_same(comparison, compared):
    folder, printed = compared
    assert (folder / "comparison.png").read_bytes().startswith(b"\x89PNG")
    text = (folder / "comparison.md").read_text()
    for cell in comparison.cells:
        if cell.budget in comparison.budgets:
            assert f"{cell.psnr_db.mean:.1f}" in text
    assert "Not measured" in text or not comparison.skipped
    assert all(cell.blocks_mean is not None for cell in comparison.cells) and "at equal blocks" in text
    assert f"B = 8: {comparison.verdicts[1].ahead_db:+.1f} dB" in printed


def test_cells_and_sections_say_what_they_cost(comparison, compared):
    assert all(cell.spent.seconds > 0 for cell in comparison.cells)
    least = {cell.method: cell.spent.evaluations for cell in comparison.cells if cell.budget == 8}
    assert all(spent >= 3 * (8 - 1) for spent in least.values())  # three held-out prompts; a first output may be known
    assert set(comparison.sections) == {"schedules of several ways", "other guidance, other numbers of prompts"}
    assert comparison.published == {"meancache": (10, 50)} and comparison.outside_published("meancache", 1)
    assert "What this comparison cost" in (compared[0] / "comparison.md").read_text()


@pytest.mark.long
def test_a_comparison_goes_on_where_it_stopped(tiny_flux_folder, workspace, compared, tmp_path):
    again = compare(tiny_flux_folder, tmp_path / "again", workspace, "--json")
    assert again.exit_code == 0, again.output
    first = json.loads((compared[0] / "comparison.json").read_text())
    assert (
        json.loads((tmp_path / "again" / "comparison.json").read_text()) == first
    )  # wall times too: nothing ran twice


def test_nothing_is_overwritten_without_force(tiny_flux_folder, workspace, compared):
    refused = compare(tiny_flux_folder, compared[0], workspace)
    assert refused.exit_code == 2 and "--force" in refused.output


def test_an_unknown_method_lists_the_known(tiny_flux_folder, workspace, tmp_path):
    refused = CliRunner().invoke(
        main, ["compare", str(tiny_flux_folder), "--against", "magic", "-o", str(tmp_path / "x")]
    )
    assert refused.exit_code == 2 and "teacache" in refused.output and not (tmp_path / "x").exists()
