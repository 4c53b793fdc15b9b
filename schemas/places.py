"""Places where results go: that they can be written is found out before the work, not after it.

Whatever is wrong with one ends in the same error, in every command: it exists, is read-only or full, or its name is too
long.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from .errors import UsageError
from .messages import one_line


def check_new_file(path: Path, option: str, *, force: bool) -> None:
    """Raise UsageError unless a file can be written at `path`, anew or with `force` in place of another.

    option: what the place was given as, such as `-o`.
    """
    try:
        if path.is_dir():
            raise UsageError(
                f"{option} is {one_line(path)}: expected a file's name, but a folder is there: choose another"
            )
        if os.path.lexists(path) and not force:
            raise UsageError(
                f"{option} is {one_line(path)}: it exists: choose another name, or overwrite it with --force"
            )
        if not path.absolute().parent.is_dir():
            raise UsageError(f"{option} is {one_line(path)}: its folder does not exist: create it, or choose another")
    except OSError as error:  # what a name that is too long gives, already when it is looked up
        raise unwritable(path, option, error) from None
    check_writable(path, option)


def check_writable(path: Path, option: str) -> None:
    """Write and remove a hidden file beside `path`, with a longer name than it.

    Raises UsageError with the reason: a folder that is read-only or full, a name that is too long.

    Args:
        path: the file that is going to be written, in a folder that is there.
        option: what it was given as, such as `-o`.
    """
    try:
        _write_probe(path.with_name(f".{path.name}.partial"))
    except OSError as error:
        raise unwritable(path, option, error) from None


def check_creatable(target: Path, option: str) -> None:
    """As `check_writable`, of a folder that is going to be made or replaced, its missing parents with it.

    Nothing is made: what is written and removed lies in the nearest folder that is there.
    """
    try:
        parents = target.absolute().parents
        ancestor = next(parent for parent in parents if os.path.lexists(parent))
        for part in target.absolute().relative_to(ancestor).parts:
            _write_probe(ancestor / f".{part}.{secrets.token_hex(4)}.part.lock")  # as long as whatever stands there
    except OSError as error:
        raise unwritable(target, option, error) from None


def _write_probe(probe: Path) -> None:
    try:
        probe.write_bytes(b"\0")
    finally:
        probe.unlink(missing_ok=True)


def unwritable(path: Path, option: str, error: Exception) -> UsageError:
    """The error of a place that cannot be written, from that of the system or of a library that writes."""
    reason = getattr(error, "strerror", None) or error
    return UsageError(f"{option} is {one_line(path)}: it cannot be written: {one_line(reason)}: choose another")
