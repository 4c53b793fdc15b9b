"""Residuals weighed on a quarter of their positions, against all of them, on the bundled models.

    python tests/benchmarks/residual_positions.py [shapes shapes-qwen shapes-video] [--prompts 4]

Models of many tokens are weighed on 4,096 positions (`calibration.rollout.WEIGHED_POSITIONS`); the bundled ones have
far fewer, so that here a seeded quarter stands for that. Along a few full runs it makes the Gram matrix of the blocks'
residuals both ways, and compares what follows from it: the graph's schedules at 4, 8 and 16 evaluations, the
coefficients that are fitted to it, and the PSNR of the programs that are made of both, each with its own
schedule. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from output import host, output_option, write

from otcache.compiler.calibration.batch import Batch
from otcache.compiler.calibration.rollout import StagedModel, residual_gram
from otcache.compiler.calibration.samples import Rows
from otcache.compiler.calibration.scoring import scores_of
from otcache.compiler.options import CompileOptions
from otcache.compiler.passes.prepare import Prepared, prepare
from otcache.compiler.programs.residual import residual_edge_errors, residual_program
from otcache.compiler.programs.solver_table import program_from_table
from otcache.compiler.schedules.payloads import RESIDUAL_GRAPHS
from otcache.compiler.schedules.reference import shortest_schedule
from otcache.compiler.workspace.progress import LineReporter
from otcache.schemas.program import Program, position_axes

BUDGETS = (4, 8, 16)
SHARE = 4
"""All positions for each one that is weighed."""


def positions_of(prepared: Prepared) -> int:
    """Of the residuals, the largest number there is."""
    step = program_from_table(prepared.table, payload="residual").steps[0]

    def count(batch: Batch) -> Rows:
        model = StagedModel(prepared.trunk, batch.denoiser, keep=1)
        model(batch.latents(0), step)
        shapes = [value.shape for value in model.residuals[-1].values()]
        found = max(math.prod(shape[axis] for axis in position_axes(len(shape))) for shape in shapes)
        return {"positions": np.full(batch.count, found)}

    return int(prepared.samples.map(count, slice(0, 1))["positions"][0])


def gram_of(prepared: Prepared, positions: int) -> np.ndarray:
    """Float64 (T, T), the mean over the samples."""
    program = program_from_table(prepared.table, payload="residual")

    def weigh(batch: Batch) -> Rows:
        return {"gram": residual_gram(batch, program, batch.scratch, positions=positions)}

    found: np.ndarray = prepared.samples.map(weigh)["gram"].mean(axis=0)
    return found


def coefs_of(program: Program) -> np.ndarray:
    """Those that residuals are forecast with, one after the other."""
    return np.concatenate([step.residual_coefs for step in program.steps if not step.compute])


def compare(model: str, prompts: int, workspace: Path) -> dict[str, Any]:
    """What both Gram matrices of a model lead to."""
    options = CompileOptions(
        model=model,
        budgets=BUDGETS,
        payload="residual",
        engines="none",
        threads=1,
        calibration_prompts=prompts,
        evaluation_prompts=1,
        workspace=workspace,
    )
    prepared = prepare(options, LineReporter())
    table, count = prepared.table, positions_of(prepared)
    whole, part = (gram_of(prepared, positions) for positions in (count, count // SHARE))
    found: dict[str, Any] = {}
    for budget in BUDGETS:
        graphs = {
            name: [shortest_schedule(residual_edge_errors(table, gram), budget, value) for gram in (whole, part)]
            for name, value in RESIDUAL_GRAPHS.items()
        }
        schedules = graphs["graph power 4"]
        first, second = (coefs_of(residual_program(table, schedules[0], "fitted", gram)) for gram in (whole, part))
        programs = [
            residual_program(table, schedule, "fitted", gram)
            for schedule, gram in zip(schedules, (whole, part), strict=True)
        ]
        psnr = [float(prepared.samples.map(scores_of(program))["psnr_db"].mean()) for program in programs]
        found[str(budget)] = {
            "schedules": {name: {"all": pair[0], "quarter": pair[1]} for name, pair in graphs.items()},
            "same_schedules": sum(pair[0] == pair[1] for pair in graphs.values()),
            "most_steps_apart": max(
                abs(step - other) for pair in graphs.values() for step, other in zip(*pair, strict=True)
            ),
            "coefficients_relative_difference": float(np.linalg.norm(first - second) / np.linalg.norm(first)),
            "psnr_db": {"all": psnr[0], "quarter": psnr[1]},
        }
    return {
        "positions": count,
        "weighed": count // SHARE,
        "gram_relative_difference": float(np.linalg.norm(whole / whole.trace() - part / part.trace()))
        / float(np.linalg.norm(whole / whole.trace())),
        "budgets": found,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["shapes", "shapes-qwen", "shapes-video"])
    parser.add_argument("--prompts", type=int, default=4)
    output_option(parser)
    options = parser.parse_args()
    found = {}
    for model in options.models:
        with tempfile.TemporaryDirectory() as workspace:
            found[model] = compare(model, options.prompts, Path(workspace))
    write(
        {
            "what": "residuals weighed on a quarter of the positions",
            "host": host(),
            "prompts": options.prompts,
            "models": found,
        },
        options.output,
    )


if __name__ == "__main__":
    main()
