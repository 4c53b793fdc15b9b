"""Serve thousands of requests of mixed budgets and batches from one process, and watch its memory and handles.

    python tests/benchmarks/soak.py artifacts/shapes [--requests 2000] [--batches 1,2,3,4] [--clients 4] [--threads 1]

Clients submit to one `Service`, some cancel. A tenth of the requests warms the process up (every budget and batch comes
twice); resident memory and open handles are read then, and after every twentieth of the rest. Linux. Prints JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import sys
import threading
import time
from concurrent.futures import CancelledError
from itertools import product
from pathlib import Path
from typing import Any

from otcache.runtime import BusyError, Sampler, Service

PROMPTS = ("a red ring", "a small blue star on white", "zebra", "")
SAMPLES = 20


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def handles() -> int:
    return len(os.listdir("/proc/self/fd"))


def workload(budgets: tuple[str, ...], batches: list[int], count: int) -> list[dict[str, Any]]:
    """`count` requests, the same for the same arguments: every budget and batch twice, then at random."""
    draw = random.Random(0)
    kinds = list(product(budgets, batches)) * 2
    kinds += [(draw.choice(budgets), draw.choice(batches)) for _ in range(count - len(kinds))]
    return [
        {"prompt": draw.choice(PROMPTS), "budget": budget, "images_per_prompt": batch, "seed": draw.randrange(1 << 32)}
        for budget, batch in kinds
    ]


class Clients:
    """Threads that share lists of requests; every fiftieth is cancelled."""

    def __init__(self, service: Service, count: int) -> None:
        self._service, self._count = service, count
        self._lock = threading.Lock()
        self.taken, self.served, self.cancelled, self.busy = 0, 0, 0, 0

    def serve(self, requests: list[dict[str, Any]]) -> None:
        """Return when all have ended."""
        rest = iter(requests)
        threads = [threading.Thread(target=self._client, args=(rest,)) for _ in range(self._count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _client(self, rest: Any) -> None:
        while True:
            with self._lock:
                arguments = next(rest, None)
                self.taken += 1
                number = self.taken
            if arguments is None:
                return
            request = None
            while request is None:
                try:
                    request = self._service.submit(**arguments)
                except BusyError:
                    with self._lock:
                        self.busy += 1
                    time.sleep(0.01)
            stopped = number % 50 == 0 and request.cancel()
            try:
                request.result()
            except CancelledError:
                assert stopped
            with self._lock:
                self.cancelled += stopped
                self.served += not stopped


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--batches", default="1,2,3,4")
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    start = time.perf_counter()
    at_start = handles()
    with Service(
        Sampler.load(options.artifact, threads=options.threads), capacity=max(1, options.clients - 2)
    ) as service:
        batches = [int(part) for part in options.batches.split(",")]
        requests = workload(service.sampler.budgets, batches, options.requests)
        clients = Clients(service, options.clients)
        warmup = max(2 * len(batches) * len(service.sampler.budgets), options.requests // 10)
        clients.serve(requests[:warmup])
        gc.collect()
        memory, files = [resident_bytes()], [handles()]
        rest = requests[warmup:]
        for index in range(SAMPLES):
            clients.serve(rest[index * len(rest) // SAMPLES : (index + 1) * len(rest) // SAMPLES])
            gc.collect()
            memory.append(resident_bytes())
            files.append(handles())
            print(f"{index + 1}/{SAMPLES}: {memory[-1] / 1e6:.1f} MB, {files[-1]} handles", file=sys.stderr)
        threads = threading.active_count()
    gc.collect()
    print(
        json.dumps(
            {
                "artifact": str(options.artifact),
                "requests": options.requests,
                "warmup": warmup,
                "batches": batches,
                "clients": options.clients,
                "served": clients.served,
                "cancelled": clients.cancelled,
                "refused": clients.busy,
                "resident_bytes": memory,
                "growth": round(max(memory) / memory[0] - 1, 5),
                "growth_at_the_end": round(memory[-1] / memory[0] - 1, 5),
                "handles": files,
                "handles_before_load": at_start,
                "handles_after_close": handles(),
                "threads": [threads, threading.active_count()],
                "seconds": round(time.perf_counter() - start, 1),
            }
        )
    )


if __name__ == "__main__":
    main()
