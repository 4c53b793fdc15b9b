"""Runs `otc` in processes that can be killed, forked from one that has imported everything: minutes less per test.

Started as `python forks.py`; one JSON request a line on stdin ({"arguments", "environment", "stdout", "stderr"}),
answered with {"pid"} when the process has started and with {"status"} (negative: the signal that ended it) when it is
gone.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path


class Forks:
    """The client's side."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}  # threads do not survive a fork
        self.server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def start(self, *arguments: str, workspace: Path, log: Path) -> int:
        """Start `otc …`; returns its process id. Its stdout goes to `<log>.out`, stderr to `<log>.err`."""
        self.log = log
        request = {
            "arguments": list(arguments),
            "environment": {"OTC_CACHE": str(workspace)},
            "stdout": f"{log}.out",
            "stderr": f"{log}.err",
        }
        assert self.server.stdin and self.server.stdout
        print(json.dumps(request), file=self.server.stdin, flush=True)
        return int(json.loads(self.server.stdout.readline())["pid"])

    def wait(self) -> int:
        """Wait for the process's end; its exit status, or minus the signal's number."""
        assert self.server.stdout
        return int(json.loads(self.server.stdout.readline())["status"])

    def run(self, *arguments: str, workspace: Path, log: Path) -> int:
        """Start and wait."""
        self.start(*arguments, workspace=workspace, log=log)
        return self.wait()

    def until(self, text: str, timeout_s: float = 300) -> None:
        """Wait until the process has written `text` to stderr, or has ended."""
        end = time.monotonic() + timeout_s
        while text not in self.stderr and time.monotonic() < end:
            time.sleep(0.02)

    @property
    def stderr(self) -> str:
        path = Path(f"{self.log}.err")
        return path.read_text() if path.exists() else ""

    @property
    def events(self) -> list[dict]:
        """JSON events on stderr."""
        return [json.loads(line) for line in self.stderr.splitlines() if line.startswith("{")]

    @property
    def result(self) -> dict:
        """JSON on stdout."""
        return json.loads(Path(f"{self.log}.out").read_text())

    def close(self) -> None:
        assert self.server.stdin
        self.server.stdin.close()
        self.server.wait(timeout=60)


def _child(request: dict) -> int:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    for path, descriptor in ((request["stdout"], 1), (request["stderr"], 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    os.environ.update(request["environment"])
    from otcache.runtime.cli.main import main

    try:
        main(request["arguments"])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def serve() -> None:
    """Import what a compile needs, then fork at every request."""
    import torch

    torch.set_num_threads(1)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                status = _child(json.loads(line))
            finally:
                sys.stdout.flush()
                os._exit(status)
        print(json.dumps({"pid": pid}), flush=True)
        _, status = os.waitpid(pid, 0)
        print(json.dumps({"status": os.waitstatus_to_exitcode(status)}), flush=True)


if __name__ == "__main__":
    serve()
