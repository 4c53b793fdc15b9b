"""`otc deploy --to triton` on a real tritonserver, over HTTP and gRPC, with Triton's own clients."""

from __future__ import annotations

import re
import shutil
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np
import pages
import pytest
from PIL import Image
from triton_server import INSTALL, serving_triton, triton_folder

from otcache.runtime import Sampler
from otcache.runtime.pictures import to_uint8

triton_folder()
grpcclient = pytest.importorskip("tritonclient.grpc", reason=INSTALL)
httpclient = pytest.importorskip("tritonclient.http", reason=INSTALL)
utils = pytest.importorskip("tritonclient.utils", reason=INSTALL)

TIMEOUT_S = 60
KINDS = {"seed": ("INT64", np.int64), "guidance_scale": ("FP64", np.float64)}
KINDS |= dict.fromkeys(("height", "width", "num_frames"), ("INT32", np.int32))
MOST = 4
ROWS = 1024
"""Pictures of several scales, none of which is drawn with another."""


@pytest.fixture(scope="module")
def repository(deployed, slow_artifact, tmp_path_factory):
    return deployed(slow_artifact, "triton", tmp_path_factory.mktemp("triton") / "model_repository", "--threads", "1")


@pytest.fixture(scope="module")
def triton(repository, tmp_path_factory):
    options = ("--model-control-mode", "explicit", "--load-model", "small")
    with serving_triton(repository, tmp_path_factory.mktemp("work"), *options) as server:
        yield server


@pytest.fixture(scope="module")
def sampler(slow_artifact):
    with Sampler.load(slow_artifact, threads=1) as sampler:
        yield sampler


@pytest.fixture(params=["http", "grpc"])
def client(request, triton):
    module = {"http": httpclient, "grpc": grpcclient}[request.param]
    options = {"concurrency": 4} if module is httpclient else {}
    with module.InferenceServerClient(getattr(triton, request.param), **options) as client:
        yield client


def inputs_for(client, **values):
    """Triton's inputs (n, 1) of values, one or a list for each."""
    module = httpclient if isinstance(client, httpclient.InferenceServerClient) else grpcclient
    found = []
    for name, value in values.items():
        kind, dtype = KINDS.get(name, ("BYTES", np.object_))
        array = np.array(value if isinstance(value, list) else [value], dtype).reshape(-1, 1)
        found.append(module.InferInput(name, list(array.shape), kind))
        found[-1].set_data_from_numpy(array)
    return found


def ask(client, *, timeout_us=None, **values):
    return client.infer("small", inputs_for(client, **values), timeout=timeout_us).as_numpy("image")


REQUESTS = [
    {"prompt": "a red ring", "budget": "3", "seed": 7},
    {"prompt": "a blue star", "budget": "2", "seed": -1, "negative_prompt": "red", "guidance_scale": 2.5},
    {"prompt": "a", "budget": "3", "height": 4, "width": 4},
]


@pytest.mark.parametrize("request_", REQUESTS)
def test_a_picture_is_what_the_sampler_draws(client, sampler, request_):
    np.testing.assert_array_equal(ask(client, **request_), to_uint8(sampler(**request_)))


def test_what_is_left_out_is_as_in_the_sampler(client, sampler):
    np.testing.assert_array_equal(ask(client, prompt="a ring"), to_uint8(sampler("a ring", budget="full")))


def test_rows_of_a_request_are_pictures_of_their_own(client, sampler):
    found = ask(client, prompt=["a red ring", "a", "a blue star"], seed=[1, 2, 3], budget=["3", "2", "3"])
    for row, (prompt, seed, budget) in enumerate([("a red ring", 1, "3"), ("a", 2, "2"), ("a blue star", 3, "3")]):
        assert np.abs(found[row].astype(int) - to_uint8(sampler(prompt, seed=seed, budget=budget))[0]).max() <= 1


def counts(triton):
    """(requests, runs of the model) that have succeeded."""
    with grpcclient.InferenceServerClient(triton.grpc) as client:
        (found,) = client.get_inference_statistics("small").model_stats
    return found.inference_count, found.execution_count


def test_concurrent_clients_are_batched_with_their_like(triton, sampler):
    """Sixteen at once, with two budgets: each gets its own picture, in fewer calls of the model than requests."""
    asked = [{"prompt": "a red ring", "seed": seed, "budget": "full" if seed % 2 else "3"} for seed in range(16)]
    before, together = counts(triton), threading.Barrier(len(asked))

    def one(request):
        with grpcclient.InferenceServerClient(triton.grpc) as client:
            together.wait(TIMEOUT_S)
            return ask(client, **request)

    with ThreadPoolExecutor(len(asked)) as pool:
        found = list(pool.map(one, asked))
    for picture, request in zip(found, asked, strict=True):
        assert np.abs(picture.astype(int) - to_uint8(sampler(**request))).max() <= 1
    requests, runs = np.subtract(counts(triton), before)
    assert requests == len(asked) and runs < requests


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"prompt": "a", "budget": "9"}, "budget is '9': expected one of 2, 3, full"),
        ({"prompt": "a", "guidance_scale": 99.0}, "guidance_scale is 99.0: expected 2 to 6"),
        ({"prompt": "a", "height": 5}, "height"),
        ({"prompt": "a", "num_frames": 3}, "num_frames"),
        ({"prompt": b"\xff"}, "prompt is no UTF-8"),
        ({"prompt": ["a", "b"], "budget": ["3", "9"]}, "budget is '9'"),
        ({"budget": "3"}, "prompt is missing"),
        ({"prompt": ["a"] * (MOST + 1)}, "batch-size must be <= 4"),
        ({"prompt": "a", "steps": "3"}, "unexpected inference input 'steps'"),
    ],
)
def test_wrong_requests_end_in_one_line(client, values, message):
    with pytest.raises(utils.InferenceServerException, match=re.escape(message)) as raised:
        ask(client, **values)
    assert len(raised.value.message().splitlines()) == 1
    assert raised.value.status() in ("400", "StatusCode.INVALID_ARGUMENT")
    assert ask(client, prompt="a", budget="2").shape == (1, 4, 4, 3), "the next one is served"


def test_time_that_is_up(client):
    with pytest.raises(utils.InferenceServerException, match=r"time was up|[Tt]imeout"):
        ask(client, prompt="a", timeout_us=1000)


def test_a_request_that_is_cancelled_ends(triton, repository, deployed, slow_artifact, tmp_path):
    """Of a model beside the other; the request would take minutes, and what comes behind it is served all the same."""
    folder = deployed(slow_artifact, "triton", tmp_path / "other", "--name", "long", "--max-batch", str(ROWS))
    shutil.move(folder / "long", repository)
    with grpcclient.InferenceServerClient(triton.grpc) as client:
        client.load_model("long")
        ended = threading.Event()
        inputs = inputs_for(client, prompt=["a"] * ROWS, guidance_scale=np.linspace(2, 6, ROWS).tolist())
        running = client.async_infer("long", inputs, lambda result, error: ended.set())
        behind: Future[Any] = Future()
        inputs = inputs_for(client, prompt="a", budget="2")
        client.async_infer("long", inputs, lambda result, error: behind.set_result(error or result))
        end = time.monotonic() + TIMEOUT_S
        while metric(triton, 'nv_inference_pending_request_count{model="long",version="1"}') == 0:
            assert not ended.is_set() and not behind.done() and time.monotonic() < end
        running.cancel()
        assert behind.result(TIMEOUT_S).as_numpy("image").shape == (1, 4, 4, 3)
        client.unload_model("long")


def metric(triton, line):
    with urlopen(f"http://{triton.metrics}/metrics") as answer:
        found = re.search(rf"^{re.escape(line)} (\S+)$", answer.read().decode(), re.MULTILINE)
    return float(found.group(1)) if found else 0.0


def test_the_client_on_the_page(triton, sampler, tmp_path, monkeypatch):
    """With this server's address, model and budgets."""
    text = pages.snippet("runtime/README.md", "ask_triton.py")
    for old, new in (("localhost:8000", triton.http), ('"shapes"', '"small"'), ('"8"', '"3"')):
        assert text.count(old) == 1
        text = text.replace(old, new)
    monkeypatch.chdir(tmp_path)
    exec(compile(text, "ask_triton.py", "exec"), {})
    expected = to_uint8(sampler("a red ring", budget="3", seed=0))[0]
    np.testing.assert_array_equal(np.asarray(Image.open("ring.png")), expected)


def test_unload_and_reload(client, sampler):
    client.unload_model("small")
    with pytest.raises(utils.InferenceServerException, match=r"no available versions|not ready|not found"):
        while True:
            ask(client, prompt="a", budget="2")
    client.load_model("small")
    np.testing.assert_array_equal(ask(client, **REQUESTS[0]), to_uint8(sampler(**REQUESTS[0])))


@pytest.mark.parametrize("what", ["a byte", "another artifact", "a link"])
def test_what_was_not_deployed_is_not_loaded(triton, repository, artifact_folder, tmp_path, what):
    """The model that runs stays as it is: Triton loads the new one first."""
    artifact = repository / "small/1/artifact"
    kept = Path(shutil.copytree(artifact, tmp_path / "kept"))
    head = artifact / "engines/onnx/head.onnx"
    if what == "another artifact":
        shutil.copy(artifact_folder / "manifest.json", artifact)
        message = "expected sha256:.*, which config.pbtxt names"
    elif what == "a link":
        head.unlink()
        head.symlink_to(kept / "engines/onnx/head.onnx")
        message = "artifact is damaged: engines/onnx/head.onnx: found a symbolic link"
    else:
        head.write_bytes(head.read_bytes()[:-1] + b"?")
        message = "artifact is damaged: engines/onnx/head.onnx: found digest"
    (repository / "small/1/model.py").touch()
    try:
        with (
            grpcclient.InferenceServerClient(triton.grpc) as client,
            pytest.raises(utils.InferenceServerException, match=message),
        ):
            client.load_model("small")
    finally:
        shutil.rmtree(artifact)
        shutil.copytree(kept, artifact)
        with grpcclient.InferenceServerClient(triton.grpc) as client:
            client.load_model("small")
            assert ask(client, prompt="a", budget="2").shape == (1, 4, 4, 3)
