"""Real Ray clusters of two nodes on this machine, and `otc` run on them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

STORE_BYTES = 100 << 20
ATTEMPTS = 3
"""To start a cluster: Ray gives a node half a minute, and a busy host takes longer."""
COMPILE = (
    *("--budgets", "2,4", "--num-inference-steps", "8", "--calibration-prompts", "8", "--evaluation-prompts", "4"),
    *("--trials", "4", "--threads", "1", "--micro-batch", "1", "--engines", "none"),
)
"""A compile that is small enough for tests, whose micro-batches occupy every worker."""


@contextlib.contextmanager
def two_nodes(first: int = 1, second: int = 1) -> Iterator:
    """A cluster whose nodes have so many cores each."""
    from ray.cluster_utils import Cluster

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    options = {"object_store_memory": STORE_BYTES, "include_dashboard": False}
    for attempt in range(ATTEMPTS):
        cluster = Cluster()
        try:
            cluster.add_node(num_cpus=first, **options)
            cluster.add_node(num_cpus=second, object_store_memory=STORE_BYTES)
            break
        except Exception:
            cluster.shutdown()
            if attempt == ATTEMPTS - 1:
                raise
    try:
        yield cluster
    finally:
        cluster.shutdown()


class Otc:
    """`otc` in a process of its own, as a shell starts it."""

    def __init__(self, *arguments: str, workspace: Path, log: Path) -> None:
        self.log = log
        log.mkdir(parents=True)
        with open(log / "out", "w") as out, open(log / "err", "w") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "otcache.runtime.cli.main", *arguments, "--json"],
                env={**os.environ, "OTC_CACHE": str(workspace), "OMP_NUM_THREADS": "1"},
                stdout=out,
                stderr=err,
                start_new_session=True,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
            )

    @property
    def stderr(self) -> str:
        return (self.log / "err").read_text()

    @property
    def result(self) -> dict:
        return json.loads((self.log / "out").read_text())

    @property
    def events(self) -> list[dict]:
        return [json.loads(line) for line in self.stderr.splitlines() if line[:1] == "{"]

    def until(self, text: str, timeout_s: float = 300) -> None:
        """Wait until it has written `text` to stderr, or has ended."""
        end = time.monotonic() + timeout_s
        while text not in self.stderr and self.process.poll() is None and time.monotonic() < end:
            time.sleep(0.02)

    def wait(self, timeout_s: float = 600) -> int:
        """Its exit status."""
        return self.process.wait(timeout_s)


def workers() -> list[psutil.Process]:
    """Processes of our workers that descend from this one."""
    return [each for each in processes_below() if "ray::Worker" in name_of(each)]


def processes_below(pid: int | None = None) -> list[psutil.Process]:
    """All that descend from a process, by default this one."""
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def name_of(process: psutil.Process) -> str:
    """As `ps` shows it."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def gone(processes: list[psutil.Process], timeout_s: float = 30) -> list[str]:
    """Those that are still there after a while, by name."""
    _, alive = psutil.wait_procs(processes, timeout=timeout_s)
    return [f"{each.pid} {name_of(each)}" for each in alive if each.status() != psutil.STATUS_ZOMBIE]


def wait_for(condition: Callable[[], bool], timeout_s: float = 60) -> bool:
    """Whether something has come true."""
    end = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True
