"""A real `tritonserver` with a model repository, of what PyPI's nvidia-pytriton carries, on free ports of this host.

`OTC_TRITON` names a folder that `INSTALL` fills. The Python backend's stub there is linked against the system's Python,
reads no PYTHONPATH, begins its search for modules in its working folder, and was built for numpy 1.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pages
import pytest

ROOT = Path(__file__).parents[2]
INSTALL = (
    "pip install --no-deps --target /tmp/triton/server nvidia-pytriton; "
    "pip install --target /tmp/triton/python . 'numpy<2'; "
    "pip install 'tritonclient[http,grpc]'; "
    "OTC_TRITON=/tmp/triton pytest tests/runtime/deploy/test_triton.py"
)
READY_S = 60.0


@dataclass(frozen=True)
class Triton:
    http: str
    """`127.0.0.1:40000`"""
    grpc: str
    metrics: str
    log: Path

    def logged(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")


def triton_folder() -> Path:
    """Where the server is; skips the test where there is none."""
    folder = Path(os.environ.get("OTC_TRITON", "/nowhere"))
    if not (folder / "server/pytriton/tritonserver/bin/tritonserver").is_file():
        pytest.skip(f"no tritonserver here; to run it: {INSTALL}", allow_module_level=True)
    return folder


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@contextmanager
def serving_triton(repository: Path, work: Path, *options: str) -> Iterator[Triton]:
    """A server that is ready; ended afterwards. work: an empty folder for what it needs."""
    folder = triton_folder()
    server = folder / "server/pytriton/tritonserver"
    backend = Path(shutil.copytree(server / "backends/python", work / "backends/python"))
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    shutil.copy(server / "python_backend_stubs" / version / "triton_python_backend_stub", backend)
    modules = work / "modules"
    (modules / "otcache").mkdir(parents=True)
    for part in ("schemas", "runtime"):
        (modules / "otcache" / part).symlink_to(ROOT / part)
    for entry in (folder / "python").iterdir():
        if entry.name != "otcache":
            (modules / entry.name).symlink_to(entry)
    http, grpc, metrics = free_ports(3)
    line = pages.command_line("runtime/README.md", "tritonserver")
    line = [str(server / "bin" / line[0]), *line[1:-1], str(repository)]
    line += ["--backend-directory", str(work / "backends"), "--http-address", "127.0.0.1", "--grpc-address"]
    line += ["127.0.0.1", "--http-port", str(http), "--grpc-port", str(grpc), "--metrics-port", str(metrics)]
    line += ["--exit-timeout-secs", "1", *options]
    environment = {**os.environ, "LD_LIBRARY_PATH": str(folder / "server/nvidia_pytriton.libs"), "OMP_NUM_THREADS": "1"}
    environment |= {"PYTHONDONTWRITEBYTECODE": "1"}
    log = work / "log"
    with log.open("w") as out:
        process = subprocess.Popen(line, cwd=modules, env=environment, stdout=out, stderr=subprocess.STDOUT)
    triton = Triton(f"127.0.0.1:{http}", f"127.0.0.1:{grpc}", f"127.0.0.1:{metrics}", log)
    try:
        end = time.monotonic() + READY_S
        while not _is_ready(triton.http):
            assert process.poll() is None and time.monotonic() < end, triton.logged()
            time.sleep(0.05)
        yield triton
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _is_ready(address: str) -> bool:
    try:
        with urlopen(f"http://{address}/v2/health/ready", timeout=5) as answer:
            return bool(answer.status == 200)
    except (URLError, OSError):
        return False
