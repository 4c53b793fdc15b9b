"""What workers are worth: a compile with two against one, and what 8, 64 and 512 GPUs would make of large models.

    python tests/benchmarks/fleet.py shapes -o tests/benchmarks/results/fleet.json

Each worker has one core and one thread. Seconds are those of all passes before the artifact is written, without the
start of the workers, which is said apart.

On paper a compile is its evaluations, spread over at most as many workers as there are samples, and for each step of a
walk one question to all workers at once, whose answers share the asking process's network, and a fit by one of its
threads. Times are measured here, but for evaluations of large models: README.md's, computed and not measured.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from output import host, output_option, write
from shared_evaluations import STEPS, bounds

from otcache.compiler.calibration.fit import fit_step
from otcache.compiler.calibration.samples import StepStatistics
from otcache.compiler.calibration.trials import MEMORY
from otcache.compiler.fleet.crew import RayCrew, crew_of
from otcache.compiler.fleet.packing import pack
from otcache.compiler.options import CompileOptions
from otcache.compiler.passes.compile import compile_model
from otcache.compiler.programs.solver_table import SolverTable
from otcache.compiler.report.evidence import Recorder
from otcache.compiler.workspace.progress import QuietReporter

GPUS = (1, 8, 64, 512)
PROMPTS = (32, 512)
"""Calibration prompts: of the standard effort, and one for each of the most GPUs."""
LARGE = {"FLUX.1, 1024²": 0.2, "HunyuanVideo, 720p": 30.0}
"""Seconds of an evaluation on an H100, as README.md has them."""
BYTES_PER_S = 125e6
"""A network of 1 Gbit/s."""
ROUNDS = 50


def compiled(model: str, workers: int, prompts: int, folder: Path) -> tuple[dict[str, Any], RayCrew]:
    """Seconds of a compile's passes on so many workers in a new workspace, and the crew with what it has counted."""
    options = CompileOptions(
        model=model,
        budgets=(8,),
        calibration_prompts=prompts,
        evaluation_prompts=prompts,
        effort="quick",
        payload="output",
        engines="none",
        device="cpu",
        micro_batch=1,
        threads=1,
        output=folder / f"artifact-{workers}",
        workspace=folder / f"workspace-{workers}",
    )
    with crew_of(options, QuietReporter(), workers, None) as (crew, reporter):
        began = time.perf_counter()
        crew.each(crew.worker_at, crew.posts)
        started = time.perf_counter() - began
        shown = Recorder(reporter)
        _, manifest = compile_model(options, shown, crew=crew)
        trip = round_trip(crew)
    apart = ("load", "probe", "emit")
    passes = {each.name: 0.0 for each in shown.passes if each.name not in apart}
    for each in shown.passes:
        if each.name in passes:
            passes[each.name] = round(passes[each.name] + each.seconds, 2)
    evaluations = sum(each.evaluations for each in shown.passes)
    found = {
        "seconds": round(sum(passes.values()), 2),
        "passes": passes,
        "start_s": round(started, 2),
        "evaluations": evaluations,
        "digest": manifest.digest,
        "bytes_per_sample_and_step": round(crew.traffic.bytes_per_sample_step, 1),
        "bytes": {kind: count.bytes for kind, count in sorted(crew.traffic.counts.items())},
        "round_trip_s": trip,
    }
    return found, crew


def round_trip(crew: RayCrew) -> float:
    """Seconds of a question that is nothing to a worker."""
    worker, data = crew.posts[0].worker, pack("nothing", {})
    began = time.perf_counter()
    for _ in range(ROUNDS):
        crew.ask(worker, "ping", "drop", data, 0)
    return round((time.perf_counter() - began) / ROUNDS, 6)


def fit_seconds(samples: int) -> float:
    """Of one step fitted to so many samples, each of which is left out once."""
    draw, count = np.random.default_rng(0), 1 + MEMORY
    factors = draw.normal(size=(samples, 2 * count, 4 * count))
    found = StepStatistics(
        gram=factors @ factors.transpose(0, 2, 1),
        cross=draw.normal(size=(samples, 2 * count)),
        distance=draw.uniform(1.0, 2.0, samples),
        size=np.ones(samples),
        change=draw.normal(size=samples),
        evaluations=samples,
    )
    table = SolverTable(
        timesteps=np.arange(STEPS),
        input_scales=np.ones(STEPS),
        initial_scale=1.0,
        latent_coefs=np.ones(STEPS),
        output_coefs=np.eye(STEPS) / STEPS,
    )
    fit_step(found, 1, np.ones(count), 1e-5, table)
    began = time.perf_counter()
    for _ in range(3):
        fit_step(found, 1, np.ones(count), 1e-5, table)
    return round((time.perf_counter() - began) / 3, 6)


def on_paper(measured: dict[str, Any], evaluation_s: float, prompts: int, gpus: int) -> dict[str, Any]:
    """Hours of a compile's calibration on so many GPUs, by what they go to, and which of it is the most.

    Evaluations and steps of walks for each prompt are those of the standard effort.
    """
    busy = min(gpus, prompts)
    steps = measured["walk_steps"]
    parts = {
        "evaluations": measured["evaluations_per_prompt"] * evaluation_s * -(-prompts // busy),
        "network": steps * (measured["round_trip_s"] + measured["walk_bytes"] * prompts / BYTES_PER_S),
        "fits": steps * measured["fit_s"][str(prompts)],
    }
    total = sum(parts.values())
    bottleneck = max(parts, key=lambda name: parts[name])
    if bottleneck == "evaluations" and busy < gpus:
        bottleneck = "samples"
    return {
        "hours": total / 3600,
        "shares": {name: value / total for name, value in parts.items()},
        "busy": busy,
        "bottleneck": bottleneck,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--prompts", type=int, default=16, help="to calibrate on, and to hold out")
    output_option(parser)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None):
        one, crew = compiled(options.model, 1, options.prompts, Path(folder))
        two, _ = compiled(options.model, 2, options.prompts, Path(folder))
    walks, standard = crew.traffic.counts["walk"], bounds("standard")["output"]
    captured = one["passes"]["capture"]
    measured = {
        "evaluation_s": round(captured / (STEPS * options.prompts), 5),
        "round_trip_s": one["round_trip_s"],
        "walk_bytes": round(walks.bytes / walks.sample_steps),
        "fit_s": {str(prompts): fit_seconds(prompts) for prompts in PROMPTS},
        "evaluations_per_prompt": round(STEPS * standard["after"]),
        "walk_steps": round(STEPS * (standard["before"] - 1)),
    }
    evaluations = {f"`{options.model}`, this host": measured["evaluation_s"], **LARGE}
    found = {
        "host": host(),
        "model": options.model,
        "prompts": options.prompts,
        "workers": {"1": one, "2": two},
        "speed_up": round(one["seconds"] / two["seconds"], 2),
        "same_digest": one["digest"] == two["digest"],
        "measured": measured,
        "on_paper": {
            f"{name}, {prompts} prompts": {str(gpus): on_paper(measured, seconds, prompts, gpus) for gpus in GPUS}
            for name, seconds in evaluations.items()
            for prompts in PROMPTS
        },
    }
    write(found, options.output)


if __name__ == "__main__":
    main()
