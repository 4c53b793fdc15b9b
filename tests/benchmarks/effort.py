"""Fidelity against evaluations spent: a bundled model compiled with each `--effort`.

    python tests/benchmarks/effort.py shapes --efforts quick,standard,thorough -o artifacts/results/effort/shapes.json

Compiles with `--engines none`, at 4, 8 and 16 evaluations, measured on the same 16 held-out prompts, and writes what
each effort spent (full runs a calibration prompt, as the manifest counts them, and evaluations in all) beside the PSNR
and SSIM that it came to: as JSON, and beside `-o FILE.json` as a curve in FILE.png. An interrupted run goes on in the
workspace (`OTC_CACHE`).
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any, cast

from output import host, output_option, write

from otcache.compiler.effort import EFFORTS, EffortName
from otcache.compiler.options import CompileOptions
from otcache.compiler.passes.compile import compile_model
from otcache.compiler.workspace.progress import LineReporter

BUDGETS = (4, 8, 16)
HELD_OUT = 16


def measure(model: str, effort: EffortName) -> dict[str, Any]:
    """What a compile spent, and what it came to."""
    with tempfile.TemporaryDirectory() as folder:
        options = CompileOptions(
            model=model,
            budgets=BUDGETS,
            effort=effort,
            evaluation_prompts=HELD_OUT,
            engines="none",
            output=Path(folder) / "artifact",
        )
        _, manifest = compile_model(options, LineReporter())
    prompts = manifest.conditions.calibration_prompts
    full_runs = sum(cost.full_runs for cost in manifest.costs)
    return {
        "calibration_prompts": prompts,
        "full_runs": round(full_runs, 2),
        "evaluations": round(full_runs * prompts * manifest.sampler.num_inference_steps),
        "budgets": {
            entry.budget: {"psnr_db": entry.quality.psnr_db.mean, "ssim": entry.quality.ssim.mean}
            for entry in manifest.programs
            if entry.quality
        },
    }


def draw(found: dict[str, dict[str, Any]], model: str, path: Path) -> None:
    """A line a budget: PSNR against evaluations."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4))
    budgets = list(next(iter(found.values()))["budgets"])
    for budget in budgets:
        points = [(each["evaluations"], each["budgets"][budget]["psnr_db"]) for each in found.values()]
        axes.plot(*zip(*points, strict=True), marker="o", label=f"{budget} evaluations")
    for each in found.values():
        axes.axvline(each["evaluations"], color="0.85", zorder=0)
    axes.set(xscale="log", xlabel="model evaluations of the compile", ylabel="PSNR (dB) to the full run", title=model)
    names = axes.secondary_xaxis("top")
    names.set_xticks([each["evaluations"] for each in found.values()], found)
    names.set_xticks([], minor=True)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=len(budgets), frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="shapes")
    parser.add_argument("--efforts", default=",".join(EFFORTS), help="some of them, separated by commas")
    output_option(parser)
    options = parser.parse_args()
    efforts = [cast(EffortName, name) for name in options.efforts.split(",")]
    found = {effort: measure(options.model, effort) for effort in efforts}
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
    write({"model": options.model, "held_out": HELD_OUT, "host": host(), "efforts": found}, options.output)
    if options.output:
        draw(found, options.model, options.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
