"""What a comparison's words say, from values made here."""

from __future__ import annotations

from dataclasses import replace

from otcache.artifacts.comparisons import read_before
from otcache.compiler.compare.cells import AtScale, Claim, Robustness, Spent, Spread
from otcache.compiler.compare.table import (
    OUTSIDE,
    claim_words,
    fidelity_table,
    lpips_parts,
    markdown,
    published_parts,
    robustness_tables,
    scale_words,
    spent_parts,
    verdict_table,
)


def claim(budget, way, psnr_db):
    schedule = tuple(range(budget))
    return Claim(
        budget=budget, way=way, schedule=schedule, psnr_db=psnr_db, ssim=0.9, rollouts=1, w2_to_interpolated=0.0
    )


def spread(mean, worst):
    return Spread(mean=mean, std=1.0, worst=worst)


def at_scale(scale, own, peer, ssim=0.0):
    return AtScale(
        guidance_scale=scale,
        psnr_db=spread(own, own - 5.0),
        ssim=spread(0.9 + ssim, 0.8),
        best_peer="lemica",
        best_peer_psnr_db=spread(peer, peer - 8.0),
        best_peer_ssim=spread(0.9, 0.7),
    )


def test_a_way_is_held_against_every_search():
    words = claim_words(
        [
            claim(4, "interpolated", 20.0),
            claim(4, "search, 8 trials", 20.4),
            claim(4, "search, 80 trials", 23.0),
            claim(8, "interpolated", 30.0),
            claim(8, "search, 8 trials", 28.0),
            claim(8, "search, 80 trials", 31.0),
        ]
    )
    assert words.splitlines()[-1] == (
        "* interpolated: matches the search, 8 trials only. +0.8 dB to the search, 8 trials (-0.4 at 4, +2.0 at 8); "
        "-2.0 dB to the search, 80 trials (-3.0 at 4, -1.0 at 8)."
    )


def test_a_way_that_is_missing_at_a_budget_is_left_out_of_its_mean():
    words = claim_words([claim(4, "best weight", 20.0), claim(4, "search", 19.0), claim(8, "search", 90.0)])
    assert words.endswith("* best weight: matches every search. +1.0 dB to the search (+1.0 at 4).")


def test_a_way_may_match_no_search():
    assert "law: matches no search." in claim_words([claim(4, "law", 18.0), claim(4, "search", 19.0)])


def test_the_advantage_holds_only_where_it_does_at_every_scale():
    held = [at_scale(2.0, 30.0, 29.0), at_scale(6.0, 30.0, 29.4)]
    assert scale_words(held).startswith("The advantage holds at every one of them: +0.6 dB")
    assert "not hold at guidance 2 and 4" in scale_words(
        [at_scale(2.0, 30.0, 29.6), at_scale(4.0, 30.0, 20.0, ssim=-0.1)]
    )


def test_the_worst_prompts_are_held_against_each_other():
    tables = robustness_tables(
        Robustness(budget=8, guidance_range=(2.0, 6.0), at_scales=(at_scale(2.0, 30.0, 29.0),), calibrated=())
    )
    assert "| 2 | 30.0 (0.900) | lemica 29.0 (0.900) | +1.0 dB | +4.0 dB |" in tables[1]


def test_lpips_is_a_table_of_its_own_where_it_was_measured():
    kept = read_before()["shapes"]
    assert lpips_parts(kept) == [] and "LPIPS" not in markdown(kept)
    values = {"otcache": 0.0123, "euler": 0.2}
    measured = replace(kept, cells=tuple(replace(cell, lpips=values.get(cell.method)) for cell in kept.cells))
    lead, table = lpips_parts(measured)
    assert "lower is closer" in lead and len(table.splitlines()) == 4
    columns = len(kept.budgets)
    assert table.splitlines()[2] == "| **otcache** |" + " **0.0123** |" * columns
    assert table.splitlines()[3] == "| euler |" + " 0.2000 |" * columns
    assert table in markdown(measured)


def test_what_is_outside_a_published_range_is_marked():
    kept = read_before()["shapes"]
    budget, peer = kept.budgets[0], kept.verdicts[0].best_peer
    steps = kept.num_inference_steps
    marked = replace(kept, published={peer: (budget + 1, steps), "euler": (1, None)})
    assert marked.outside_published(peer, budget) and not marked.outside_published("euler", budget)
    assert not replace(kept, published={peer: (budget + 1, None)}).outside_published(peer, budget + 1)
    assert published_parts(kept) == []
    (words,) = published_parts(marked)
    assert words.endswith(f"at least {peer} {budget + 1} of {steps}.")
    row = next(line for line in fidelity_table(marked).splitlines() if line.startswith(f"| {peer} |"))
    assert [OUTSIDE in each for each in row.split("|")[2:-1]] == [each <= budget for each in kept.budgets]
    assert OUTSIDE in verdict_table(marked).splitlines()[2] and words in markdown(marked)
    assert OUTSIDE not in fidelity_table(kept)


def test_the_cost_is_the_sum_of_what_was_measured():
    kept = read_before()["shapes"]
    assert spent_parts(replace(kept, cells=tuple(replace(each, spent=None) for each in kept.cells))) == []
    first, *others = (replace(each, spent=None) for each in kept.cells)
    counted = replace(
        kept,
        cells=(replace(first, spent=Spent(seconds=5400.0, evaluations=1234.0)), *others),
        sections={"other guidance": Spent(seconds=1800.0, evaluations=10.0)},
        threads=2,
    )
    (words,) = spent_parts(counted)
    assert "on 2 threads" in words and "cells 1.50 hours and 1,234 evaluations" in words
    assert "other guidance 0.50 hours and 10 evaluations" in words and f"({len(others)} of" in words
