"""Triton's Python backend for an artifact of otcache: from prompts to pictures, the whole sampling loop in one model.

Written by `otc deploy --to triton`; it needs otcache where Triton's Python finds it. `config.pbtxt` says what comes in.
Requests that Triton hands over together are drawn in one run if they have one budget, size and guidance; each row of a
request is a picture with a seed of its own. A request that is cancelled ends at its next step.
"""

from __future__ import annotations

import concurrent.futures
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from otcache.runtime import Artifact, ArtifactError, OTCacheError, RequestError, Sampler, Service, http_status
from otcache.runtime.pictures import to_uint8
from otcache.schemas.messages import one_line

POLL_S = 0.02
"""Between two looks at whether a request has been cancelled."""
_CODES = {400: "INVALID_ARG", 503: "UNAVAILABLE", 504: "UNAVAILABLE"}
"""Triton's codes of errors that HTTP has a status for."""


class TritonPythonModel:
    """What Triton calls: one of these in each process of the instance group."""

    def initialize(self, args: dict[str, str]) -> None:
        """Verify the artifact that was deployed, every byte of it, and load it."""
        config = json.loads(args["model_config"])
        parameters = {name: value["string_value"] for name, value in config["parameters"].items()}
        if args["model_instance_kind"] == "GPU":
            _see_one_gpu(int(args["model_instance_device_id"]))
        artifact = Artifact.open(Path(__file__).parent / "artifact")
        if artifact.manifest.digest != parameters["artifact"]:
            raise ArtifactError(
                f"1/artifact is {artifact.manifest.digest}: expected {parameters['artifact']}, which config.pbtxt "
                "names: deploy it again"
            )
        artifact.verify()
        most = max(1, config["max_batch_size"])
        threads = int(parameters["threads"]) if parameters["threads"] else None
        sampler = Sampler.load(artifact.folder, parameters["backend"], threads)
        self._inputs = [tensor["name"] for tensor in config["input"]]
        self._service = Service(sampler, capacity=most, max_batch=most)

    def execute(self, requests: list[Any]) -> list[Any]:
        """A response for each request, in their order."""
        rows = [self._rows(request) for request in requests]
        jobs = iter(self._service.submit_all([row for own in rows if isinstance(own, list) for row in own]))
        drawn = [[next(jobs) for _ in own] if isinstance(own, list) else [own] for own in rows]
        for own in drawn:
            if any(isinstance(job, OTCacheError) for job in own):
                _cancel(own)
        self._wait(requests, drawn)
        return [_response(own) for own in drawn]

    def finalize(self) -> None:
        """Called when the model is unloaded."""
        self._service.close()

    def _rows(self, request: Any) -> list[dict[str, Any]] | OTCacheError:
        """The arguments of `Service.submit` for each picture, or why there are none."""
        try:
            columns = {name: values for name in self._inputs if (values := _values(request, name)) is not None}
            count = len(columns.get("prompt", ()))
            if not count or any(len(column) != count for column in columns.values()):
                raise RequestError("prompt is missing, or inputs have other numbers of rows: expected as many of each")
        except RequestError as error:
            return error
        timeout_us = request.timeout()
        limits = {"timeout_s": timeout_us / 1e6} if timeout_us else {}
        return [{**limits, **{name: column[row] for name, column in columns.items() if column}} for row in range(count)]

    def _wait(self, requests: list[Any], drawn: list[list[Any]]) -> None:
        """Until all have ended; what is cancelled meanwhile ends at its next step."""
        while left := [job for own in drawn for job in own if not isinstance(job, OTCacheError) and not job.done()]:
            concurrent.futures.wait(left, timeout=POLL_S)
            for request, own in zip(requests, drawn, strict=True):
                if request.is_cancelled():
                    _cancel(own)


def _see_one_gpu(index: int) -> None:
    """Make the GPU of an instance the only one that this process sees, before anything has looked for one."""
    visible = [each for each in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if each]
    os.environ["CUDA_VISIBLE_DEVICES"] = visible[index] if visible else str(index)


def _values(request: Any, name: str) -> list[Any] | None:
    """An input's values, one for each row; None if it was left out. Raises RequestError."""
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    if tensor is None:
        return None
    values = tensor.as_numpy().reshape(-1).tolist()
    try:
        return [value.decode("utf-8") if isinstance(value, bytes) else value for value in values]
    except UnicodeDecodeError:
        raise RequestError(f"{name} is no UTF-8: expected text: encode it as UTF-8") from None


def _cancel(jobs: list[Any]) -> None:
    for job in jobs:
        if not isinstance(job, OTCacheError):
            job.cancel()


def _response(jobs: list[Any]) -> Any:
    """The pictures of a request's rows, uint8 (n, height, width, 3) or (n, frames, height, width, 3), or its error."""
    refused = next((job for job in jobs if isinstance(job, OTCacheError)), None)
    try:
        if refused is not None:
            raise refused
        pictures = [to_uint8(job.result()) for job in jobs]
        if len({each.shape for each in pictures}) > 1:
            raise RequestError("the rows of a request have several sizes: expected one: ask for each by itself")
        return pb_utils.InferenceResponse([pb_utils.Tensor("image", np.concatenate(pictures))])
    except concurrent.futures.CancelledError:
        return _failure("the request was cancelled: expected nothing more", "CANCELLED")
    except OTCacheError as error:
        return _failure(str(error), _CODES.get(http_status(error), "INTERNAL"))
    except Exception as error:
        return _failure(f"unexpected {type(error).__name__}: {error}", "INTERNAL")


def _failure(message: str, code: str) -> Any:
    code_number = getattr(pb_utils.TritonError, code)  # not there yet when Triton imports this module
    return pb_utils.InferenceResponse([], pb_utils.TritonError(one_line(message, 1000), code_number))
