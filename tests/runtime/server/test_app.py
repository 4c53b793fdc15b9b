"""`otc serve` over real HTTP: pictures, OpenAI's form, refusals, load, clients that leave, health and metrics."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import re
import socket
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from otcache.runtime import Sampler
from otcache.runtime.cli import main as cli
from otcache.runtime.pictures import to_uint8

httpx = pytest.importorskip("httpx")
bodies = pytest.importorskip("otcache.runtime.server.bodies", exc_type=ImportError)
fields = pytest.importorskip("otcache.runtime.server.fields", exc_type=ImportError)
serve = pytest.importorskip("otcache.runtime.server.serve", exc_type=ImportError)
openapi = pytest.importorskip("otcache.runtime.server.openapi", exc_type=ImportError)

CAPACITY = 8  # as in conftest.py


@pytest.fixture(scope="module")
def client(server):
    limits = httpx.Limits(max_connections=200)
    with httpx.Client(base_url=server.address, timeout=60, limits=limits) as client:
        yield client


def pixels(data):
    return np.asarray(Image.open(io.BytesIO(data)))


def metric(client, line):
    """The value of a line of /metrics; 0 where it has not been counted yet."""
    found = re.search(rf"^{re.escape(line)} (\S+)$", client.get("/metrics").text, re.MULTILINE)
    return float(found.group(1)) if found else 0.0


# --- pictures


def test_a_picture_is_what_otc_run_draws(client, slow_artifact, tmp_path):
    out = tmp_path / "ring.png"
    result = CliRunner().invoke(
        cli.main, ["run", str(slow_artifact), "--budget", "3", "--prompt", "a red ring", "--seed", "7", "-o", str(out)]
    )
    assert result.exit_code == 0, result.output
    found = client.get("/picture", params={"prompt": "a red ring", "budget": 3, "seed": 7})
    assert found.status_code == 200 and found.headers["content-type"] == "image/png"
    assert found.headers["x-budget"] == "3" and "draw;dur=" in found.headers["server-timing"]
    np.testing.assert_array_equal(pixels(found.content), np.asarray(Image.open(out)))


@pytest.mark.parametrize("kind", ["jpeg", "webp"])
def test_other_formats(client, kind):
    found = client.get("/picture", params={"prompt": "a", "budget": 2, "output_format": kind})
    assert found.headers["content-type"] == f"image/{kind}"
    assert Image.open(io.BytesIO(found.content)).format == kind.upper()


def test_head_draws_nothing(client):
    before = metric(client, 'otcache_pictures_total{budget="full"}')
    found = client.head("/picture", params={"prompt": "a", "budget": "full"})
    assert found.status_code == 200 and found.headers["content-type"] == "image/png" and not found.content
    assert client.head("/picture", params={"prompt": "a", "budget": "9"}).status_code == 400
    assert client.get("/readyz").json()["running"] == 0
    assert metric(client, 'otcache_pictures_total{budget="full"}') == before


def test_concurrent_clients(client, slow_artifact):
    """Fewer than lower the budget; every picture is the sampler's."""
    requests = [
        {"prompt": prompt, "budget": budget, "seed": seed}
        for prompt in ("a red ring", "")
        for budget in (2, 3)
        for seed in range(-2, 4)
    ]
    with Sampler.load(slow_artifact) as sampler:
        expected = [to_uint8(sampler(**request))[0] for request in requests]
    with ThreadPoolExecutor(4) as clients:
        found = list(clients.map(lambda request: client.get("/picture", params=request), requests))
    for response, picture, request in zip(found, expected, requests, strict=True):
        assert response.status_code == 200 and response.headers["x-budget"] == str(request["budget"])
        np.testing.assert_array_equal(pixels(response.content), picture)


def test_openais_own_client(server, slow_artifact):
    """An existing client, with this server's fields beside its own."""
    openai = pytest.importorskip("openai")
    with Sampler.load(slow_artifact) as sampler:
        expected = to_uint8(sampler("a red ring", budget=2, seed=5, images_per_prompt=3))
    with openai.OpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0) as client:
        extra = {"seed": 5}
        found = client.images.generate(
            prompt="a red ring", model="small", n=3, size="4x4", quality="low", user="me", extra_body=extra
        )
        assert found.created > 0 and found.output_format == "png" and found.size == "4x4"
        for entry, picture in zip(found.data, expected, strict=True):
            np.testing.assert_array_equal(pixels(base64.b64decode(entry.b64_json)), picture)
        with pytest.raises(openai.NotFoundError, match="model is 'dall-e-3': expected 'small'"):
            client.images.generate(prompt="a", model="dall-e-3")
        with pytest.raises(openai.BadRequestError, match=r"style is no parameter of this request") as caught:
            client.images.generate(prompt="a", style="vivid")
        assert caught.value.param == "style"
        with pytest.raises(openai.BadRequestError, match=r"response_format is 'url'"):
            client.images.generate(prompt="a", response_format="url")


# --- refusals


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ({}, "prompt is missing"),
        ({"prompt": "a", "steps": "9"}, "steps is no parameter of this request: expected some of prompt, "),
        ([("prompt", "a"), ("prompt", "b")], "prompt is given twice"),
        ({"prompt": "a" * (fields.MOST_CHARACTERS + 1)}, f"at most {fields.MOST_CHARACTERS} characters"),
        ({"prompt": "a", "seed": "x"}, "seed is 'x'"),
        ({"prompt": "a", "seed": "1_0"}, "seed is '1_0'"),
        ({"prompt": "a", "seed": "1" * 30}, "seed is "),
        ({"prompt": "a", "seed": "-9999999999999999999"}, "seed is "),
        ({"prompt": "a", "guidance_scale": "nan"}, "guidance_scale is 'nan'"),
        ({"prompt": "a", "budget": "9"}, "expected one of 2, 3, full"),
        ({"prompt": "a", "budget": "\n"}, "expected one of 2, 3, full"),
        ({"prompt": "a", "budget": "2", "minimum_budget": "3"}, "minimum_budget is '3'"),
        ({"prompt": "a", "height": "32"}, "height is 32"),
        ({"prompt": "a", "output_format": "gif"}, "the artifact draws pictures"),
    ],
)
def test_bad_queries(client, query, words):
    found = client.get("/picture", params=query)
    error = found.json()["error"]
    assert found.status_code == 400 and words in error["message"] and "\n" not in error["message"]
    assert error["type"] == "invalid_request_error" and error["code"] == "bad_request"


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ("{", 400, "body: found "),
        ("[]", 400, "expected a JSON object"),
        ('{"prompt": "a", "prompt": "b"}', 400, "'prompt' twice"),
        ('{"prompt": "a", "stream": true}', 400, "stream is no parameter"),
        ('{"prompt": ["a"]}', 400, "prompt is ['a']"),
        ('{"prompt": "a", "n": 0}', 400, "n is 0"),
        ('{"prompt": "a", "n": 5}', 400, "expected at most 4"),
        ('{"prompt": "a", "n": true}', 400, "n is True"),
        ('{"prompt": "a", "size": "4"}', 400, "size is '4'"),
        ('{"prompt": "a", "size": "8x4"}', 400, "width is 8"),
        ('{"prompt": "a", "quality": "low", "budget": 2}', 400, "budget and quality"),
        ('{"prompt": "' + "a" * bodies.MOST_BYTES + '"}', 413, f"expected at most {bodies.MOST_BYTES} bytes"),
    ],
)
def test_bad_bodies(client, body, status, words):
    found = client.post("/v1/images/generations", content=body, headers={"content-type": "application/json"})
    assert found.status_code == status and words in found.json()["error"]["message"]
    assert "restore" not in found.json()["error"]["message"]


def test_a_body_of_another_kind(client):
    found = client.post("/v1/images/generations", content="prompt=a")
    assert found.status_code == 415 and found.headers["connection"] == "close"


@pytest.mark.parametrize("path", ["/", "/healthz", "/metrics", "/artifact", "/openapi.json", "/v1/images/generations"])
def test_queries_where_none_is_taken(client, path):
    found = client.request("POST" if path.startswith("/v1") else "GET", path, params={"verbose": "1"})
    assert found.status_code == 400 and "verbose is no parameter of" in found.json()["error"]["message"]


def test_other_paths_and_methods(client):
    for method, path, status in (("GET", "/other", 404), ("POST", "/picture", 405), ("GET", "/v1/images/edits", 404)):
        found = client.request(method, path)
        assert found.status_code == status and f"{method} {path} is not served" in found.json()["error"]["message"]


def sent(server, *parts, most_s=30.0):
    """What the server answers to bytes on a connection of their own; b"" if it closes without a word."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=most_s) as connection:
        for part in parts:
            connection.sendall(part)
        return connection.recv(65536)


@pytest.mark.parametrize(
    "head",
    [
        b"GET /picture?prompt=a HTTP/1.1\r\nHost: a\r\nContent-Length: 256000000\r\n\r\n",
        b"GET /picture?prompt=a HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"POST /v1/images/generations HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
        b"Content-Length: 256000000\r\n\r\n",
    ],
)
def test_a_body_is_refused_before_it_comes(server, head):
    answer = sent(server, head)
    assert answer.startswith(b"HTTP/1.1 413 ") and b"connection: close" in answer.lower()


def test_a_body_in_chunks_is_refused_at_the_limit(server):
    head = b"POST /v1/images/generations HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
    chunk = b"8000\r\n" + b" " * 0x8000 + b"\r\n"
    answer = sent(server, head + b"Transfer-Encoding: chunked\r\n\r\n", *[chunk] * 3)
    assert answer.startswith(b"HTTP/1.1 413 ")


def test_large_bodies_leave_memory_as_it_was(server, client):
    psutil = pytest.importorskip("psutil")
    process = psutil.Process(server.process.pid)
    before = process.memory_info().rss

    def ask(_):
        parts = (bytes(1 << 20) for _ in range(64))
        try:
            return client.request("GET", "/picture", params={"prompt": "a"}, content=parts).status_code
        except httpx.TransportError:
            return 413  # the connection was closed while the body was sent

    with ThreadPoolExecutor(8) as clients:
        assert set(clients.map(ask, range(8))) == {413}
    assert process.memory_info().rss - before < 64 << 20


# --- clients that leave, and load


def test_clients_that_leave_while_they_speak(server, client):
    head = b"POST /v1/images/generations HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
    for length in (b"100", b"0"):
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(head + b"Content-Length: " + length + b'\r\n\r\n{"prompt": ')
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(b"GET /pict")
    deadline = time.monotonic() + 30
    while not metric(client, 'otcache_http_requests_total{path="/v1/images/generations",status="499"}'):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert server.logged() == ""


def test_clients_that_leave_while_they_are_served(client, slow_artifact):
    """One that runs and four that wait hang up: their requests end, and the next one is served."""

    def leave(number):
        with pytest.raises(httpx.ReadTimeout):
            client.get("/picture", params={"prompt": "a", "budget": "full", "seed": number}, timeout=0.05)

    before = metric(client, 'otcache_pictures_total{budget="full"}')
    with ThreadPoolExecutor(5) as clients:
        list(clients.map(leave, range(5)))
    assert client.get("/picture", params={"prompt": "a", "budget": 2}).status_code == 200
    assert client.get("/readyz").json() == {"status": "ready", "waiting": 0, "running": 0, "capacity": CAPACITY}
    assert metric(client, 'otcache_pictures_total{budget="full"}') - before <= 1


def test_overload(client):
    """More requests than fit: 503 for what is too much, lower budgets for the rest."""
    count = 4 * (CAPACITY + 1)
    together = threading.Barrier(count)

    def ask(number):
        together.wait()
        return client.get("/picture", params={"prompt": "a", "seed": number})

    with ThreadPoolExecutor(count) as clients:
        found = list(clients.map(ask, range(count)))
    refused = [response for response in found if response.status_code == 503]
    served = [response for response in found if response.status_code == 200]
    assert len(refused) + len(served) == count and len(served) >= CAPACITY and refused
    for response in refused:
        error = response.json()["error"]
        assert int(response.headers["retry-after"]) >= 1 and "queue is full" in error["message"]
        assert error["type"] == "server_error"
    lowered = Counter(response.headers["x-budget"] for response in served)
    del lowered["full"]
    assert lowered
    for budget, times in lowered.items():
        line = f'otcache_degraded_requests_total{{asked="full",served="{budget}"}}'
        assert metric(client, line) >= times


def test_a_full_queue_is_not_ready(server, client):
    ask = b"GET /picture?prompt=a&budget=full HTTP/1.1\r\nHost: a\r\n\r\n"
    with contextlib.ExitStack() as stack:
        for _ in range(3 * CAPACITY):
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", server.port)))
            connection.sendall(ask)
        deadline = time.monotonic() + 30
        while (found := client.get("/readyz")).status_code != 503:
            assert time.monotonic() < deadline
        assert found.json()["status"] == "busy" and found.json()["waiting"] == CAPACITY
        assert client.get("/healthz").status_code == 200
    while client.get("/readyz").json()["running"]:
        time.sleep(0.01)


# --- what looks after it


def test_health_and_metrics(client):
    assert client.get("/healthz").json() == {"status": "ok"}
    before = metric(client, 'otcache_pictures_total{budget="2"}')
    client.get("/picture", params={"prompt": "a", "budget": 2})
    client.get("/no/such/path")
    assert metric(client, 'otcache_pictures_total{budget="2"}') == before + 1
    assert metric(client, 'otcache_drawing_seconds_count{budget="2"}') > 0
    assert metric(client, 'otcache_http_requests_total{path="/picture",status="200"}') > 0
    assert metric(client, 'otcache_http_requests_total{path="other",status="404"}') > 0
    assert metric(client, "otcache_queue_capacity") == CAPACITY
    assert "/no/such/path" not in client.get("/metrics").text
    assert metric(client, "process_resident_memory_bytes") > 1e6


def test_the_document_is_openapi_and_names_every_route(client, slow_artifact):
    validator = pytest.importorskip("openapi_spec_validator")
    document = client.get("/openapi.json").json()
    validator.validate(document)
    with Sampler.load(slow_artifact) as sampler:
        assert document == openapi.openapi_document(sampler.manifest, 4)
    for path, methods in document["paths"].items():
        for method in methods:
            assert client.request(method, path).status_code not in (404, 405), path
    parameters = {entry["name"]: entry for entry in document["paths"]["/picture"]["get"]["parameters"]}
    assert set(parameters) == set(fields.PictureQuery.model_fields)
    assert parameters["seed"]["schema"]["type"] == "integer" and parameters["prompt"]["required"]
    assert parameters["prompt"]["schema"]["maxLength"] == fields.MOST_CHARACTERS


def test_limits_are_those_of_the_page():
    text = (Path(__file__).parents[3] / "runtime/README.md").read_text(encoding="utf-8")
    defaults = {option.name: option.default for option in cli.main.commands["serve"].params}
    for limit in (
        f"more than {fields.MOST_CHARACTERS:,} characters",
        f"does not come within {bodies.BODY_S:g} s, is larger than {bodies.MOST_BYTES >> 10} KiB",
        f"`--capacity {defaults['capacity']}`",
        f"more than {serve.MOST_CONNECTIONS} connections",
        f"`--timeout {defaults['timeout_s']:g}`",
        f"sends no request for {serve.HEAD_S:g} s",
        f"`--grace {defaults['grace_s']:g}`",
    ):
        assert limit in text, limit


def test_nothing_was_logged(server, client):
    """Of all the above nothing is the server's fault."""
    assert client.get("/healthz").status_code == 200
    assert server.logged() == ""


def test_too_many_connections(server, client):
    """Last in this file, because it is logged."""
    with contextlib.ExitStack() as stack:
        for _ in range(serve.MOST_CONNECTIONS):
            stack.enter_context(socket.create_connection(("127.0.0.1", server.port)))
        assert httpx.get(f"{server.address}/healthz").status_code == 503
    assert {json.loads(line)["logger"] for line in server.await_logged().splitlines()} == {"uvicorn.error"}
    deadline = time.monotonic() + 30
    while httpx.get(f"{server.address}/healthz").status_code != 200:
        assert time.monotonic() < deadline
