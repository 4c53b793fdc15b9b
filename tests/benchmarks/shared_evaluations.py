"""Evaluations that a compile's searches make, against those of the same walks without anything shared.

    python tests/benchmarks/shared_evaluations.py --bounds                 # by the formulas, of every effort; seconds
    python tests/benchmarks/shared_evaluations.py WORKSPACE [WORKSPACE …]   # by what compiles have kept

A walk's first evaluation is the full run's own, and walks that share their first steps (with the same coefficients)
share those. Walks are read from the trials that a compile keeps one by one in its folder of the workspace: without
sharing each costs all its steps, with it every first part of two steps or more that no other walk has. Walks that were
pruned are in neither. Prints one JSON object, in evaluations of one sample for each calibration prompt.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, Literal, get_args

from output import output_option, write

from otcache.compiler.effort import EFFORTS, EffortName
from otcache.compiler.options import CompileOptions
from otcache.compiler.schedules.search import highest_costs, highest_walks

STEPS = 50


def bounds(effort: EffortName) -> dict[str, Any]:
    """Full runs a prompt at most by payload, and what they were when a walk's first evaluation was made each time."""
    found: dict[str, Any] = {"calibration_prompts": EFFORTS[effort].calibration_prompts}
    payloads: tuple[Literal["auto", "output"], ...] = ("auto", "output")
    for payload in payloads:
        options = CompileOptions(model="any", effort=effort, payload=payload, num_inference_steps=STEPS)
        after = 1 + sum(highest_costs(options, options.calibration_prompts, STEPS).values())
        walks = sum(highest_walks(options, options.calibration_prompts, STEPS).values())
        found[payload] = {"before": round(after + walks / STEPS, 2), "after": round(after, 2)}
    return found


def kept(workspace: Path) -> dict[str, Any]:
    """Of the walks in a compile's folder."""
    found = [json.loads(path.read_text("utf-8")) for path in sorted(workspace.glob("attempt-*.json"))]
    walks = {
        (tuple(each["schedule"]), max(len(step["output_coefs"]) for step in each["program"]["steps"]))
        for each in found
        if isinstance(each, dict) and each["program"]["payload"] != "residual"
    }
    before = sum(len(schedule) for schedule, _ in walks)
    after = len(
        {
            (schedule[:end], memory if end > memory + 1 else 0)
            for schedule, memory in walks
            for end in range(2, len(schedule) + 1)
        }
    )
    return {"walks": len(walks), "before": before, "after": after, "saved": round(1 - after / before, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workspaces", nargs="*", type=Path, help="each NAME=FOLDER or a folder")
    parser.add_argument("--bounds", action="store_true")
    output_option(parser)
    options = parser.parse_args()
    result: dict[str, Any] = {"what": "evaluations a calibration prompt, without and with sharing"}
    if options.bounds or not options.workspaces:
        result["full_runs_at_most"] = {effort: bounds(effort) for effort in get_args(EffortName)}
    named = {str(each).partition("=")[0].rsplit("/")[-1]: each for each in options.workspaces}
    result["walks"] = {name: kept(Path(str(each).partition("=")[2] or each)) for name, each in named.items()}
    write(result, options.output)


if __name__ == "__main__":
    main()
