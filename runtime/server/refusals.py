"""What a client is told when a request is refused or fails: one form for every route, that of OpenAI's API."""

from __future__ import annotations

import math
from http import HTTPStatus
from typing import Any

from starlette.responses import JSONResponse

from otcache.schemas.errors import OTCacheError, RequestError
from otcache.schemas.messages import one_line

from ..serving.service import BusyError, http_status

CLIENT_LEFT = 499
"""What is counted for a client that hung up; nobody receives it."""
_CODES = {413: "content_too_large"}
"""Whose name differs among versions of Python."""


class Refusal(RequestError):
    """A request that this server refuses, with the HTTP status, and the parameter or field that is to blame."""

    def __init__(self, message: str, status: int = 400, parameter: str | None = None) -> None:
        super().__init__(message)
        self.status, self.parameter = status, parameter


def error_response(error: OTCacheError, headers: dict[str, str] | None = None) -> JSONResponse:
    """The answer to a request that ended with an error; a full queue says when to come again."""
    status = error.status if isinstance(error, Refusal) else http_status(error)
    headers = dict(headers or {})
    if isinstance(error, BusyError):
        headers["Retry-After"] = str(math.ceil(error.retry_after_s))
    return error_json(str(error), status, error.parameter if isinstance(error, Refusal) else None, headers)


def error_json(
    message: str, status: int, parameter: str | None = None, headers: dict[str, str] | None = None
) -> JSONResponse:
    """`{"error": {"message": …, "type": …, "param": …, "code": …}}`; the message is one line."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    code = _CODES.get(status) or HTTPStatus(status).phrase.lower().replace(" ", "_")
    error: dict[str, Any] = {"message": one_line(message, 1000), "type": kind, "param": parameter, "code": code}
    return JSONResponse({"error": error}, status, headers)
