"""`otc serve` as a process of its own, on a free port."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Server:
    address: str
    """`http://127.0.0.1:40000`"""
    process: subprocess.Popen[str]
    log: Path
    """Its stderr."""

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    def logged(self) -> str:
        return self.log.read_text(encoding="utf-8")

    def await_logged(self, timeout_s: float = 60.0) -> str:
        """What is logged once there is a whole line: it goes through a pipe, and may come after the answer."""
        end = time.monotonic() + timeout_s
        while not self.logged().endswith("\n") and time.monotonic() < end:
            time.sleep(0.02)
        return self.logged()


@contextmanager
def serving(artifact: Path, *options: str) -> Iterator[Server]:
    """A server that has started; killed at the end, unless it has ended before."""
    code = "from otcache.runtime.cli.main import main; main(prog_name='otc')"
    line = [sys.executable, "-c", code, "serve", str(artifact), "--port", "0", "--json", *options]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "stderr")
        with log.open("w", encoding="utf-8") as stderr:
            environment = {"OMP_NUM_THREADS": "1", **os.environ}
            process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment)
        try:
            assert process.stdout is not None
            started = process.stdout.readline()
            assert started, log.read_text(encoding="utf-8")
            yield Server(json.loads(started)["address"], process, log)
        finally:
            process.kill()
            process.wait()
            process.stdout.close()
