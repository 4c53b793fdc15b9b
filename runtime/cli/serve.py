"""`otc serve`: an artifact over HTTP."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from pathlib import Path
from typing import Any

import click

from otcache.schemas.errors import HostError

from ..loop.backend import MOST_THREADS
from .logs import ROOT
from .options import artifact_argument, backend_option, json_option, print_json, queue_options, threads_option

MOST_WORKERS = 64


@click.command(
    epilog="""\b
Examples:
  otc serve artifacts/shapes
  otc serve artifacts/shapes --host 0.0.0.0 --port 80 --workers 2 --threads 4
  otc serve artifacts/shapes --lowest-budget 8 --capacity 64 --timeout 30
"""
)
@artifact_argument
@click.option("--host", default="127.0.0.1", show_default=True, help="Name or address to listen at; 0.0.0.0 for all.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8000,
    show_default=True,
    help="0 takes a free one.",
)
@click.option(
    "--workers",
    type=click.IntRange(1, MOST_WORKERS),
    default=1,
    show_default=True,
    help="Requests that are drawn at once; each worker loads the artifact.",
)
@queue_options(max_batch=1, max_wait_s=0.0)
@click.option("--max-images", type=click.IntRange(1, 4096), default=4, show_default=True, help="Pictures of a request.")
@click.option(
    "--grace",
    "grace_s",
    type=click.FloatRange(0, 86400),
    default=30.0,
    show_default=True,
    help="Seconds that accepted requests have to finish when the server is told to stop.",
)
@backend_option
@threads_option
@json_option
def serve(
    artifact: Path,
    host: str,
    port: int,
    workers: int,
    capacity: int,
    timeout_s: float,
    max_images: int,
    max_batch: int,
    max_wait_s: float,
    lowest_budget: str | None,
    grace_s: float,
    backend: str,
    threads: int | None,
    as_json: bool,
) -> None:
    """Serve ARTIFACT over HTTP, without torch: pictures, OpenAI's form, health, metrics, and a page to try it.

    SIGTERM and Ctrl-C end it: new requests are refused, accepted ones are finished, and the exit code is 0. There is no
    authentication: whoever reaches the address may draw. The routes are listed at /openapi.json.
    """
    server = _server()
    _log_uvicorn()
    with contextlib.ExitStack() as stack:
        bound = stack.enter_context(server.bound_socket(host, port))
        service = stack.enter_context(
            _service(
                artifact,
                backend,
                threads or _share_of_cores(workers),
                workers,
                lowest_budget,
                capacity=capacity,
                max_images=max_images,
                max_batch=max_batch,
                max_wait_s=max_wait_s,
                timeout_s=timeout_s,
            )
        )
        address = server.address_of(bound)

        def started() -> None:
            if as_json:
                print_json({"address": address, "artifact": str(artifact), "backend": service.sampler.backend})
            else:
                budgets = ", ".join(service.sampler.budgets)
                click.echo(f"serves {artifact} at {address} (budgets {budgets}); Ctrl-C ends it")
            sys.stdout.flush()

        server.serve(service, bound, grace_s=grace_s, started=started)


def _server() -> Any:
    """The module that needs the extra. Raises HostError without it."""
    try:
        from ..server import serve as server
    except ImportError as error:
        raise HostError(
            f"otc serve needs packages that are missing ({error}): expected those of the extra [server]: run pip "
            "install 'otcache[server]'"
        ) from None
    return server


def _service(
    artifact: Path, backend: str, threads: int | None, workers: int, lowest_budget: str | None, **limits: Any
) -> Any:
    """A service of as many samplers as workers, with a governor."""
    from ..serving.governor import Governor
    from ..serving.sampler import Sampler
    from ..serving.service import Service

    with contextlib.ExitStack() as stack:
        samplers = [stack.enter_context(Sampler.load(artifact, backend, threads)) for _ in range(workers)]
        governor = Governor.of_queue(
            samplers[0].budgets, capacity=limits["capacity"], workers=workers, lowest=lowest_budget
        )
        service = Service(*samplers, governor=governor, **limits)
        stack.pop_all()  # the service closes them
        return service


def _share_of_cores(workers: int) -> int | None:
    """CPU threads of each worker's stages; one worker takes what `Sampler` does."""
    return None if workers == 1 else min(MOST_THREADS, max(1, (os.cpu_count() or 1) // workers))


def _log_uvicorn() -> None:
    """Let uvicorn's warnings go where otcache's do, so that with `--json` they are JSON, too."""
    own, theirs = logging.getLogger(ROOT), logging.getLogger("uvicorn")
    theirs.handlers, theirs.propagate = list(own.handlers), False
