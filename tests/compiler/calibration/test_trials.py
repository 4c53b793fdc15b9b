"""What a trial is worth, and what programs of one schedule share."""

from __future__ import annotations

import pytest
import torch
from equations import normal, samples_from_equation
from hypothesis import given
from hypothesis import strategies as st

from otcache.compiler.calibration.trials import MEMORY, SATURATED_SSIM, Calibration, ssim_score
from otcache.compiler.schedules.payloads import OTHER_MEMORIES, OutputFamily
from otcache.compiler.workspace.ledger import Ledger

SAMPLES = 5
SSIM = st.floats(-1.0, 1.0)
PSNR = st.floats(0.0, 100.0)


@given(SSIM, PSNR, SSIM, PSNR)
def test_ssim_decides_until_it_is_saturated_and_then_psnr_does(ssim, psnr, other_ssim, other_psnr):
    first, second = ssim_score(ssim, psnr), ssim_score(other_ssim, other_psnr)
    assert first <= 1.0 and (first >= SATURATED_SSIM) == (ssim >= SATURATED_SSIM)
    if min(ssim, other_ssim) < SATURATED_SSIM:
        assert (first < second) == (ssim < other_ssim)
    else:
        assert (first <= second) or psnr > other_psnr


def test_nothing_is_no_score():
    assert ssim_score(float("nan"), 50.0) != ssim_score(float("nan"), 50.0)


def calibration_of(folder, **fields):
    def rate(x, step, k):
        return -k * x * (1 + (step > 8) * 6.0) + 0.5 * torch.sin(3 * x.flip(1))

    samples = samples_from_equation(folder, normal(SAMPLES, 4, 3), rate, k=torch.linspace(0.5, 2.0, SAMPLES))
    return Calibration(samples=samples, table=samples.evaluator.table, objective="psnr", ledger=Ledger(), **fields)


@pytest.mark.parametrize("order", [(2, 5, 4, 3), (4, 3, 2, 5), (5, 4, 3, 2)])
def test_programs_of_one_schedule_share_what_they_have_in_common_whatever_comes_first(tmp_path, order):
    """Of 8 steps a program weighs all outputs up to step M + 1: only what follows is its own."""
    schedule = (0, 1, 3, 5, 7, 8, 9, 11)
    calibration = calibration_of(tmp_path)
    trials = {memory: calibration.fit(schedule, memory=memory) for memory in order}
    assert calibration.ledger.charged == calibration.ledger.computed
    own = {memory: max(0, len(schedule) - 1 - memory) for memory in order}
    assert calibration.ledger.charged == SAMPLES * (len(schedule) - 1 - min(own.values()) + sum(own.values()))
    assert {m: max(len(step.output_coefs) for step in trial.program.steps) for m, trial in trials.items()} == {
        memory: memory for memory in order
    }
    before = calibration.ledger.charged
    assert calibration.fit(schedule, "again", memory=3).program == trials[3].program
    assert calibration.ledger.charged == before


def test_a_short_schedule_has_no_variants_that_are_the_same_program(tmp_path):
    family = OutputFamily(calibration_of(tmp_path))
    (trial,) = family.attempts((0, 3, 6, 9), "graph")
    assert [each.name for each in family.variants(trial)] == ["graph, 2 outputs", "graph, 3 outputs"]
    (longer,) = family.attempts((0, 2, 4, 6, 8, 10), "graph", 0.5)
    found = family.variants(longer)
    assert [each.name for each in found] == [f"graph, {memory} outputs" for memory in OTHER_MEMORIES]
    programs = [longer.program, *(each.program for each in found)]
    assert MEMORY not in OTHER_MEMORIES and {each.weight for each in found} == {0.5}
    assert all(one != other for position, one in enumerate(programs) for other in programs[:position])
