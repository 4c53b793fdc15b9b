"""The timing cache of a target's plans: what the library has measured of kernels.

It is one file that all workers read and add to.

Identical blocks have the same kernels, so that all but the first are built from it. The library for RTX measures
nothing and has none.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from otcache.schemas.whole_files import write_whole


def attach(config: Any, path: Path) -> Any:
    """Let a build use what the file has, and add to it. Returns the cache, for `keep`. Raises OSError."""
    cache = _load(config, path)
    config.set_timing_cache(cache, ignore_mismatch=False)
    return cache


def keep(config: Any, cache: Any, path: Path, lock: AbstractContextManager[object]) -> None:
    """Write what a build has measured, and with it what others have written since it began.

    lock: held by one at a time of those that write the file. Raises OSError.
    """
    with lock:
        cache.combine(_load(config, path), ignore_mismatch=False)
        write_whole(path, memoryview(cache.serialize()), alone=True)


def _load(config: Any, path: Path) -> Any:
    return config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
