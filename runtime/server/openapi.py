"""The OpenAPI document (3.1) of the server's routes, made of the models that read the requests."""

from __future__ import annotations

from collections.abc import Collection
from importlib import metadata
from typing import Any

from otcache.schemas.manifest import Manifest

from .bodies import MOST_BYTES
from .fields import Generation, PictureQuery

ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string", "description": "What was received, what was expected, and the fix."},
                "type": {"enum": ["invalid_request_error", "server_error"]},
                "param": {"type": ["string", "null"], "description": "The parameter or field that is to blame."},
                "code": {"type": "string"},
            },
        }
    },
}
GENERATED = {
    "type": "object",
    "required": ["created", "data", "output_format", "size", "budget"],
    "properties": {
        "created": {"type": "integer", "description": "Seconds since 1970."},
        "data": {
            "type": "array",
            "items": {"type": "object", "properties": {"b64_json": {"type": "string", "contentEncoding": "base64"}}},
        },
        "output_format": {"type": "string"},
        "size": {"type": "string"},
        "budget": {"type": "string", "description": "That was served."},
    },
}
HEADERS = {
    "X-Budget": {"schema": {"type": "string"}, "description": "The budget that was served."},
    "Server-Timing": {
        "schema": {"type": "string"},
        "description": "`queue` and `draw`, in milliseconds.",
    },
}
RETRY = {"Retry-After": {"schema": {"type": "integer"}, "description": "Seconds."}}
REFUSALS = {
    400: "A parameter or field is unknown, missing or out of its range; the message names it.",
    413: "The request has a larger body than it may.",
    500: "The server is at fault: numbers that are not finite, a device that fails.",
    503: "The queue is full, or the server stops: nothing has been done, ask again.",
    504: "The request's time was up.",
}
POST_REFUSALS = {
    404: "The model is another one.",
    408: "The body has not come in time.",
    415: "The body is no application/json.",
}


def openapi_document(manifest: Manifest, max_images: int) -> dict[str, Any]:
    """Of the server of one artifact."""
    generation = Generation.model_json_schema()
    generation["properties"]["n"]["maximum"] = max_images
    budgets = ", ".join(manifest.budgets)
    kinds = ("image/png", "image/jpeg", "image/webp", "image/gif")
    picture = {kind: {"schema": {"type": "string", "contentMediaType": kind}} for kind in kinds}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": f"otcache: {manifest.model.name}",
            "version": metadata.version("otcache"),
            "description": f"Pictures at budgets {budgets}. What is not named here is refused.",
        },
        "paths": {
            "/": _get("A page to try a prompt at every budget.", _media("text/html")),
            "/page.js": _get("Its script.", _media("text/javascript")),
            "/picture": {
                "get": {
                    "summary": "Draw a picture. HEAD checks the request, and draws nothing.",
                    "parameters": _parameters(PictureQuery.model_json_schema()),
                    "responses": {"200": _answer("The picture.", picture, HEADERS), **_refusals(REFUSALS)},
                }
            },
            "/v1/images/generations": {
                "post": {
                    "summary": f"Draw pictures, asked for as OpenAI's API has it; at most {MOST_BYTES} bytes.",
                    "requestBody": {"required": True, "content": {"application/json": {"schema": generation}}},
                    "responses": {
                        "200": _answer("The pictures.", {"application/json": {"schema": GENERATED}}, HEADERS),
                        **_refusals(REFUSALS | POST_REFUSALS),
                    },
                }
            },
            "/artifact": _get("What is served.", _media("application/json")),
            "/healthz": _get("200 while the server runs.", _media("application/json")),
            "/readyz": _get("200 while the queue takes requests, else 503.", _media("application/json"), {503}),
            "/metrics": _get("Prometheus' text format.", _media("text/plain")),
            "/openapi.json": _get("This document.", _media("application/json")),
        },
    }


def _media(kind: str) -> dict[str, Any]:
    return {kind: {"schema": {"type": "object" if kind == "application/json" else "string"}}}


def _answer(text: str, content: dict[str, Any], headers: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"description": text, "content": content, **({"headers": headers} if headers else {})}


def _get(text: str, content: dict[str, Any], also: Collection[int] = ()) -> dict[str, Any]:
    """A route that takes no query."""
    responses = {str(status): _answer(REFUSALS[status], content) for status in also}
    return {"get": {"summary": text, "responses": {"200": _answer(text, content), **responses}}}


def _refusals(texts: dict[int, str]) -> dict[str, Any]:
    content = {"application/json": {"schema": ERROR}}
    return {
        str(status): _answer(text, content, RETRY if status == 503 else None) for status, text in sorted(texts.items())
    }


def _parameters(schema: dict[str, Any]) -> list[dict[str, Any]]:
    """A query's parameters, of the schema of its model."""
    required = schema.get("required", [])
    return [
        {
            "name": name,
            "in": "query",
            "required": name in required,
            "description": part["description"],
            "schema": {key: value for key, value in part.items() if key not in ("description", "title")},
        }
        for name, part in schema["properties"].items()
    ]
