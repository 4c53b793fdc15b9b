"""The server's beginning and end: what it needs, where it listens, and how it stops."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import small_artifact as small
from click.testing import CliRunner
from http_server import serving
from spoilt_artifact import spoil

from otcache.runtime import Sampler
from otcache.runtime.cli import main as cli

httpx = pytest.importorskip("httpx")
pytest.importorskip("starlette")


def ask(server, **query):
    """The status; None where no answer came."""
    try:
        return httpx.get(f"{server.address}/picture", params={"prompt": "a", **query}, timeout=60).status_code
    except httpx.TransportError:
        return None


def wait_until(server, **expected):
    """For /readyz to say so."""
    deadline = time.monotonic() + 30
    with httpx.Client() as client:
        while expected.items() - client.get(f"{server.address}/readyz").json().items():
            assert time.monotonic() < deadline
            time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_finishes_what_runs_and_refuses_what_is_new(slow_artifact, number):
    with serving(slow_artifact, "--lowest-budget", "full") as server, ThreadPoolExecutor(3) as clients:
        kept = httpx.Client(base_url=server.address)
        kept.get("/healthz")
        accepted = [clients.submit(ask, server, budget="full", seed=seed) for seed in range(3)]
        wait_until(server, running=1, waiting=2)
        server.process.send_signal(number)
        assert [answer.result() for answer in accepted] == [200, 200, 200]
        assert ask(server) is None
        with pytest.raises(httpx.TransportError):
            kept.get("/readyz")
        assert server.process.wait(30) == 0
        assert server.logged() == ""


def test_what_runs_when_the_grace_is_over_ends_with_a_503(slow_artifact):
    with serving(slow_artifact, "--grace", "0", "--lowest-budget", "full") as server, ThreadPoolExecutor(3) as clients:
        accepted = [clients.submit(ask, server, budget="full", seed=seed) for seed in range(3)]
        wait_until(server, running=1, waiting=2)
        server.process.send_signal(signal.SIGTERM)
        assert set(answer.result() for answer in accepted) <= {200, 503}
        assert accepted[-1].result() == 503
        assert server.process.wait(30) == 0
        assert server.logged() == ""


def test_workers_draw_at_once_and_the_same(slow_artifact):
    with serving(slow_artifact, "--workers", "2") as server, ThreadPoolExecutor(2) as clients:

        def draw(seed):
            query = {"prompt": "a", "budget": "full", "seed": seed}
            return httpx.get(f"{server.address}/picture", params=query, timeout=60).content

        answers = [clients.submit(draw, 1) for _ in range(2)]
        wait_until(server, running=2)
        assert answers[0].result() == answers[1].result() != draw(2)


def test_requests_that_wait_are_drawn_together(slow_artifact):
    options = ("--max-batch", "4", "--lowest-budget", "full")
    with serving(slow_artifact, *options) as server, ThreadPoolExecutor(8) as clients:
        answers = [clients.submit(ask, server, budget="full", seed=seed) for seed in range(8)]
        together = 1
        while together == 1 and not all(answer.done() for answer in answers):
            together = max(together, httpx.get(f"{server.address}/readyz").json()["running"])
        assert 1 < together <= 4
        assert [answer.result() for answer in answers] == [200] * 8


def test_time_that_is_up(slow_artifact):
    with serving(slow_artifact, "--timeout", "0.001") as server:
        found = httpx.get(f"{server.address}/picture", params={"prompt": "a", "budget": "full"})
        assert found.status_code == 504 and "its time was up" in found.json()["error"]["message"]


def test_numbers_that_are_not_finite_are_a_500(tmp_path):
    folder = small.write_artifact(tmp_path / "small")
    spoil(folder, "block_1")
    with serving(folder) as server:
        found = httpx.get(f"{server.address}/picture", params={"prompt": "a", "budget": 2})
        assert found.status_code == 500 and found.json()["error"]["message"].startswith("stage block_1: found numbers")
        (line,) = server.await_logged().splitlines()
        assert json.loads(line)["level"] == "error" and "GET /picture: stage block_1" in json.loads(line)["message"]


def test_silent_connections_are_closed(artifact_folder, monkeypatch):
    """In this process, with a shorter patience."""
    import asyncio

    from otcache.runtime import Service
    from otcache.runtime.server import serve

    monkeypatch.setattr(serve, "HEAD_S", 0.2)

    async def talk(port, *parts):
        """Until the server closes the connection: how often it answered."""
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for part in parts:
            writer.write(part)
            await asyncio.sleep(0.1)
        found = await asyncio.wait_for(reader.read(), 30)
        writer.close()
        return found.count(b"HTTP/1.1 200")

    async def play(service, bound):
        config = serve.uvicorn.Config(
            serve.make_app(service), http=serve.PatientProtocol, ws="none", lifespan="off", log_config=None
        )
        server = serve.uvicorn.Server(config)
        task = asyncio.create_task(server.serve(sockets=[bound]))
        while not server.started:
            await asyncio.sleep(0.01)
        port, whole = bound.getsockname()[1], b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n"
        talks = (talk(port), talk(port, b"GET /he"), talk(port, whole, b"GET "), talk(port, whole[:9], whole[9:]))
        answers = await asyncio.gather(*talks)
        server.should_exit = True
        await task
        return answers

    with Service(Sampler.load(artifact_folder)) as service, serve.bound_socket("127.0.0.1", 0) as bound:
        assert asyncio.run(play(service, bound)) == [0, 0, 1, 1]


def test_an_address_that_is_taken(artifact_folder):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        result = CliRunner().invoke(cli.main, ["serve", str(artifact_folder), "--port", port])
    assert result.exit_code == 6 and len(result.stderr.splitlines()) == 1
    assert f"127.0.0.1 port {port} cannot be served at" in result.stderr and "another --host or --port" in result.stderr
    result = CliRunner().invoke(cli.main, ["serve", str(artifact_folder), "--host", "no such host"])
    assert result.exit_code == 6 and "no such host port 8000" in result.stderr


def test_a_floor_that_is_no_budget(artifact_folder):
    result = CliRunner().invoke(cli.main, ["serve", str(artifact_folder), "--port", "0", "--lowest-budget", "7"])
    assert result.exit_code == 2 and "expected one of 2, 3, full" in result.stderr


@pytest.mark.parametrize("missing", ["starlette", "uvicorn", "prometheus_client"])
def test_without_its_packages_it_says_what_to_install(artifact_folder, monkeypatch, missing):
    import otcache.runtime.server

    loaded = [name for name in sys.modules if name.startswith(("otcache.runtime.server.", f"{missing}."))]
    for name in loaded:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(otcache.runtime.server, "serve", raising=False)
    monkeypatch.setitem(sys.modules, missing, None)
    result = CliRunner().invoke(cli.main, ["serve", str(artifact_folder)])
    assert result.exit_code == 6 and len(result.stderr.splitlines()) == 1
    assert "pip install 'otcache[server]'" in result.stderr and missing in result.stderr


def test_the_base_install_does_not_import_it():
    code = (
        "import sys, otcache.runtime.cli.main, otcache.runtime.cli.serve, otcache.runtime.serving.service;"
        "print({'starlette', 'uvicorn', 'prometheus_client'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
