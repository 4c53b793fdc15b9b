"""Qualities that are asked for: how they are written, when they hold, and which budget they come to."""

from __future__ import annotations

from pathlib import Path

import pytest

from otcache.schemas.errors import UsageError
from otcache.schemas.manifest import BudgetProgram, Quality
from otcache.schemas.program import Program
from otcache.schemas.targets import TIERS, measured_of, parse_target, smallest_program, target_of_quality, tiers_of


def quality(psnr, worst, ssim=0.9):
    def statistic(mean, worst):
        return {"mean": mean, "std": 1.0, "worst": worst}

    return Quality.model_validate(
        {
            "psnr_db": statistic(psnr, worst),
            "ssim": statistic(ssim, ssim - 0.2),
            "relative_latent_error": statistic(0.1, 0.2),
        }
    )


def entry(budget, *figures):
    return BudgetProgram.model_construct(
        budget=budget, program=Program.model_construct(), quality=quality(*figures) if figures else None
    )


LISTED = [entry("full"), entry("16", 50.5, 35.0), entry("4", 26.0, 18.0), entry("8", 41.0, 29.0, 0.99), entry("2")]


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("psnr>=26", "4"),
        ("mean psnr >= 26.1", "8"),
        ("worst psnr>=29", "8"),
        ("worst psnr>=29.5", "16"),
        ("psnr>=20, ssim>=0.95", "8"),
        ("psnr>=45, ssim>=.95", None),
        ("worst ssim>=0.75", "8"),
        ("psnr>=60", None),
        ("lpips<=1", None),
        ("high", "8"),
        ("best", "16"),
    ],
)
def test_the_smallest_budget_that_reaches_a_target(text, budget):
    found = smallest_program(LISTED, target_of_quality(text, "quality"))
    assert (found and found.budget) == budget


def test_tiers_rise_and_name_what_is_served():
    bounds = [parse_target(text, "tier").conditions[0].bound for text in TIERS.values()]
    assert bounds == sorted(set(bounds))
    served = {name: found and found.budget for name, found in tiers_of(LISTED[:-2]).items()}
    assert served == {"draft": "4", "good": "16", "high": "16", "best": "16"}
    assert set(tiers_of([entry("full")]).values()) == {None}


def test_the_page_has_the_tiers():
    page = (Path(__file__).parents[2] / "runtime" / "README.md").read_text(encoding="utf-8")
    for name, text in TIERS.items():
        (condition,) = parse_target(text, "tier").conditions
        assert (condition.metric, condition.over) == ("psnr", "mean")
        assert f"| `{name}` | {condition.bound:g} dB |" in page


def test_what_was_measured_is_told():
    target = parse_target("psnr>=35,worst ssim>=0.5, lpips<=0.10", "--target")
    assert target.text == "psnr>=35, worst ssim>=0.5, lpips<=0.1" and target.metrics == {"psnr", "ssim", "lpips"}
    assert target.describe(measured_of(quality(36.123, 30.0))) == "36.12 dB, worst 0.7000, not measured"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("psnr=35", "expected conditions such as psnr>=35"),
        ("fid<=3", "expected conditions such as"),
        ("psnr>=35,", "expected conditions such as"),
        ("psnr>=1e2", "expected conditions such as"),
        ("psnr<=35", "of psnr and ssim more is better, of lpips less"),
        ("lpips>=0.1", "of lpips less"),
        ("psnr>=101", "a bound from 0 to 100"),
        ("ssim>=35", "a bound from -1 to 1"),
        ("psnr>=35\n\x1b[2J", "expected conditions such as"),
    ],
)
def test_targets_that_are_none_are_refused_in_one_line(text, message):
    with pytest.raises(UsageError, match="--target ") as caught:
        parse_target(text, "--target")
    assert message in str(caught.value) and str(caught.value).isprintable()


def test_a_quality_is_a_tier_or_a_target():
    with pytest.raises(UsageError, match="quality is 'finest': expected one of draft, good, high, best, or a target"):
        target_of_quality("finest", "quality")
