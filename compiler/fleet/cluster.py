"""Ray as a compile asks for it: a cluster of its own on this host, or one that runs; what it lacks, in one line."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import socket
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ray
import torch

from otcache.schemas.errors import HostError

ADDRESS = "RAY_ADDRESS"
LOCAL = "local"
"""Ray's own word for a cluster that is started here."""
CONNECT_S = 20.0
ATTEMPTS = 3
"""To start one: a busy host takes longer than the half minute that Ray gives a node."""
STORE_BYTES = 200 << 20
"""Of Ray's object store on a cluster of our own: answers are a few kilobytes."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """A cluster that this process is connected to."""

    address: str
    """Empty for one of our own."""
    workers: int
    resource: str
    """What each worker takes one of: GPU, or CPU."""

    @property
    def name(self) -> str:
        """As messages say it."""
        return f"the cluster at {self.address}" if self.address else "this host"


@contextlib.contextmanager
def connected(workers: int | None, address: str | None, resource: str) -> Iterator[Cluster]:
    """Connect to a cluster while the context lasts; one that is started for it is gone afterwards.

    Args:
        workers: how many it is to have room for; None takes all that the cluster has.
        address: of a running cluster, or what RAY_ADDRESS says; without either one is started on this host.
        resource: what each worker takes one of, GPU or CPU.

    Raises HostError where the cluster does not answer, or is too small.
    """
    address = address or os.environ.get(ADDRESS) or ""
    with contextlib.ExitStack() as stack:
        if address and not ray.is_initialized():
            stack.enter_context(_joined(address))
        there, nodes = _size(resource) if ray.is_initialized() else (_own_size(resource), 1)
        cluster = Cluster(address=address, workers=workers or max(1, there), resource=resource)
        check_size(cluster, there, nodes)
        if not ray.is_initialized():
            stack.enter_context(_started(cluster))
        yield cluster


def check_size(cluster: Cluster, there: int, nodes: int) -> None:
    """Raises HostError for a cluster with fewer of the resource than there are to be workers."""
    if there < cluster.workers:
        remedy = f"give --workers {there}" if there else "give --device cpu"
        raise HostError(
            f"--workers is {cluster.workers}: {cluster.name} has {there} {cluster.resource}s on {nodes} "
            f"node{'s' if nodes != 1 else ''}, and each worker takes one: {remedy}, or add nodes"
        )


def _size(resource: str) -> tuple[int, int]:
    """How many of a resource the cluster has, and how many nodes."""
    return int(ray.cluster_resources().get(resource, 0)), sum(1 for node in ray.nodes() if node["Alive"])


def _own_size(resource: str) -> int:
    """How many GPUs, or cores that this process may use, the host has."""
    if resource == "GPU":
        return torch.cuda.device_count()
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def _started(cluster: Cluster) -> Iterator[None]:
    """A cluster on this host with room for its workers, whose files go with it."""
    # Sockets lie in the folder, and their paths may have a hundred characters.
    folder = tempfile.mkdtemp(prefix="otc-ray-", dir="/tmp" if os.path.isdir("/tmp") else None)
    gpus = cluster.workers if cluster.resource == "GPU" else 0
    try:
        with _joined(
            LOCAL,
            num_cpus=cluster.workers,
            num_gpus=gpus,
            object_store_memory=STORE_BYTES,
            include_dashboard=False,
            _temp_dir=folder,
        ):
            yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _joined(address: str, **more: Any) -> Iterator[None]:
    """Connected to a cluster. Raises HostError where there is none, or one of another version."""
    _check_port(address)
    attempts = ATTEMPTS if address == LOCAL else 1
    while attempts:
        attempts -= 1
        try:
            with _own_signals():
                ray.init(address=address, log_to_driver=False, logging_level=logging.CRITICAL, **more)
            break
        except Exception as error:  # Ray raises plain ones where a node does not start in time
            ray.shutdown()
            if attempts:
                continue
            said = next((line for line in str(error).splitlines() if line), type(error).__name__)[:200]
            if address == LOCAL:
                raise HostError(
                    f"Ray does not start on this host ({said}): expected a node within half a minute: run the command "
                    "again when the host is less busy, or leave --workers out"
                ) from error
            raise _no_connection(address, said) from error
    try:
        yield
    finally:
        ray.shutdown()


def _check_port(address: str) -> None:
    """Raise HostError where nothing listens at `host:port`: Ray itself would go on trying for minutes."""
    host, colon, port = address.rpartition(":")
    if colon and port.isdecimal() and "/" not in host:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S).close()
        except (OSError, OverflowError) as error:
            raise _no_connection(address, str(error)) from error


def _no_connection(address: str, said: str) -> HostError:
    return HostError(
        f"--ray is {address}: no connection ({said}): expected a running cluster of ray {ray.__version__}, as "
        "`ray start --head` makes one, or none, for one on this host"
    )


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    """Signals are ours again when the context ends: Ray takes SIGTERM for itself."""
    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # not in the main thread, where there are no signals
            for number, handler in before.items():
                signal.signal(number, handler if handler is not None else signal.SIG_DFL)
