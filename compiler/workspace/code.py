"""The state of our own code, as a digest: what one state of it has computed is never taken for another's."""

from __future__ import annotations

import functools
from pathlib import Path

from otcache.schemas.digest import digest_of_files

ROOMS = ("passes", "schedules", "calibration", "export", "sizes", "graph", "pipelines", "models", "programs")
"""Rooms of the compiler that have a say in what is kept."""


@functools.cache
def code_digest() -> str:
    """Digest of the source files of all rooms that compute, taken once in a process."""
    return digest_of_code(Path(__file__).resolve().parents[1])


def digest_of_code(compiler: Path) -> str:
    """Digest of the source files of `ROOMS` in the compiler's folder."""
    return digest_of_files(compiler, [path for room in ROOMS for path in (compiler / room).rglob("*.py")])
