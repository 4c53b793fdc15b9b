"""What a pipeline itself refuses of a call's size and text length, asked before it has weights."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from otcache.schemas.errors import UsageError

OPTIONS = {
    "height": "--height",
    "width": "--width",
    "num_frames": "--num-frames",
    "max_sequence_length": "--max-sequence-length",
}
ANY_SIDE = 1024
"""Pixels that pipelines take, where no side is asked about."""
ROUNDED = ("divisible", "resized", "rounded")
"""Words of warnings that say that another size is drawn than was asked for."""


def check_size(pipeline: Any, size: Mapping[str, int], option: str | None = None) -> None:
    """Raise UsageError where the pipeline would refuse a size, or draw another one.

    Args:
        pipeline: with or without weights; one that has no `check_inputs` is asked nothing.
        size: some of `OPTIONS`, by the names of the call's arguments; a side alone stands for both.
        option: what gave them all, for the message, if not an option each.
    """
    check = getattr(pipeline, "check_inputs", None)
    parameters = {} if check is None else inspect.signature(check).parameters
    sides = [size[name] for name in ("height", "width") if name in size] or [ANY_SIDE]
    known: dict[str, Any] = {"prompt": "a", "height": sides[0], "width": sides[-1], **size}
    asked = [name for name in size if name in parameters]
    if check is None or not asked:
        return
    needed = {name: known.get(name) for name, each in parameters.items() if each.default is inspect.Parameter.empty}
    refused: str | None = None
    with _warnings(type(pipeline).__module__) as said:
        try:
            check(**{**needed, **{name: known[name] for name in parameters if name in known}})
        except ValueError as error:
            refused = str(error)
    refused = refused or next((text for text in said if any(word in text for word in ROUNDED)), None)
    if refused is not None and any(name in refused for name in asked):
        given = ", ".join(f"{OPTIONS[name]} {size[name]}" for name in asked) if option is None else option
        raise UsageError(f"{given}: {type(pipeline).__name__} says: {' '.join(refused.split())[:300]}")


@contextmanager
def _warnings(module: str) -> Iterator[list[str]]:
    """What a module's logger warns of meanwhile, in place of where it goes else."""
    logger, said = logging.getLogger(module), list[str]()

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    handler, before = Keep(), (logger.level, logger.propagate)
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)
    logger.propagate = False
    try:
        yield said
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]
