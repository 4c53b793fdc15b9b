"""The server of runtime/README.md, started as it says, over real HTTP with concurrent clients."""

import io
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import small_artifact as small
from click.testing import CliRunner
from PIL import Image

from otcache.runtime import Sampler
from otcache.runtime.cli import main as cli
from otcache.runtime.pictures import to_uint8

httpx = pytest.importorskip("httpx")
pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

PAGE = (Path(__file__).parents[3] / "runtime" / "README.md").read_text(encoding="utf-8")
CODE = re.search(r"```python server\.py\n(.*?)```", PAGE, re.DOTALL).group(1)
CAPACITY = int(re.search(r"capacity=(\d+)", CODE).group(1))
MANY = 600
"""Steps of the artifact's full program: long enough for requests to overlap."""


@pytest.fixture(scope="module")
def slow_artifact(artifact_folder, tmp_path_factory):
    """The small artifact with a full program of thousands of steps."""
    folder = Path(shutil.copytree(artifact_folder, tmp_path_factory.mktemp("slow") / "small"))
    value = small.read_manifest(folder)
    for part in ("sampler", "reference", "anchor"):
        value[part]["num_inference_steps"] = MANY
    steps = [
        {"step_index": i, "timestep": 1000 * (1 - i / MANY), "latent_coef": 1.0, "output_coefs": [-1 / MANY]}
        for i in range(MANY)
    ]
    value["programs"][-1]["program"]["steps"] = steps
    small.write_manifest(folder, value)
    return folder


@pytest.fixture(scope="module")
def server(slow_artifact, tmp_path_factory):
    """(address, process, what it has logged) of the running server."""
    folder = tmp_path_factory.mktemp("server")
    (folder / "server.py").write_text(CODE, encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = folder / "log.txt"
    with open(log, "w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "uvicorn", "server:app", "--host", "127.0.0.1", "--port", str(port)],
            cwd=folder,
            env={**os.environ, "OTC_ARTIFACT": str(slow_artifact)},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    address = f"http://127.0.0.1:{port}/"
    try:
        for _ in range(300):
            try:
                httpx.get(address + "none")
                break
            except httpx.ConnectError:
                assert process.poll() is None, log.read_text()
                time.sleep(0.1)
        yield address, process, log
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def client():
    with httpx.Client(timeout=60, limits=httpx.Limits(max_connections=200)) as client:
        yield client


def test_the_server_is_short():
    assert len(CODE.splitlines()) <= 40


def test_a_picture_is_what_otc_run_draws(server, client, slow_artifact, tmp_path):
    out = tmp_path / "ring.png"
    result = CliRunner().invoke(
        cli.main, ["run", str(slow_artifact), "--budget", "3", "--prompt", "a red ring", "--seed", "7", "-o", str(out)]
    )
    assert result.exit_code == 0, result.output
    found = client.get(server[0], params={"prompt": "a red ring", "budget": 3, "seed": 7})
    assert (
        found.status_code == 200 and found.headers["content-type"] == "image/png" and found.headers["x-budget"] == "3"
    )
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(found.content))), np.asarray(Image.open(out)))


def test_concurrent_clients(server, client, slow_artifact):
    """As many as the server bears without a lower budget; every picture is the sampler's."""
    requests = [
        {"prompt": prompt, "budget": budget, "seed": seed}
        for prompt in ("a red ring", "a blue star", "")
        for budget in (2, 3)
        for seed in range(-2, 4)
    ]
    with Sampler.load(slow_artifact) as sampler:
        expected = [to_uint8(sampler(**request))[0] for request in requests]
    with ThreadPoolExecutor(6) as clients:
        found = list(clients.map(lambda request: client.get(server[0], params=request), requests))
    for response, picture, request in zip(found, expected, requests, strict=True):
        assert response.status_code == 200 and response.headers["x-budget"] == str(request["budget"])
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(response.content))), picture)


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ({}, "expected a prompt"),
        ({"prompt": "a", "seed": "x"}, "whole number as seed"),
        ({"prompt": "a", "seed": "1" * 30}, "whole number as seed"),
        ({"prompt": "a", "seed": "-9999999999999999999"}, "seed is"),
        ({"prompt": "a", "budget": "9"}, "expected one of 2, 3, full"),
        ({"prompt": "a", "budget": "\n"}, "expected one of 2, 3, full"),
    ],
)
def test_bad_requests(server, client, query, words):
    found = client.get(server[0], params=query)
    assert found.status_code == 400 and words in found.json()["error"] and "\n" not in found.json()["error"]


def test_other_paths_and_methods(server, client):
    assert client.get(server[0] + "other").status_code == 404
    assert client.post(server[0]).status_code == 405


def test_clients_that_leave(server, client, slow_artifact):
    """One that runs and four that wait hang up: the next request is served at once, not after them."""
    with Sampler.load(slow_artifact) as sampler:
        start = time.perf_counter()
        sampler("a", budget="full")
        full_s = time.perf_counter() - start

    def leave(number):
        with pytest.raises(httpx.ReadTimeout):
            client.get(server[0], params={"prompt": "a", "budget": "full", "seed": number}, timeout=full_s / 3)

    with ThreadPoolExecutor(5) as clients:
        list(clients.map(leave, range(5)))
    start = time.perf_counter()
    assert client.get(server[0], params={"prompt": "a", "budget": 2}).status_code == 200
    assert time.perf_counter() - start < 2 * full_s


def test_overload(server, client):
    """More than twice as many requests as fit: 503 for what is too much, lower budgets for the rest."""
    count = 3 * (CAPACITY + 1)
    together = threading.Barrier(count)

    def ask(number):
        together.wait()
        return client.get(server[0], params={"prompt": "a", "seed": number})

    with ThreadPoolExecutor(count) as clients:
        found = list(clients.map(ask, range(count)))
    refused = [response for response in found if response.status_code == 503]
    served = [response for response in found if response.status_code == 200]
    assert len(refused) + len(served) == count and len(served) > CAPACITY and refused
    for response in refused:
        assert int(response.headers["retry-after"]) >= 1 and "queue is full" in response.json()["error"]
    assert {response.headers["x-budget"] for response in served} & {"2", "3"}


def test_it_stops_when_told_to(server, client):
    """Last in this file: a running request ends with it, nothing is logged as an unexpected error."""
    address, process, log = server

    def ask():
        try:
            return client.get(address, params={"prompt": "a", "budget": "full"}).status_code
        except httpx.HTTPError:
            return None

    with ThreadPoolExecutor(1) as clients:
        answer = clients.submit(ask)
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=30)
        answer.result()
    assert "Traceback" not in log.read_text()
