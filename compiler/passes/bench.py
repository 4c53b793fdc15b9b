"""Pass `bench`: an artifact → how long a picture takes on this host, as `otc bench` measures it.

Compiler and runtime do not import each other: the command is run, as a user would, in a process that has no torch. What
comes out is for the report alone. It is no part of the manifest, which is the same wherever it is compiled.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..pipelines.placement import free_bytes
from ..report.evidence import Bench

REPEAT, SECONDS = 20, 5
"""Requests of each budget at most, and after how long no further round of them begins."""
LONGEST_S = 60.0
"""What two rounds, the warm-up among them, may take by what evaluations took here: else it is left to the user."""
TIMEOUT_S = 600.0
ROOM = 2.0
"""Free memory that is asked for, as a multiple of the engines, because the model is in memory as well."""


def bench(folder: Path, budgets: Sequence[int], total: int, evaluation_s: float | None) -> Bench:
    """Latency of one picture at each budget and of the full run; or why it was not measured.

    Args:
        folder: the artifact, with engines.
        budgets: model evaluations of its programs.
        total: of the full run.
        evaluation_s: what one took in this compile, where that is known.
    """
    shown = f"otc bench {folder} --repeat {REPEAT} --seconds {SECONDS}"
    if (reason := _too_much(folder, 2 * (sum(budgets) + total) * (evaluation_s or 0.0))) is not None:
        return Bench(command=shown, missing=reason)
    options = ["--repeat", str(REPEAT), "--seconds", str(SECONDS), "--json", "--quiet"]
    line = [sys.executable, "-m", "otcache.runtime.cli.main", "bench", str(folder), *options]
    try:
        done = subprocess.run(line, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return Bench(command=shown, missing=f"it took more than {TIMEOUT_S:.0f} s")
    if done.returncode != 0:
        return Bench(command=shown, missing=_reason(done.stderr))
    return _bench_from_json(shown, json.loads(done.stdout))


def _too_much(folder: Path, seconds: float) -> str | None:
    """Why a host is spared the measurement."""
    if seconds > LONGEST_S:
        return f"two rounds of all budgets would take about {math.ceil(seconds / 60)} min"
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    free = free_bytes(torch.device("cpu"))
    if free is not None and ROOM * size > free:
        return f"the engines take {size / 1e9:.1f} GB beside the model, and {free / 1e9:.1f} GB of memory are free"
    return None


def _bench_from_json(command: str, found: dict[str, Any]) -> Bench:
    host = found["host"]
    return Bench(
        command=command,
        host=f"{host['cpu'] or host['machine']}, {host['cpus']} CPUs, {host['system']}",
        backend=found["backend"],
        versions=found["versions"],
        latency_s={each["budget"]: each["latency_s"]["p50"] for each in found["results"]},
        requests=min(each["requests"] for each in found["results"]),
    )


def _reason(stderr: str) -> str:
    """The message of the error that the last line of a command holds."""
    lines = stderr.strip().splitlines() or ["it ended without a word"]
    try:
        return str(json.loads(lines[-1])["message"])
    except (ValueError, KeyError, TypeError):
        return lines[-1][:300]
