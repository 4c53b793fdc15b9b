"""`otc compare` on saved pipelines of many classes: what does not apply is named with its reason."""

from __future__ import annotations

import json

import pytest
from command import otc
from model_zoo.pipelines import CASES

from otcache.compiler.compare.cells import DEFAULT, Comparison, Skipped
from otcache.compiler.compare.compare import methods
from otcache.compiler.compare.measure import measure_cell
from otcache.compiler.compare.method import NotApplicable, ProgramMethod
from otcache.schemas.errors import ModelError

SOLVERS = {"euler", "uniform reuse", "uniform taylor-1"}
SHORT = (
    "--budgets",
    "3",
    "--num-inference-steps",
    "6",
    "--trials",
    "2",
    "--calibration-prompts",
    "2",
    "--evaluation-prompts",
    "2",
    "--no-claim",
    "--no-robustness",
)
LONG = [
    ("StableDiffusion3Pipeline", 4, {"teacache", "graph + taylor (residuals)"}),
    ("StableDiffusion3Pipeline", 1, {"teacache"}),
    ("WanPipeline", 4, {"first block", "magcache", "teacache", "cache-dit mask", "seacache", "taylorseer-1"}),
    ("WanPipeline", 1, {"first block", "magcache", "cache-dit mask"}),
    ("AuraFlowPipeline", 4, {"cache-dit mask", "meancache"}),
    ("SanaPipeline", 4, {"cache-dit mask"}),
    ("ZImagePipeline", 4, {"graph + taylor (residuals)"}),
    ("LTXPipeline", 4, {"first block", "cache-dit mask"}),
    ("CogVideoXPipeline", 1, {"cache-dit mask"}),
    ("HunyuanDiTPipeline", 4, {"graph + taylor (outputs)"}),
    ("ChromaPipeline", 4, {"cache-dit mask"}),
    ("FluxPipeline", 1, {"taylorseer-1", "cache-dit mask"}),
    ("StableDiffusionPipeline", 4, {"dpm++2m"}),
]


def compare_class(name, scale, folder, workspace):
    """The comparison of a saved pipeline, from the command line."""
    case = CASES[name]
    case.pipeline().save_pretrained(folder / name)
    if name != "DiTPipeline":
        (folder / name / "prompts.txt").write_text("\n".join(case.prompts))
    (folder / name / "call.json").write_text(json.dumps(case.call))
    output = folder / "compared"
    result = otc(
        "compare",
        str(folder / name),
        *SHORT,
        "--guidance-scale",
        str(scale),
        "-o",
        str(output),
        workspace=workspace,
    )
    assert result.exit_code == 0, result.output
    return Comparison.from_json(json.loads((output / "comparison.json").read_text()))


def check(comparison, expected):
    measured = {cell.method for cell in comparison.cells}
    reasons = {skipped.method: skipped.reason for skipped in comparison.skipped}
    everything = {method.name for method in methods()}
    assert measured | reasons.keys() == {DEFAULT, *everything} and all(reasons.values())
    assert measured >= {DEFAULT} | SOLVERS | expected, reasons


@pytest.mark.parametrize(("name", "scale"), [("PixArtSigmaPipeline", 4), ("DiTPipeline", 4)], ids=["texts", "classes"])
def test_a_model_that_diffusers_has_no_caches_for(name, scale, tmp_path, workspace):
    """These two ended a whole comparison: TeaCache's indicator was not theirs, and labels were taken for texts."""
    pytest.importorskip("cache_dit")
    comparison = compare_class(name, scale, tmp_path, workspace)
    check(comparison, {"teacache", "cache-dit mask", "graph + taylor (residuals)", "lemica", "spectrum"})
    reasons = {skipped.method: skipped.reason for skipped in comparison.skipped}
    assert reasons["fora"].startswith("diffusers has no caches for")
    assert "velocities of flow matching" in reasons["meancache"]


@pytest.mark.long
@pytest.mark.parametrize(("name", "scale", "expected"), LONG)
def test_a_comparison_of_every_class_ends(name, scale, expected, tmp_path, workspace):
    pytest.importorskip("cache_dit")
    check(compare_class(name, scale, tmp_path, workspace), expected)


def method_that(raises):
    def build(bench, budget):
        raise raises

    return ProgramMethod(name="another", group="cache", source="", build=build)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (NotApplicable("this model has none"), "this model has none"),
        (TypeError("unexpected\nargument"), "it breaks: TypeError: unexpected argument"),
    ],
)
def test_a_peer_that_breaks_is_named(bench, error, reason):
    assert measure_cell(bench, method_that(error), 3) == Skipped(method="another", budget=3, reason=reason)


def test_a_peer_that_leaves_the_pipeline_changed_ends_the_comparison(bench):
    weights = list(bench.pipeline.transformer.parameters())
    kept = [weight.detach().clone() for weight in weights]

    def build(bench, budget):
        for weight in weights:
            weight.data.mul_(1.5)
        raise RuntimeError("half way")

    try:
        with pytest.raises(ModelError, match="another broke and left FluxPipeline changed"):
            measure_cell(bench, ProgramMethod(name="another", group="cache", source="", build=build), 3)
    finally:
        for weight, before in zip(weights, kept, strict=True):
            weight.data.copy_(before)
