"""Places where results go: that they can be written is found out before the work, not after it."""

from __future__ import annotations

from pathlib import Path

from otcache.schemas.errors import UsageError
from otcache.schemas.messages import one_line


def check_writable(path: Path, option: str) -> None:
    """Write and remove a hidden file beside `path`, with a longer name than it.

    Raises UsageError with the reason: a folder that is read-only or full, a name that is too long.

    Args:
        path: the file that is going to be written, in a folder that is there.
        option: what it was given as, such as `-o`.
    """
    probe = path.with_name(f".{path.name}.partial")
    try:
        try:
            probe.write_bytes(b"\0")
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        raise unwritable(path, option, error) from None


def unwritable(path: Path, option: str, error: OSError) -> UsageError:
    """The error of a place that cannot be written."""
    return UsageError(
        f"{option} is {one_line(path)}: it cannot be written: {one_line(error.strerror or error)}: choose another"
    )
