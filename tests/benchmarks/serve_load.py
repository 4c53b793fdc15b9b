"""`otc serve` under load: clients that ask again as soon as they are answered.

    python tests/benchmarks/serve_load.py ARTIFACT [--clients 64] [--seconds 60] [--budget N]

Starts the server as a process of its own on this host, with its defaults. A client that is refused (503) waits for as
long as it is told, a second at least. Prints JSON: pictures a second, latencies of the answered ones in seconds from
the first try of a request (`with_retries`) and from its last, statuses, budgets that were served, and the server's
memory before, at most, and after.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from otcache.runtime.serving.bench import host_facts, statistics_of, versions

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from http_server import Server, serving

PROMPTS = ("a small red ring on blue", "a large green star on black", "a striped yellow circle on purple")


@dataclass
class Seen:
    statuses: Counter[str] = field(default_factory=Counter)
    budgets: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    """Of answered requests, from the last try."""
    seconds_with_retries: list[float] = field(default_factory=list)
    memory_bytes: list[int] = field(default_factory=list)


async def ask_again(client: httpx.AsyncClient, number: int, until: float, budget: str | None, seen: Seen) -> None:
    """One client, until it is time."""
    count, first = 0, time.monotonic()
    while (now := time.monotonic()) < until:
        query = {"prompt": PROMPTS[(number + count) % len(PROMPTS)], "seed": str(1000 * number + count)}
        found = await client.get("/picture", params={**query, **({"budget": budget} if budget else {})})
        seen.statuses[str(found.status_code)] += 1
        if found.status_code == 503:
            await asyncio.sleep(min(float(found.headers["Retry-After"]), until - now))
            continue
        if found.status_code == 200:
            seen.budgets[found.headers["X-Budget"]] += 1
            seen.seconds.append(time.monotonic() - now)
            seen.seconds_with_retries.append(time.monotonic() - first)
        count, first = count + 1, time.monotonic()


async def watch_memory(process: psutil.Process, seen: Seen) -> None:
    while True:
        seen.memory_bytes.append(process.memory_info().rss)
        await asyncio.sleep(0.2)


async def load(server: Server, clients: int, seconds: float, budget: str | None) -> Seen:
    """What the clients saw."""
    seen, process = Seen(), psutil.Process(server.process.pid)
    seen.memory_bytes.append(process.memory_info().rss)
    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(base_url=server.address, timeout=120, limits=limits) as client:
        watching = asyncio.create_task(watch_memory(process, seen))
        until = time.monotonic() + seconds
        await asyncio.gather(*(ask_again(client, number, until, budget, seen) for number in range(clients)))
        watching.cancel()
    seen.memory_bytes.append(process.memory_info().rss)
    return seen


def summary(seen: Seen, wall_s: float) -> dict[str, Any]:
    memory = seen.memory_bytes
    return {
        "pictures_a_second": round(len(seen.seconds) / wall_s, 2),
        "latency_s": statistics_of(seen.seconds),
        "latency_with_retries_s": statistics_of(seen.seconds_with_retries),
        "statuses": dict(sorted(seen.statuses.items())),
        "refused_503": seen.statuses["503"],
        "budgets": dict(seen.budgets.most_common()),
        "memory_bytes": {"before": memory[0], "most": max(memory), "after": memory[-1]},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--budget", help="that every request asks for; left out: the highest that the load allows")
    parser.add_argument("--serve", default="", help="options of otc serve, such as '--workers 2'")
    options = parser.parse_args()
    busy = round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None
    with serving(options.artifact, *options.serve.split()) as server:
        start = time.monotonic()
        seen = asyncio.run(load(server, options.clients, options.seconds, options.budget))
        wall_s = time.monotonic() - start
        server.process.terminate()
        code, logged = server.process.wait(60), server.logged()
    host = {name: value for name, value in host_facts().items() if name != "name"}
    host["load_average_before"] = busy
    what = {"clients": options.clients, "seconds": round(wall_s, 1), "serve": options.serve, "budget": options.budget}
    ended = {"exit_code": code, "logged_lines": len(logged.splitlines())}
    print(json.dumps({**what, **summary(seen, wall_s), **ended, "host": host, "versions": versions()}, indent=1))


if __name__ == "__main__":
    main()
