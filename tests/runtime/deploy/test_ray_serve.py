"""`otc deploy --to ray-serve` on a real Ray of this host: `serve run`, over HTTP."""

from __future__ import annotations

import asyncio
import importlib.util
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pages
import pytest
from PIL import Image
from triton_server import free_ports

from otcache.runtime import ArtifactError, HostError, RequestError, Sampler
from otcache.runtime.pictures import to_uint8

INSTALL = "pip install 'otcache[serve-ray]'"
httpx = pytest.importorskip("httpx")
schema = pytest.importorskip("ray.serve.schema", reason=f"no Ray Serve here; to run it: {INSTALL}")
pytestmark = pytest.mark.filterwarnings("ignore:coroutine.*__del__:RuntimeWarning")  # Ray's own, outside of Ray
TIMEOUT_S = 300
CAPACITY = 8


def ended(process):
    """Let `serve run` end as with Ctrl-C, and its Ray with it."""
    process.send_signal(signal.SIGINT)
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture(scope="module")
def application(deployed, slow_artifact, tmp_path_factory):
    """The folder, with another port in its configuration, and less patience before replicas are added."""
    options = ("--capacity", str(CAPACITY), "--instances", "2", "--max-batch", "4")
    folder = deployed(slow_artifact, "ray-serve", tmp_path_factory.mktemp("ray") / "application", *options)
    config = folder / "serve.yaml"
    text = config.read_text().replace("port: 8000", f"port: {free_ports(1)[0]}")
    config.write_text(text.replace("upscale_delay_s: 10", "upscale_delay_s: 1"))
    return folder


@pytest.fixture(scope="module")
def address(application):
    """Of the application, running in a Ray of its own, whose files have a short name as sockets need it."""
    port = re.search(r"port: (\d+)", (application / "serve.yaml").read_text()).group(1)
    work = Path("/tmp") / f"otc-ray-{os.getpid()}"
    work.mkdir()
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    environment |= {"RAY_TMPDIR": str(work), "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    environment |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "RAY_SERVE_LOG_TO_STDERR": "0"}
    log = application.parent / "log"
    with log.open("w") as out:
        line = pages.command_line("runtime/README.md", "serve run")
        process = subprocess.Popen(
            line, cwd=application, env=environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        end = time.monotonic() + TIMEOUT_S
        while not is_ready(f"http://127.0.0.1:{port}"):
            assert process.poll() is None and time.monotonic() < end, log.read_text()[-5000:]
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        ended(process)
        shutil.rmtree(work, ignore_errors=True)


def is_ready(address):
    try:
        return httpx.get(f"{address}/readyz", timeout=60).status_code == 200
    except httpx.HTTPError:
        return False


def pixels(answer):
    return np.asarray(Image.open(io.BytesIO(answer.content)))


def test_the_configuration_is_ray_serves(application):
    yaml = pytest.importorskip("yaml")
    config = schema.ServeDeploySchema.model_validate(yaml.safe_load((application / "serve.yaml").read_text()))
    (deployment,) = config.applications[0].deployments
    assert deployment.autoscaling_config["max_replicas"] == 2


@pytest.mark.slow
def test_pictures_and_refusals(address, slow_artifact):
    with Sampler.load(slow_artifact, threads=1) as sampler:
        expected = to_uint8(sampler("a red ring", budget="3", seed=7))[0]
    found = httpx.get(f"{address}/picture", params={"prompt": "a red ring", "budget": 3, "seed": 7}, timeout=60)
    np.testing.assert_array_equal(pixels(found), expected)
    posted = httpx.post(f"{address}/v1/images/generations", json={"prompt": "a red ring", "budget": "2"}, timeout=60)
    assert posted.status_code == 200 and posted.json()["budget"] == "2"
    refused = httpx.get(f"{address}/picture", params={"prompt": "a", "budget": 9}, timeout=60)
    assert refused.status_code == 400 and "budget is '9'" in refused.json()["error"]["message"]


@pytest.mark.slow
def test_clients_at_once_get_their_own_pictures(address, slow_artifact):
    asked = [{"prompt": "a ring", "seed": seed, "budget": "full" if seed % 2 else "3"} for seed in range(8)]
    with Sampler.load(slow_artifact, threads=1) as sampler, ThreadPoolExecutor(len(asked)) as pool:
        found = list(pool.map(lambda query: httpx.get(f"{address}/picture", params=query, timeout=60), asked))
        assert {answer.status_code for answer in found} == {200}
        for answer, query in zip(found, asked, strict=True):
            picture = sampler(query["prompt"], seed=query["seed"], budget=answer.headers["X-Budget"])
            assert np.abs(pixels(answer).astype(int) - to_uint8(picture)[0]).max() <= 1


@pytest.mark.slow
def test_load_lowers_budgets_and_adds_a_replica(address):
    """Clients ask for as long as it takes until there are two replicas, with queues of their own."""
    seen, budgets, end = set(), set(), time.monotonic() + TIMEOUT_S

    def ask(number):
        while len(seen) < 2 and time.monotonic() < end:
            found = httpx.get(f"{address}/picture", params={"prompt": "a ring", "seed": number}, timeout=60)
            assert found.status_code in (200, 503), found.text
            budgets.add(found.headers.get("X-Budget"))
            metrics = httpx.get(f"{address}/metrics", timeout=60).text
            seen.update(re.findall(r"^process_start_time_seconds (\S+)$", metrics, re.MULTILINE))

    with ThreadPoolExecutor(CAPACITY + 4) as pool:
        list(pool.map(ask, range(CAPACITY + 4)))
    assert len(seen) == 2
    assert budgets & {"2", "3"}


# --- a replica by itself, in this process


@pytest.fixture
def replica(application):
    """A function that makes the replica's object as Ray does, with changes to its arguments."""
    spec = importlib.util.spec_from_file_location("app_of_a_test", application / "app.py")
    app = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(app)
    made = []

    def make(**changes):
        digest = json.loads((application / "deployment.json").read_text())["artifact"]
        kind = app.Pictures.func_or_class
        made.append(kind.__new__(kind))
        arguments = app.Arguments(**{"artifact": digest, **changes})
        asyncio.run(made[-1].__init__(arguments.model_dump()))
        return made[-1]

    yield make
    for each in made:
        if service := getattr(each, "_service", None):
            service.close()


def test_a_replica_is_healthy_while_its_service_runs(replica):
    found = replica()
    found.check_health()
    found._service.close()
    with pytest.raises(HostError, match="the service has ended: expected it to run"):
        found.check_health()


def test_requests_that_come_together_run_with_their_like(replica, monkeypatch):
    """What Ray's batching calls, which itself works in Ray only: those of one budget are one run; a refused one is
    refused alone.
    """
    runs, draw = [], Sampler.draw

    def watched(self, request, **options):
        runs.append((request.budget, request.samples))
        return draw(self, request, **options)

    monkeypatch.setattr(Sampler, "draw", watched)
    found = replica(max_batch=5, max_wait_s=60, capacity=100)

    async def ask():
        asked = [{"prompt": "a", "budget": budget} for budget in ("3", "2", "3", "9", "2")]
        jobs = await type(found).enqueue.__wrapped__(found, asked)
        refused = jobs.pop(3)
        assert isinstance(refused, RequestError) and "budget is '9'" in str(refused)
        await asyncio.gather(*map(asyncio.wrap_future, jobs))

    asyncio.run(ask())
    assert runs == [("3", 2), ("2", 2)]


def test_another_artifact_is_not_loaded(replica):
    with pytest.raises(ArtifactError, match=r"expected sha256:0, which serve\.yaml names: deploy it again"):
        replica(artifact="sha256:0")


def test_a_damaged_artifact_is_not_loaded(replica, application):
    head = application / "artifact/engines/onnx/head.onnx"
    kept = head.read_bytes()
    head.write_bytes(kept[:-1] + b"?")
    try:
        with pytest.raises(ArtifactError, match=r"artifact is damaged: engines/onnx/head\.onnx"):
            replica()
    finally:
        head.write_bytes(kept)


def test_arguments_that_are_none(replica):
    with pytest.raises(ValueError, match="replicas"):
        replica(replicas=3)
