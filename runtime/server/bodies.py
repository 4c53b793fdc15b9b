"""Bodies of requests: read where one is expected, up to a limit of bytes and seconds, and refused where none is.

A refusal comes before the body has been read, and closes the connection: what the client still sends goes nowhere.
"""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from otcache.schemas.errors import ArtifactError
from otcache.schemas.messages import AGAIN
from otcache.schemas.strict_json import parse_object

from .refusals import Refusal, error_response

MOST_BYTES = 1 << 16
"""Of a body: fields of text, at most two prompts of `fields.MOST_CHARACTERS`."""
BODY_S = 10.0
"""In which a body must have come."""
CLOSE = {"Connection": "close"}


class NoBodies:
    """ASGI: refuses what has a body and is no POST, and a POST that announces too large a one, before it is read."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self.app
        if scope["type"] == "http" and (refusal := _refusal(scope["method"], dict(scope["headers"]))):
            app = error_response(refusal, CLOSE)
        await app(scope, receive, send)


def _refusal(method: str, headers: dict[bytes, bytes]) -> Refusal | None:
    length, most = headers.get(b"content-length", b"0"), MOST_BYTES if method == "POST" else 0
    if not length.isdigit():
        return Refusal("Content-Length is no number: expected a number of bytes")
    if len(length) > 18 or int(length) > most:
        return _too_large(f"{length[:20].decode('ascii')} bytes", most)
    if b"transfer-encoding" in headers and not most:
        return _too_large("sent in chunks", most)
    return None


async def read_object(request: Request) -> dict[str, Any]:
    """The JSON object in a request's body. Raises Refusal, ClientDisconnect."""
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/json":
        raise Refusal("Content-Type is not application/json: expected a JSON object as the body", 415)
    try:
        body = await asyncio.wait_for(_read(request), BODY_S)
    except asyncio.TimeoutError:  # of Python 3.10, where TimeoutError is another one
        raise Refusal(f"the body has not come in {BODY_S:g} s: expected it sooner: send it again", 408) from None
    try:
        return parse_object(body, "body")
    except ArtifactError as error:
        raise Refusal(str(error).removeprefix("artifact is damaged: ").removesuffix(f": {AGAIN}")) from None


async def _read(request: Request) -> bytes:
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MOST_BYTES:
            raise _too_large(f"more than {MOST_BYTES} bytes", MOST_BYTES)
    return bytes(body)


def _too_large(found: str, most: int) -> Refusal:
    expected = f"at most {most} bytes" if most else "none: GET takes a query"
    return Refusal(f"the body is {found}: expected {expected}", 413)
