"""Options are refused in one line that says what was received and what is expected, before anything is loaded."""

from __future__ import annotations

import pytest
import torch

from otcache.compiler.options import CompileOptions, parse_budgets, parse_guidance, split_prompts
from otcache.compiler.passes.compile import compile_model
from otcache.compiler.passes.session import versions
from otcache.compiler.workspace.progress import Reporter
from otcache.schemas.errors import ModelError, UsageError


def test_budgets_are_sorted_and_distinct():
    assert parse_budgets("16, 4,8,4") == (4, 8, 16)


@pytest.mark.parametrize("text", ["", "0", "4,-8", "4,x", "4.5", "4,,8"])
def test_budgets_must_be_whole_and_positive(text):
    with pytest.raises(UsageError, match=r"--budgets .*expected whole numbers"):
        parse_budgets(text)


def test_budgets_must_not_exceed_the_steps():
    with pytest.raises(UsageError, match=r"--budgets has 51: expected 1 … 50"):
        CompileOptions(model="shapes", budgets=(4, 51))


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"num_inference_steps": 0}, "--num-inference-steps is 0"),
        ({"trials": -2}, "--trials is -2: expected 0 or more"),
        ({"reference_budget": 60}, "--reference-budget is 60"),
        ({"anchor_budget": 30, "reference_budget": 20}, "the anchor's to be the lower one"),
        ({"guidance_scale": (6.0, 2.0)}, "--guidance-scale is 6.0:2.0"),
        ({"calibration_prompts": 0}, "--calibration-prompts is 0"),
        ({"height": 0}, "--height is 0"),
        ({"threads": 0}, "--threads is 0"),
    ],
)
def test_numbers_out_of_range(choice, message):
    with pytest.raises(UsageError, match=message):
        CompileOptions(model="shapes", **choice)


def test_guidance_is_a_number_or_a_range():
    assert parse_guidance("4") == (4.0, 4.0)
    assert parse_guidance("2:6") == (2.0, 6.0)
    assert CompileOptions(model="m", guidance_scale=(2.0, 6.0)).nominal_scale == 4.0
    for text in ("", "a", "1:2:3"):
        with pytest.raises(UsageError, match="--guidance-scale"):
            parse_guidance(text)


def test_default_policies_bracket_the_usual_budgets():
    options = CompileOptions(model="m")
    assert (options.anchor, options.reference) == (4, 20)
    small = CompileOptions(model="m", num_inference_steps=4, budgets=(2,))
    assert small.anchor < small.reference <= 4


def test_prompts_are_split_without_overlap():
    prompts = [f"p{i}" for i in range(64)]
    calibration, held_out = split_prompts(prompts, 24, 32)
    assert (len(calibration), len(held_out)) == (24, 32)
    assert not set(calibration) & set(held_out)
    calibration, held_out = split_prompts(["a", "b", "b", "c"], 24, 32)
    assert calibration == ["a", "b"] and held_out == ["c"]
    with pytest.raises(UsageError, match="at least 2"):
        split_prompts(["same", "same"], 24, 32)


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_are_torchs_while_it_compiles_and_part_of_the_versions(threads, tmp_path):
    class Seen(Reporter):
        def on(self, name, description):
            self.threads, self.versions = torch.get_num_threads(), versions()
            return super().on(name, description)

    before, seen = torch.get_num_threads(), Seen()
    torch.set_num_threads(3)
    try:
        with pytest.raises(ModelError, match="was not found"):
            compile_model(CompileOptions(model="no model", threads=threads, output=tmp_path / "made"), seen)
        assert seen.threads == threads and seen.versions["torch threads"] == str(threads)
        assert torch.get_num_threads() == 3, "as it was"
    finally:
        torch.set_num_threads(before)
