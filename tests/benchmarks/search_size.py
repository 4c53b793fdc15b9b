"""What `--search-size` costs in fidelity, and saves in arithmetic: a model compiled both ways.

    python tests/benchmarks/search_size.py shapes --search-size 32x32 -o tests/benchmarks/results/search-size.json

Compiles with `--engines none`, measured on the same held-out prompts at the served size. Floating-point operations are
those of one evaluation at each size (`torch.utils.flop_counter`) times the evaluations of the searches there, as the
manifest counts them; held-out runs, which both have, are left out. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from output import host, output_option, write
from torch.utils.flop_counter import FlopCounterMode

from otcache.compiler.calibration.batch import Batch
from otcache.compiler.calibration.samples import Rows
from otcache.compiler.options import CompileOptions, parse_search_size
from otcache.compiler.passes.compile import compile_model
from otcache.compiler.passes.prepare import prepare
from otcache.compiler.workspace.progress import LineReporter

BUDGETS = (4, 8, 16)


def flops_of(options: CompileOptions) -> int:
    """Of one sample's evaluation, all branches of guidance."""
    prepared = prepare(replace(options, calibration_prompts=1, evaluation_prompts=1), LineReporter())
    table = prepared.table

    def count(batch: Batch) -> Rows:
        with FlopCounterMode(display=False) as counter:
            batch.denoiser(batch.latents(0), float(table.timesteps[0]), float(table.input_scales[0]))
        return {"flops": np.array([counter.get_total_flops()])}

    return int(prepared.samples.map(count, slice(0, 1))["flops"][0])


def measure(options: CompileOptions, flops: dict[str, int]) -> dict[str, Any]:
    """What a compile came to at each budget, and the operations of its searches.

    flops: of an evaluation, by what a cost's name ends in.
    """
    with tempfile.TemporaryDirectory() as folder:
        _, manifest = compile_model(replace(options, output=Path(folder) / "artifact"), LineReporter())
    steps, few = manifest.sampler.num_inference_steps, manifest.conditions.calibration_prompts
    total = 0.0
    for cost in manifest.costs:
        small = next((name for name in flops if name and cost.name.endswith(name)), "")
        total += cost.full_runs * steps * flops[small] * (options.calibration_prompts if small else few)
    return {
        "flops": round(total),
        "budgets": {
            entry.budget: {"psnr_db": entry.quality.psnr_db.mean, "ssim": entry.quality.ssim.mean}
            for entry in manifest.programs
            if entry.quality
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="shapes")
    parser.add_argument("--search-size", default="32x32")
    parser.add_argument("--calibration-prompts", type=int, default=32)
    parser.add_argument("--evaluation-prompts", type=int, default=32)
    output_option(parser)
    given = parser.parse_args()
    size = parse_search_size(given.search_size)
    assert size is not None
    options = CompileOptions(
        model=given.model,
        budgets=BUDGETS,
        payload="output",
        engines="none",
        calibration_prompts=given.calibration_prompts,
        evaluation_prompts=given.evaluation_prompts,
        threads=1,
    )
    flops = {
        "": flops_of(options),
        f" at {size[0]}x{size[1]}": flops_of(replace(options, height=size[0], width=size[1])),
    }
    ways = {
        "served size": measure(options, flops),
        f"--search-size {size[0]}x{size[1]}": measure(replace(options, search_size=size), flops),
    }
    write({"model": given.model, "host": host(), "flops_of_an_evaluation": flops, "ways": ways}, given.output)


if __name__ == "__main__":
    main()
