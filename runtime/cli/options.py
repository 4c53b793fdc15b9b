"""What commands share: the ARTIFACT argument, `--granularity`, `--json`, and the one way to print a JSON value."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import click

from otcache.schemas.segments import SEGMENT_BLOCKS, Granularity
from otcache.schemas.shapes import AxisName

from ..loop.backend import MOST_THREADS
from .completion import complete_artifacts, complete_backends

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def artifact_argument(function: Callable[..., Any]) -> Callable[..., Any]:
    """ARTIFACT, a folder; the shell completes folders that hold a manifest."""
    kind = click.Path(path_type=Path)
    return click.argument("artifact", type=kind, shell_complete=complete_artifacts)(function)


def granularity_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """`--granularity`: how many consecutive blocks a plan holds."""
    text = f"Blocks in a plan: one, up to {SEGMENT_BLOCKS}, or all."
    kind = click.Choice(get_args(Granularity))
    return click.option("--granularity", type=kind, default="block", show_default=True, help=text)(function)


def size_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """`--height`, `--width`, `--num-frames`, `--max-sequence-length`: the argument `size`, by axis."""

    @functools.wraps(function)
    def command(**options: Any) -> Any:
        size = {name: options.pop(name) for name in get_args(AxisName)}
        return function(size=size, **options)

    for name, what in (
        ("--max-sequence-length", "Text tokens"),
        ("--num-frames", "Frames of a video"),
        ("--width", "Pixels"),
        ("--height", "Pixels"),
    ):
        text = f"{what}; `otc inspect` shows the range.  [default: the artifact's]"
        command = click.option(name, type=click.IntRange(min=1), default=None, help=text)(command)
    return command


def backend_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """`--backend`: which engine serves; the shell completes those that there are."""
    text = "auto, onnxruntime, tensorrt or tensorrt-rtx."
    option = click.option("--backend", default="auto", show_default=True, shell_complete=complete_backends, help=text)
    return option(function)


def threads_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """`--threads`: of each stage on the CPU."""
    kind = click.IntRange(min=1, max=MOST_THREADS)
    return click.option("--threads", type=kind, default=None, help="CPU threads; default: one for each core.")(function)


def quiet_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """`-q`, `--quiet`: without progress."""
    text = "No progress on stderr: neither bars nor lines."
    return click.option("-q", "--quiet", is_flag=True, help=text)(function)


def queue_options(*, max_batch: int, max_wait_s: float) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """`--max-batch`, `--max-wait`, `--capacity`, `--timeout`, `--lowest-budget`: of the queue in front of an artifact.

    Args:
        max_batch, max_wait_s: defaults.
    """
    options = (
        click.option(
            "--max-batch",
            type=click.IntRange(1, 4096),
            default=max_batch,
            show_default=True,
            help="Pictures in one run: waiting requests of one budget, size and guidance join; last digits may differ "
            "then. 1: never more.",
        ),
        click.option(
            "--max-wait",
            "max_wait_s",
            type=click.FloatRange(0, 60),
            default=max_wait_s,
            show_default=True,
            help="Seconds that a request waits for others to fill a run of --max-batch.",
        ),
        click.option(
            "--capacity",
            type=click.IntRange(1, 4096),
            default=16,
            show_default=True,
            help="Requests that may wait; what is more is refused, with a 503 over HTTP.",
        ),
        click.option(
            "--timeout",
            "timeout_s",
            type=click.FloatRange(0, 86400, min_open=True),
            default=60.0,
            show_default=True,
            help="Seconds that a request may take, waiting included; then a 504 over HTTP.",
        ),
        click.option(
            "--lowest-budget",
            default=None,
            metavar="N|full",
            help="What load may lower budgets to; `full`: never.  [default: the artifact's lowest]",
        ),
    )

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            function = option(function)
        return function

    return add


def json_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """`--json`: exactly one JSON value on stdout, and JSON lines (events, logs, the error) on stderr."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")(function)


def print_json(value: Any) -> None:
    """One JSON value on one line of stdout. Raises ValueError for NaN and infinities, which are no JSON."""
    click.echo(json.dumps(value, ensure_ascii=False, allow_nan=False))
