"""Files of a folder that nobody vouches for, opened so that no link, device or size can harm the reader.

The path of the folder itself is the caller's and trusted: it may be or contain a symbolic link. Everything inside is
hostile until its digest has been checked.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO

from .messages import AGAIN, damage_error

_READ_FLAGS = os.O_RDONLY | sum(getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY"))


def locate(root: Path, name: str, fix: str = AGAIN) -> tuple[Path, os.stat_result]:
    """Path and status of a regular file inside a folder, with no symbolic link on the way.

    Args:
        root: the folder, which is trusted.
        name: the file's path in it, with forward slashes; what messages call it.
        fix: the end of the message of what is wrong.

    Raises ArtifactError where nothing is there, or something else than a file.
    """
    path = root
    parts = name.split("/")
    for index, part in enumerate(parts):
        path = path / part
        is_last = index == len(parts) - 1
        try:
            status = os.lstat(path)
        except FileNotFoundError:
            raise damage_error(name, "nothing there", "a file", fix) from None
        except (OSError, ValueError) as error:
            raise damage_error(name, error, "a file", fix) from None
        if not (stat.S_ISREG if is_last else stat.S_ISDIR)(status.st_mode):
            expected = "a regular file" if is_last else f"{part} to be a folder"
            raise damage_error(name, f"{_kind(status.st_mode)} at {part}", expected, fix)
    return path, status


def _kind(mode: int) -> str:
    kinds = {stat.S_IFLNK: "a symbolic link", stat.S_IFDIR: "a folder", stat.S_IFREG: "a file"}
    return kinds.get(stat.S_IFMT(mode), "a special file")


def open_regular(path: Path) -> BinaryIO:
    """A file that `locate` has found, open for reading.

    A link or special file that took its place since it was looked at is refused. Raises OSError.
    """
    descriptor = os.open(path, _READ_FLAGS)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{path.name} is no regular file")
    return os.fdopen(descriptor, "rb")


def read_small(root: Path, name: str, limit: int) -> bytes:
    """Content of a file that no digest is known of, of at most `limit` bytes. Raises ArtifactError and nothing else."""
    path, status = locate(root, name)
    if status.st_size > limit:
        raise damage_error(name, f"{status.st_size} bytes", f"at most {limit} bytes")
    try:
        with open_regular(path) as file:
            data: bytes = file.read(limit + 1)
    except (OSError, MemoryError) as error:
        raise damage_error(name, error, "a readable file") from None
    if len(data) > limit:
        raise damage_error(name, "a growing file", f"at most {limit} bytes")
    return data
