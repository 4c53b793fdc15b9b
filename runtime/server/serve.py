"""A `Service` behind uvicorn, from a bound socket to a graceful end.

Told to stop (SIGTERM, Ctrl-C), the server takes no new connection and no new request, finishes what has been accepted,
for at most `grace_s`, and ends what is left at its next step.
"""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from otcache.schemas.errors import HostError
from otcache.schemas.messages import one_line

from ..serving.service import Service
from .app import make_app

MOST_CONNECTIONS = 256
"""At once; a request on a further one gets a 503."""
MOST_HEAD_BYTES = 16384
"""Of a request's line and headers."""
HEAD_S = 10.0
"""In which these must have come, or the connection is closed: silent connections must not add up."""
LAST_S = 10.0
"""After the grace, until connections are closed whatever happens."""


def bound_socket(host: str, port: int) -> socket.socket:
    """A socket that is bound and does not listen yet. port: 0 takes a free one. Raises HostError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
        except OSError:
            bound.close()
            raise
    except (OSError, UnicodeError) as error:
        reason = one_line(getattr(error, "strerror", None) or error)
        raise HostError(
            f"{one_line(host, 80)} port {port} cannot be served at: {reason}: choose another --host or --port"
        ) from None
    return bound


def address_of(bound: socket.socket) -> str:
    """`http://127.0.0.1:8000`."""
    host, port, *_ = bound.getsockname()
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(service: Service, bound: socket.socket, *, grace_s: float, started: Callable[[], None]) -> None:
    """Serve until SIGTERM or SIGINT. started: called once requests are taken. Does not close the service."""
    config = uvicorn.Config(
        make_app(service),
        loop="asyncio",
        http=PatientProtocol,
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=MOST_CONNECTIONS,
        h11_max_incomplete_event_size=MOST_HEAD_BYTES,
        timeout_graceful_shutdown=round(grace_s + LAST_S),
    )
    server = GracefulServer(config, service, grace_s, started)
    ignored = {number: signal.signal(number, _ignore) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        server.run(sockets=[bound])  # raises its signals again at the end: by then they have been heeded
    finally:
        server.stop_waiting()
        for number, handler in ignored.items():
            signal.signal(number, handler)


def _ignore(number: int, frame: FrameType | None) -> None:
    pass


class GracefulServer(uvicorn.Server):
    """Says when it has started, and ends what runs when the grace is over."""

    def __init__(self, config: uvicorn.Config, service: Service, grace_s: float, started: Callable[[], None]) -> None:
        super().__init__(config)
        self._service, self._grace_s, self._started = service, grace_s, started
        self._timer: threading.Timer | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._started()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        if self._timer is None:
            self._timer = threading.Timer(self._grace_s, self._service.close)
            self._timer.daemon = True
            self._timer.start()

    def stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()


class PatientProtocol(H11Protocol):
    """Closes connections on which a request's head does not come within `HEAD_S`."""

    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._expect_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._expect_head()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget_head()
        super().connection_lost(exc)

    def _expect_head(self) -> None:
        """Start the clock when a head is due, and stop it when the head has come."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._forget_head()
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(HEAD_S, self.transport.close)

    def _forget_head(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
