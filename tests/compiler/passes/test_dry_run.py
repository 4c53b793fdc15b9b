"""A dry run predicts what a compile then counts, and writes nothing."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys

import pytest

pytest.importorskip("torch")

from command import COMPILE, otc

from otcache.compiler.effort import EFFORTS
from otcache.compiler.options import CompileOptions
from otcache.compiler.passes import disk
from otcache.compiler.schedules.search import highest_costs, positions
from otcache.runtime.artifact.reader import Artifact


def dry_run(model, target, workspace, *more):
    result = otc("compile", str(model), *COMPILE, *more, "-o", str(target), "--dry-run", "--json", workspace=workspace)
    assert result.exit_code == 0, result.output
    plan = json.loads(result.stdout)
    return plan, {each["name"]: each for each in plan["passes"]}


def test_prediction_and_what_was_counted(compiled, tiny_flux_folder, tmp_path):
    target, workspace = tmp_path / "out", tmp_path / "none"
    plan, passes = dry_run(tiny_flux_folder, target, workspace)
    assert list(tmp_path.iterdir()) == [], "nothing is written"
    manifest = Artifact.open(compiled).manifest
    per_run = manifest.sampler.num_inference_steps * manifest.conditions.calibration_prompts
    for cost in manifest.costs:
        counted, predicted = round(cost.full_runs * per_run), passes[cost.name]
        if predicted["exact"]:
            assert counted == predicted["evaluations"], cost.name
        else:
            assert 0 < counted <= predicted["evaluations"], cost.name  # less where ways lead to the same schedule
    predicted = sum(passes[cost.name]["evaluations"] for cost in manifest.costs)
    assert sum(cost.full_runs for cost in manifest.costs) * per_run > predicted / 2
    assert not any(each["kept"] for each in plan["passes"])
    written = sum(path.stat().st_size for path in compiled.rglob("*") if path.is_file())
    assert passes["emit"]["disk_bytes"] == pytest.approx(written, rel=0.6)
    assert plan["evaluation_s"] > 0 and plan["seconds"] > plan["evaluations"] * plan["evaluation_s"]


def test_evaluation_is_counted_exactly(compiled, tiny_flux_folder, workspace, tmp_path):
    """Against the events of a real compile whose evaluation is made anew."""
    copy = tmp_path / "w"
    shutil.copytree(workspace, copy)
    for path in [*copy.glob("*/measured-*"), *copy.glob("*/pictures-*")]:
        path.unlink()
    for path in copy.glob("*/evaluate-*"):
        shutil.rmtree(path)
    _, passes = dry_run(tiny_flux_folder, tmp_path / "a", copy)
    result = otc("compile", str(tiny_flux_folder), *COMPILE, "-o", str(tmp_path / "a"), "--json", workspace=copy)
    events = [json.loads(line) for line in result.stderr.splitlines()]
    counted = [event["evaluations"] for event in events if event["event"] == "pass" and event["name"] == "evaluate"]
    evaluate = passes["programs"]["evaluations"] + passes["peers"]["evaluations"]
    assert counted == [passes["held-out runs"]["evaluations"], evaluate]
    assert passes["programs"]["evaluations"] == (2 + 4) * 3, "budgets times held-out prompts"
    assert (
        not passes["programs"]["kept"]
        and not passes["peers"]["kept"]
        and passes["capture"]["kept"]
        and passes["anchor"]["kept"]
    )


def test_what_is_in_the_workspace_is_said(compiled, tiny_flux_folder, workspace, tmp_path):
    before = sorted(path for path in workspace.rglob("*"))
    plan, passes = dry_run(tiny_flux_folder, tmp_path / "a", workspace)
    kept = {name for name, each in passes.items() if each["kept"]}
    assert kept == set(passes) - {"cut", "emit"}
    assert plan["evaluations"] == 0
    _, more = dry_run(tiny_flux_folder, tmp_path / "a", workspace, "--budgets", "2,3,4")
    assert more["capture"]["kept"] and more["export"]["kept"] and not more["interpolate and fit"]["kept"]
    result = otc(
        "compile", str(tiny_flux_folder), *COMPILE, "-o", str(tmp_path / "a"), "--dry-run", workspace=workspace
    )
    assert "in the workspace" in result.stdout and "nothing was written" in result.stdout
    assert sorted(path for path in workspace.rglob("*")) == before and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("payload", ["auto", "output", "residual"])
def test_bounds_follow_the_options(payload):
    costs = highest_costs(CompileOptions(model="m", payload=payload), 32, 50)
    assert costs["residuals"] == 8 / 32
    each, known = (3, 0) if payload == "residual" else (1, 1)  # a walk's first evaluation is the full run's own
    assert costs["reference"] == pytest.approx(2 * (20 - known) / 50 * each)
    assert costs["anchor"] == pytest.approx(20 * (4 - known) / 50 * each)
    few = CompileOptions(model="m", payload="output", num_inference_steps=3, budgets=(3,), anchor_budget=1)
    assert highest_costs(few, 4, 3)["interpolate and fit"] == pytest.approx(2 / 3), (
        "there is one schedule of 3 steps out of 3, whose first step is known"
    )
    shipped = CompileOptions(model="m")
    assert 1 + sum(highest_costs(shipped, shipped.calibration_prompts, 50).values()) <= 10, (
        "full runs per prompt, capture included"
    )


@pytest.mark.parametrize(
    ("budgets", "tried"), [((8,), 5), ((4, 8, 16), 5), ((4, 8, 10, 16), 1), ((4, 6, 8, 10, 12), 1)]
)
def test_more_budgets_cost_positions_on_the_path_rather_than_more_full_runs(budgets, tried):
    """By hand: capture 1, residuals 8 / 32, reference 2 · 19 / 50, anchor 20 · 3 / 50; each budget B takes B − 1 for
    each position, four graphs and uniform steps, B for the other payload, and for programs with 2, 3 and 5
    outputs what follows the steps that weigh them all.
    """
    options = CompileOptions(model="m", budgets=budgets)
    assert 1 + sum(highest_costs(options, 32, 50).values()) <= 10
    assert positions(options, 32, 50) == tried
    others = sum(max(0, b - 3) + max(0, b - 4) + max(0, b - 5) for b in budgets) / 50
    costs = {w: 1 + 0.25 + 0.76 + 1.2 + others + sum((w + 5) * (b - 1) + b for b in budgets) / 50 for w in range(1, 6)}
    assert tried == max(w for w, cost in costs.items() if cost <= 10)
    assert tried <= EFFORTS["standard"].weights


def test_the_laws_position_is_always_tried():
    many = CompileOptions(model="m", budgets=(4, 8, 10, 12, 16, 20))
    assert positions(many, 32, 50) == 1 and positions(CompileOptions(model="m", payload="residual"), 32, 50) == 5


def test_the_disk_of_full_runs_is_what_they_take(tiny_flux_folder, tmp_path):
    """To the byte, but for headers of files: against the chunk that a compile of 8 prompts wrote."""
    plan, passes = dry_run(tiny_flux_folder, tmp_path / "a", tmp_path / "none")
    kept = tmp_path / "kept"
    result = otc(
        "compile", str(tiny_flux_folder), *COMPILE, "--engines", "none", "-o", str(tmp_path / "a"), workspace=kept
    )
    assert result.exit_code == 0, result.output
    (chunk,) = kept.glob("*/capture-*")
    written = sum(path.stat().st_size for path in chunk.iterdir())
    assert passes["capture"]["disk_bytes"] == pytest.approx(written, rel=0.02)
    run = plan["full_run_bytes"]
    assert passes["capture"]["disk_bytes"] == 8 * sum(value for name, value in run.items() if name != "outputs")
    assert run["pictures"] == 16 * 16 * 3 * 4 and run["gram"] == 17 * 17 * 8
    assert plan["workspace_bytes"] > passes["capture"]["disk_bytes"] + plan["scratch_bytes"]
    assert plan["workspace_free_bytes"] > 0 and "at_size" not in plan


def test_times_come_from_the_size_that_is_asked_for(tiny_flux_folder, tmp_path):
    """With `--measure` and without it alike: evaluations and pictures, as many at once as a compile takes."""
    options = ["--engines", "none", "--height", "32", "--micro-batch", "4"]
    plan, passes = dry_run(tiny_flux_folder, tmp_path / "a", tmp_path / "none", *options)
    assert plan["measured_at"] == "32x16, 12 tokens" and plan["samples_at_once"] == 4
    assert plan["evaluation_s"] > 0 and plan["picture_s"] > 0
    capture = passes["capture"]
    expected = capture["evaluations"] * plan["evaluation_s"] + 8 * plan["picture_s"]
    assert capture["seconds"] == pytest.approx(expected)
    text = otc("compile", str(tiny_flux_folder), *COMPILE, *options, "-o", str(tmp_path / "a"), "--dry-run").stdout
    assert "Measured at 32x16, 12 tokens, 4 samples at once" in text


def test_it_answers_sigterm(tiny_flux_folder, tmp_path):
    line = [sys.executable, "-m", "otcache.runtime.cli.main", "compile", str(tiny_flux_folder), *COMPILE, "--dry-run"]
    process = subprocess.Popen([*line, "--json"], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    for event in process.stderr:
        if json.loads(event)["event"] == "start":
            process.send_signal(signal.SIGTERM)
            break
    out, err = process.communicate(timeout=120)
    assert process.returncode == 143 and out == "" and "SIGTERM" in json.loads(err.splitlines()[-1])["message"]


def test_measured_at_the_served_size(tiny_flux_folder, tmp_path):
    """Per pass and for every effort: time, memory and disk, and how many samples fit."""
    plan, passes = dry_run(tiny_flux_folder, tmp_path / "a", tmp_path / "none", "--measure", "--engines", "none")
    found = plan["at_size"]
    assert found["evaluation_s"] == plan["evaluation_s"] > 0 and found["picture_s"] > 0
    assert found["evaluation_bytes"] > 0 and found["model_bytes"] > 0
    assert found["peak_bytes"] == found["model_bytes"] + max(found["evaluation_bytes"], found["picture_bytes"])
    assert passes["capture"]["peak_bytes"] == found["peak_bytes"] and passes["emit"]["peak_bytes"] is None
    seconds = passes["capture"]["evaluations"] * plan["evaluation_s"] + 8 * found["picture_s"]
    assert passes["capture"]["seconds"] == pytest.approx(seconds)
    assert "export" not in passes and 1 <= plan["samples_that_fit"] <= 8
    quick, standard, thorough = plan["efforts"]
    assert [each["name"] for each in plan["efforts"]] == ["quick", "standard", "thorough"]
    assert quick["evaluations"] < standard["evaluations"] <= thorough["evaluations"]
    assert quick["full_runs"] < standard["full_runs"] <= thorough["full_runs"]
    assert standard["prompts"] == 8, "what the user chose wins"
    arguments = [*COMPILE, "-o", str(tmp_path / "a"), "--dry-run", "--measure"]
    result = otc("compile", str(tiny_flux_folder), *arguments, workspace=tmp_path / "none")
    assert "thorough" in result.stdout and "samples at once fit" in result.stdout and "inner products" in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_search_size_is_planned_as_an_upper_bound(tiny_flux_folder, tmp_path):
    line = ["compile", str(tiny_flux_folder), *COMPILE, "-o", str(tmp_path / "a"), "--search-size", "8x8", "--dry-run"]
    result = otc(*line, workspace=tmp_path / "none")
    assert result.exit_code == 0 and "as an upper bound" in result.output and not (tmp_path / "a").exists()


def test_measure_goes_with_a_dry_run(tiny_flux_folder):
    result = otc("compile", str(tiny_flux_folder), "--measure")
    assert result.exit_code == 2 and "give it with --dry-run" in result.stderr


def test_a_disk_that_is_too_small_is_said_before_the_first_run(tiny_flux_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "free_disk", lambda folder: 10_000)
    arguments = [*COMPILE, "--engines", "none", "-o", str(tmp_path / "a")]
    result = otc("compile", str(tiny_flux_folder), *arguments, workspace=tmp_path / "w")
    assert result.exit_code == 6, result.output
    assert "(0.0 MB free): 11 full runs take 0.2 MB: free some or name another folder in OTC_CACHE" in result.stderr
    assert not list(tmp_path.glob("w/*/capture-*"))


@pytest.mark.parametrize(
    ("effort", "lowest", "highest"), [("quick", 1.5, 2.5), ("standard", 8, 10), ("thorough", 22, 25)]
)
def test_efforts_cost_what_they_say(effort, lowest, highest):
    """Full runs a prompt in all, for 4, 8 and 16 of 50."""
    options = CompileOptions(model="m", effort=effort)
    total = 1 + sum(highest_costs(options, options.calibration_prompts, 50).values())
    assert lowest <= total <= highest <= EFFORTS[effort].full_runs
