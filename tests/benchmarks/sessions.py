"""What the choices in `runtime/engines/onnx.py` are worth: idle threads that sleep, and one arena for all sessions.

    python tests/benchmarks/sessions.py artifacts/shapes [--images 4] [--rounds 9] [--threads 2]

Each variant runs in a process of its own; rounds of all variants take turns. Prints JSON: median milliseconds of
sampling at the lowest budget, and by how much resident memory grew from before the first request to the last.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from otcache.runtime.artifact.reader import Artifact
from otcache.runtime.engines.choose import Selection
from otcache.runtime.engines.onnx import OnnxBackend
from otcache.runtime.serving.sampler import Sampler

VARIANTS = {
    "as_served": {},
    "spinning": {"session.intra_op.allow_spinning": "1"},
    "own_arenas": {"session.use_env_allocators": "0"},
}


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def serve(artifact: Path, variant: str, images: int, threads: int) -> None:
    """Answer each line on stdin with the seconds and bytes of one run."""
    backend = OnnxBackend(threads=threads)
    for key, value in VARIANTS[variant].items():
        backend._options.add_session_config_entry(key, value)
    with Sampler(Artifact.open(artifact), Selection(backend, {})) as sampler:
        conditioning = sampler.encode(["a red ring"] * images)
        before = resident_bytes()
        for _ in sys.stdin:
            start = time.perf_counter()
            sampler.sample(conditioning, budget=sampler.budgets[0])
            print(json.dumps([time.perf_counter() - start, resident_bytes() - before]), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.variant:
        return serve(options.artifact, options.variant, options.images, options.threads)
    command = [
        sys.executable,
        __file__,
        str(options.artifact),
        "--images",
        str(options.images),
        "--threads",
        str(options.threads),
    ]
    processes = {
        name: subprocess.Popen([*command, "--variant", name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for name in VARIANTS
    }
    found: dict[str, list[tuple[float, int]]] = {name: [] for name in VARIANTS}
    for round_ in range(options.rounds + 1):
        for name, process in processes.items():
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write("\n")
            process.stdin.flush()
            answer = json.loads(process.stdout.readline())
            if round_:
                found[name].append(answer)
    for process in processes.values():
        process.communicate()
    print(
        json.dumps(
            {
                "artifact": str(options.artifact),
                "images": options.images,
                "threads": options.threads,
                "rounds": options.rounds,
                **{
                    name: {
                        "ms": round(1e3 * statistics.median(seconds for seconds, _ in runs), 2),
                        "grown_mb": round(runs[-1][1] / 1e6, 2),
                    }
                    for name, runs in found.items()
                },
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
