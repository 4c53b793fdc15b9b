"""`make_app`: a `Service` → an ASGI application with its routes.

/                          a page to try a prompt at every budget
/picture                   GET: the picture itself
/v1/images/generations     POST: OpenAI's form
/artifact                  what is served: model, size, budgets with what they cost and were measured to keep
/healthz /readyz /metrics  for whatever looks after the server
/openapi.json              all of this
"""

from __future__ import annotations

import base64
import logging
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from otcache.schemas.errors import OTCacheError

from ..serving.service import Service, http_status
from .bodies import CLOSE, NoBodies, read_object
from .drawing import Submit, draw, kind_of, options_of, submit_at_once
from .fields import parse_generation, parse_query
from .metrics import CONTENT_TYPE, Counted, Metrics
from .openapi import openapi_document
from .refusals import CLIENT_LEFT, Refusal, error_json, error_response

_HERE = Path(__file__).parent
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'unsafe-inline'; connect-src 'self'; "
    "img-src blob: data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
_UNREAD = (408, 413, 415)
"""Statuses of refusals that leave a body unread."""
_log = logging.getLogger(__name__)


def make_app(service: Service, submit: Submit | None = None) -> Starlette:
    """The application. It neither opens nor closes the service.

    submit: how requests come into the service's queue, for hosts that have a way of their own.
    """
    submit = submit or submit_at_once(service)
    metrics = Metrics(service)
    routes = [
        _fixed("/", "page.html", "text/html"),
        _fixed("/page.js", "page.js", "text/javascript"),
        Route("/picture", _picture_route(service, submit, metrics)),
        Route("/v1/images/generations", _generations_route(service, submit, metrics), methods=["POST"]),
        _json("/artifact", lambda: (200, _artifact(service))),
        _json("/healthz", lambda: (200, {"status": "ok"})),
        _json("/readyz", lambda: _readiness(service)),
        Route("/metrics", _metrics_route(metrics)),
    ]
    document = openapi_document(service.sampler.manifest, service.max_images)
    routes.append(_json("/openapi.json", lambda: (200, document)))
    paths = [route.path for route in routes]
    return Starlette(
        routes=routes,
        middleware=[Middleware(Counted, metrics=metrics, paths=paths), Middleware(NoBodies)],
        exception_handlers={
            OTCacheError: _refused,
            HTTPException: _no_route,
            ClientDisconnect: _left,
            Exception: _failed,
        },
    )


def _fixed(path: str, name: str, media_type: str) -> Route:
    """A file of this package, read once."""
    content = (_HERE / name).read_bytes()

    async def answer(request: Request) -> Response:
        parse_nothing(request)
        return Response(content, media_type=media_type, headers=_PAGE_HEADERS)

    return Route(path, answer)


def _json(path: str, value: Callable[[], tuple[int, Any]]) -> Route:
    async def answer(request: Request) -> Response:
        parse_nothing(request)
        status, content = value()
        return JSONResponse(content, status)

    return Route(path, answer)


def parse_nothing(request: Request) -> None:
    """Raise Refusal if a route that takes no query gets one."""
    if name := next(iter(request.query_params), None):
        raise Refusal(f"{name} is no parameter of {request.url.path}: expected none: leave it out", parameter=name)


def _picture_route(service: Service, submit: Submit, metrics: Metrics) -> Callable[[Request], Awaitable[Response]]:
    async def picture(request: Request) -> Response:
        asked = parse_query(request.query_params.multi_items())
        if request.method == "HEAD":
            return _unseen(service, asked)
        await request.body()  # empty: others have been refused
        drawn = await draw(request, asked, service, submit, metrics)
        if drawn is None:
            return Response(status_code=CLIENT_LEFT)
        headers = {**drawn.headers, "Cache-Control": "no-store"}
        return Response(drawn.files[0], media_type=drawn.media_type, headers=headers)

    return picture


def _unseen(service: Service, asked: Any) -> Response:
    """What HEAD gets: the request is checked, and nothing is drawn."""
    options = options_of(asked, service)
    options.pop("minimum_budget")
    budget = options.pop("budget") or service.sampler.budgets[-1]
    kind = kind_of(asked, service)
    service.sampler.request(**options, budget=budget)
    response = Response(media_type=f"image/{kind}")
    del response.headers["Content-Length"]  # not known without drawing
    return response


def _generations_route(service: Service, submit: Submit, metrics: Metrics) -> Callable[[Request], Awaitable[Response]]:
    async def generations(request: Request) -> Response:
        parse_nothing(request)
        asked = parse_generation(await read_object(request))
        drawn = await draw(request, asked, service, submit, metrics)
        if drawn is None:
            return Response(status_code=CLIENT_LEFT)
        answer = {
            "created": int(time.time()),
            "data": [{"b64_json": base64.b64encode(file).decode("ascii")} for file in drawn.files],
            "output_format": drawn.kind,
            "size": "x".join(map(str, drawn.size)),
            "budget": drawn.budget,
        }
        return JSONResponse(answer, headers=drawn.headers)

    return generations


def _metrics_route(metrics: Metrics) -> Callable[[Request], Awaitable[Response]]:
    async def answer(request: Request) -> Response:
        parse_nothing(request)
        return Response(metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    return answer


def _artifact(service: Service) -> dict[str, Any]:
    """What is served, as the page shows it."""
    manifest = service.sampler.manifest
    conditions = manifest.conditions
    programs = {entry.budget: entry for entry in manifest.programs}
    budgets = [
        {
            "budget": name,
            "evaluations": programs[name].program.nfe,
            "psnr_db": quality.psnr_db.mean if (quality := programs[name].quality) else None,
        }
        for name in manifest.budgets
    ]
    size = {"height": conditions.height, "width": conditions.width, "num_frames": conditions.num_frames}
    served = {"negative_prompt": manifest.guidance.branches == 2, "max_images": service.max_images}
    return {"model": manifest.model.name, "digest": manifest.digest, **size, **served, "budgets": budgets}


def _readiness(service: Service) -> tuple[int, dict[str, Any]]:
    """200 while a request would be accepted."""
    queue = {"waiting": service.waiting, "running": service.running, "capacity": service.capacity}
    return (200, {"status": "ready", **queue}) if service.accepts else (503, {"status": "busy", **queue})


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, OTCacheError)
    status = error.status if isinstance(error, Refusal) else http_status(error)
    if status == 500:
        _log.error("%s %s: %s", request.method, request.url.path, error)
    return error_response(error, CLOSE if status in _UNREAD else None)


async def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what = f"{request.method} {request.url.path} is not served: expected one of the routes in /openapi.json"
    return error_json(what, error.status_code, headers={**CLOSE, **(error.headers or {})})


async def _left(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_LEFT)


async def _failed(request: Request, error: Exception) -> Response:
    return error_json("unexpected error: expected none: the server's log has it", 500)
