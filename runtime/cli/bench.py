"""The command `otc bench`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from otcache.schemas.errors import UsageError

from .options import artifact_argument, backend_option, json_option, print_json, quiet_option, threads_option
from .progress import progress_bar
from .whole_tables import print_whole

MOST_REQUESTS = 1_000_000
"""Of each budget and batch: their times are kept in memory."""


@click.command(
    epilog="""\b
Examples:
  otc bench artifacts/shapes
  otc bench artifacts/shapes --budget 4,8,16,full --batch 1,4 --repeat 50 --json
  otc bench artifacts/shapes --threads 2 --save
"""
)
@artifact_argument
@click.option("--budget", default=None, metavar="N|full[,…]", help="Budgets to measure; default: all.")
@click.option("--batch", default="1", show_default=True, metavar="N[,…]", help="Pictures in a request.")
@click.option(
    "--repeat",
    type=click.IntRange(1, MOST_REQUESTS),
    default=20,
    show_default=True,
    help="Requests of each budget and batch.",
)
@click.option(
    "--seconds",
    type=click.FloatRange(min=0),
    default=None,
    help="Begin no further round of requests after so many; each budget is measured once at least.",
)
@click.option(
    "--warmup",
    type=click.IntRange(0, MOST_REQUESTS),
    default=1,
    show_default=True,
    help="Requests of each before that, which do not count.",
)
@backend_option
@threads_option
@click.option("--cuda-graph", is_flag=True, help="Replay each budget's loop as one CUDA graph; TensorRT backends only.")
@click.option("--save", is_flag=True, help="Write the median latency of one picture into the manifest's measurements.")
@quiet_option
@json_option
def bench(
    artifact: Path,
    budget: str | None,
    batch: str,
    repeat: int,
    seconds: float | None,
    warmup: int,
    backend: str,
    threads: int | None,
    cuda_graph: bool,
    save: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Measure the latency of ARTIFACT on this host: percentiles over requests, and the parts they consist of.

    --save changes manifest.json outside of what its digest covers, so digest and signature stay valid. It is what
    `Sampler.budget_for` goes by until it has seen requests of its own: use it on the host that serves.
    """
    from ..serving.bench import check_saveable, host_facts, measure, save_latencies, versions
    from ..serving.sampler import Sampler

    batches = _batches(batch)
    if save and 1 not in batches:
        raise UsageError(f"--save: received --batch {batch}: expected 1 among them: latency is that of one picture")
    if save:
        check_saveable(artifact)
    start = time.perf_counter()
    with Sampler.load(artifact, backend, threads, cuda_graph=cuda_graph) as sampler:
        load_s = time.perf_counter() - start
        budgets = [name.strip() for name in budget.split(",")] if budget else list(sampler.budgets)
        with progress_bar("requests", quiet=quiet, as_json=as_json) as progress:
            found = measure(
                sampler,
                list(dict.fromkeys(budgets)),
                batches,
                repeat=repeat,
                warmup=warmup,
                seconds=seconds,
                progress=progress,
            )
        result = {
            "artifact": str(artifact),
            "digest": sampler.manifest.digest,
            "backend": sampler.backend,
            "threads": threads,
            "cuda_graph": cuda_graph,
            "host": host_facts(),
            "versions": versions(),
            "repeat": repeat,
            "warmup": warmup,
            "seconds": seconds,
            "load": {"total_s": round(load_s, 6), "stages": {k: round(v, 6) for k, v in sampler.load_s.items()}},
            "results": found,
            "saved": save,
        }
        if save:
            save_latencies(sampler.artifact, {e["budget"]: e["latency_s"]["p50"] for e in found if e["batch"] == 1})
    if as_json:
        print_json(result)
    else:
        _print_table(result)


def _batches(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and 0 < int(part) <= 65536 for part in parts):
        raise click.BadParameter(f"received {text!r}: expected numbers of pictures, such as 1,4", param_hint="--batch")
    return list(dict.fromkeys(map(int, parts)))


def _print_table(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from ..loop.timing import PARTS
    from ..serving.bench import PERCENTILES

    console = Console(highlight=False)
    host, threads = result["host"], result["threads"] or "default"
    console.print(escape(f"{host['cpu']}, {host['cpus']} CPUs, threads: {threads}, {result['backend']}"))
    requests = min(entry["requests"] for entry in result["results"])
    console.print(f"load {1e3 * result['load']['total_s']:.0f} ms; {requests} requests of each; in ms:")
    names = ("min", *(f"p{rank}" for rank in PERCENTILES), "max")
    parts = tuple(part for part in PARTS if any(entry["parts"][part]["max"] > 0 for entry in result["results"]))
    latency, shares = (
        Table(title=title, title_justify="left", box=None) for title in ("Latency", "Median of each part")
    )
    for table, headings in ((latency, names), (shares, parts)):
        for heading in ("budget", "batch", *headings):
            table.add_column(heading, justify="right", no_wrap=True)
    for entry in result["results"]:
        kind = (entry["budget"], str(entry["batch"]))
        latency.add_row(*kind, *(f"{1e3 * entry['latency_s'][name]:.1f}" for name in names))
        shares.add_row(*kind, *(f"{1e3 * entry['parts'][part]['p50']:.1f}" for part in parts))
    print_whole(console, latency)
    print_whole(console, shares)
