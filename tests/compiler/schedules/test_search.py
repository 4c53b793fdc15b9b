"""The searches as a whole, on an equation: interrupted at any moment they end as an undisturbed one, and cost
the same.
"""

from __future__ import annotations

import pytest
import torch
from equations import TOTAL, normal, samples_from_equation

from otcache.compiler.calibration.trials import Calibration
from otcache.compiler.options import CompileOptions
from otcache.compiler.programs.schedule import uniform_schedule
from otcache.compiler.schedules.search import FOUND, highest_costs, search
from otcache.compiler.workspace.ledger import Ledger
from otcache.compiler.workspace.progress import Reporter
from otcache.compiler.workspace.workspace import Workspace

SAMPLES = 6
OPTIONS = CompileOptions(
    model="an equation",
    budgets=(3, 5),
    num_inference_steps=TOTAL,
    anchor_budget=3,
    reference_budget=6,
    trials=24,
    payload="output",
    objective="psnr",
)


def rate(x, step, k):
    """Stiff at the end, so that schedules matter."""
    return -k * x * (1 + (step > 8) * 6.0) + 0.5 * torch.sin(3 * x.flip(1))


def calibration_of(folder, ledger=None):
    samples = samples_from_equation(folder, normal(SAMPLES, 4, 3), rate, k=torch.linspace(0.5, 2.0, SAMPLES))
    return Calibration(
        samples=samples, table=samples.evaluator.table, objective="psnr", ledger=ledger or Ledger(), memory=3
    )


class Interrupt:
    """An equation that is interrupted after so many calls."""

    def __init__(self, equation, calls):
        self.equation, self.calls = equation, calls

    def __call__(self, **arguments):
        if len(self.equation.batches) == self.calls:
            raise KeyboardInterrupt
        return self.equation(**arguments)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    calibration = calibration_of(tmp_path_factory.mktemp("undisturbed"))
    found = search(calibration, OPTIONS, Reporter(), tmp_path_factory.mktemp("study") / "study.db")
    return FOUND.dump_python(found, mode="json"), calibration


def test_what_is_charged_is_what_was_made_and_within_the_bound(undisturbed):
    found, calibration = undisturbed
    made = calibration.samples.evaluator.transformer.evaluations
    assert calibration.ledger.charged == calibration.ledger.computed == made
    assert sum(found["costs"].values()) * TOTAL * SAMPLES == pytest.approx(made)
    bounds = highest_costs(OPTIONS, SAMPLES, TOTAL)
    assert set(found["costs"]) == set(bounds) - {"edges"}
    assert all(cost <= bounds[name] + 1e-9 for name, cost in found["costs"].items())


def test_every_budget_tries_uniform_steps_and_other_memories_and_keeps_the_best(undisturbed):
    found, _ = undisturbed
    for budget, trials in found["trials"].items():
        assert any(trial["schedule"] == list(uniform_schedule(int(budget), TOTAL)) for trial in trials)
        assert any(trial["name"].endswith("2 outputs") for trial in trials)
        assert trials[0]["score"] == max(trial["score"] for trial in trials)


@pytest.mark.parametrize("part", [0.1, 0.4, 0.7, 0.95])
@pytest.mark.parametrize("with_workspace", [True, False])
def test_a_resumed_search_ends_as_an_undisturbed_one_does(part, with_workspace, undisturbed, tmp_path):
    expected, whole = undisturbed
    calls = int(part * len(whole.samples.evaluator.transformer.batches))
    storage = tmp_path / "study.db"
    workspace = Workspace(tmp_path / "workspace") if with_workspace else None
    first = calibration_of(tmp_path / "first", Ledger(workspace, "equation"))
    evaluator = first.samples.evaluator
    object.__setattr__(evaluator, "transformer", Interrupt(evaluator.transformer, calls))
    with pytest.raises(KeyboardInterrupt):
        search(first, OPTIONS, Reporter(), storage)
    second = calibration_of(tmp_path / "second", Ledger(workspace, "equation"))
    found = search(second, OPTIONS, Reporter(), storage)
    assert FOUND.dump_python(found, mode="json") == expected, "schedules, coefficients, scores and costs"
    assert second.ledger.charged == whole.ledger.charged
    assert second.ledger.computed == second.samples.evaluator.transformer.evaluations
    if with_workspace and part > 0.3:
        assert second.ledger.computed < whole.ledger.computed
