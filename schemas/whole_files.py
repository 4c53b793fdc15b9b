"""Files that are written whole or not at all."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def write_whole(path: Path, data: bytes | memoryview, *, part: str = "") -> None:
    """Put data in the place of a file, in one rename, once it is on the disk. Raises OSError and leaves the old file
    then.

    part: what tells writers of the same file apart that may be at work at once. Without it, what a killed one left is
    overwritten.
    """
    partial = path.with_name(f".{path.name}{part}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
