"""What `/metrics` says, in Prometheus' text format: requests, pictures, seconds, the queue, and this process."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..loop.timing import Timing
from ..serving.service import Service
from .refusals import CLIENT_LEFT

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100)
"""Upper bounds of the histograms' buckets."""
_log = logging.getLogger(__name__)
OTHER = "other"
"""Path of requests to none of the routes: what clients make up must not become labels."""


class Metrics:
    """Of one server, in a registry of their own."""

    def __init__(self, service: Service) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "otcache_http_requests", "Requests by path and status.", ["path", "status"], registry=self._registry
        )
        self.pictures = Counter("otcache_pictures", "Pictures drawn.", ["budget"], registry=self._registry)
        self.drawing = Histogram(
            "otcache_drawing_seconds",
            "Of a request, without the time it waited.",
            ["budget"],
            buckets=SECONDS,
            registry=self._registry,
        )
        self.waited = Histogram(
            "otcache_waiting_seconds", "Of a request in the queue.", buckets=SECONDS, registry=self._registry
        )
        self.degraded = Counter(
            "otcache_degraded_requests",
            "Requests that were served at a lower budget than asked for, because of the load.",
            ["asked", "served"],
            registry=self._registry,
        )
        for name, text, value in (
            ("otcache_requests_waiting", "Requests in the queue.", lambda: service.waiting),
            ("otcache_requests_running", "Requests that are drawn.", lambda: service.running),
            ("otcache_queue_capacity", "Requests that may wait.", lambda: service.capacity),
        ):
            Gauge(name, text, registry=self._registry).set_function(value)
        ProcessCollector(registry=self._registry)

    def drawn(self, asked: str, budget: str, pictures: int, timing: Timing) -> None:
        """Count a request that was served, at a budget that may be lower than was asked for."""
        if budget != asked:
            self.degraded.labels(asked, budget).inc()
        self.pictures.labels(budget).inc(pictures)
        self.drawing.labels(budget).observe(timing.latency_s)
        self.waited.observe(timing.parts["wait"])

    def text(self) -> bytes:
        return generate_latest(self._registry)


class Counted:
    """ASGI: counts every answer by path and status, and logs it at level info, without its query."""

    def __init__(self, app: ASGIApp, metrics: Metrics, paths: Collection[str]) -> None:
        self.app, self.metrics, self.paths = app, metrics, frozenset(paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status, start = CLIENT_LEFT, time.perf_counter()

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, watched)
        except Exception:
            status = 500
            raise
        finally:
            path = scope["path"] if scope["path"] in self.paths else OTHER
            self.metrics.requests.labels(path, str(status)).inc()
            _log.info("%s %s: %d in %.3f s", scope["method"], path, status, time.perf_counter() - start)
