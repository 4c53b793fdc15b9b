"""What a compile needs beside the one writer (`otcache.schemas.whole_files`): locks, leftovers, full disks.

A temporary name ends in `.part`. Whoever fills a `.part` folder holds the lock `.part.lock` beside it, which the kernel
drops with the process, however it ends: a `.part` folder whose lock is free is a leftover, and the next run removes it.
A `.part` file names its process instead.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from otcache.schemas import whole_files
from otcache.schemas.errors import HostError, OTCacheError

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
FULL_TEXTS = (*(os.strerror(number) for number in FULL), "database or disk is full")
NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL}
"""What a file system without locks answers."""
_LOCK = ".lock"


@contextlib.contextmanager
def name_full_disk(folder: Path, remedy: str, kind: type[OTCacheError] = HostError) -> Iterator[None]:
    """Turn every exception that a full disk is behind into one that names the folder and how much is free.

    `kind` is UsageError where the user chose the folder for the results.
    """
    try:
        yield
    except OTCacheError:
        raise
    except Exception as error:
        if not is_full_disk(error):
            raise
        place = _existing(folder)
        free = shutil.disk_usage(place).free
        raise kind(
            f"no space left on the disk of {place} ({free / 1e6:.1f} MB free): free some or {remedy}, then run the "
            "same command again: it goes on where it stopped"
        ) from error


def is_full_disk(error: BaseException | None) -> bool:
    """Whether a full disk, an exceeded quota or a file size limit is behind an exception, its causes included."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, OSError) and error.errno in FULL:
            return True
        # Several libraries wrap the error in one of their own and keep the text alone (shutil, SQLite, protobuf).
        if isinstance(error, (OSError, sqlite3.Error, RuntimeError)) and any(text in str(error) for text in FULL_TEXTS):
            return True
        error = error.__cause__ or error.__context__
    return False


def _existing(folder: Path) -> Path:
    folder = folder.absolute()
    return next(each for each in (folder, *folder.parents) if each.exists())


@contextlib.contextmanager
def locked_part_folder(target: Path) -> Iterator[Path]:
    """An empty folder `.<name>.<random>.part` beside `target`, locked before it is made.

    What is left of it when the context ends is removed, and so is its lock. Raises OSError.
    """
    part = whole_files.name_part(target)
    lock = _lock_of(part)
    try:
        while not _try_lock(lock):  # another process took the new lock for a leftover in this moment
            part = whole_files.name_part(target)
            lock = _lock_of(part)
        with whole_files.part_folder(target, part) as made:
            yield made
    finally:
        _drop(lock)


def remove_leftovers(folder: Path, name: str) -> list[Path]:
    """Remove `.<name>.<random>.part` folders and `.<name>.<process>.part` files whose process is gone.

    Folders that cannot be locked, because their process lives, stay.

    Args:
        folder: where to look; it may be missing.
        name: regular expression of the names.

    Returns the folders and files that are gone.
    """
    pattern = re.compile(rf"(\.(?:{name})\.(?:[a-z0-9_]{{8}}|[0-9]+)\.part)(?:{re.escape(_LOCK)})?\Z")
    names = os.listdir(folder) if folder.is_dir() else []
    parts = {folder / match.group(1) for match in map(pattern.match, names) if match}
    removed = []
    for part in sorted(parts):
        if part.is_symlink():
            continue
        if part.is_file():
            if not whole_files.runs(part.name.split(".")[-2]):
                part.unlink(missing_ok=True)
                removed.append(part)
            continue
        lock = _lock_of(part)
        with contextlib.suppress(OSError):  # where another user's lock is, that user's process cleans up
            if _try_lock(lock):
                try:
                    if part.is_dir() and lock.is_locked:  # without locks, nobody knows whether its process lives
                        shutil.rmtree(part, ignore_errors=True)
                        removed.append(part)
                finally:
                    _drop(lock)
    return removed


def _lock_of(part: Path) -> BaseFileLock:
    return FileLock(part.with_name(part.name + _LOCK))


def _try_lock(lock: BaseFileLock) -> bool:
    """Take a lock at once: False when another process holds it, True also where the file system has no locks."""
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    return True


def _drop(lock: BaseFileLock) -> None:
    """Release a lock and remove its file, in the order in which nobody can take a file that is going to be removed."""
    if lock.is_locked:
        with contextlib.suppress(OSError):
            os.unlink(lock.lock_file)
        lock.release()


@contextlib.contextmanager
def hold_lock(path: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Hold the lock file `path`; while another process does, wait, and call `on_wait` once.

    Where the file system has no locks, nothing is held: whole files still do not mix.
    """
    lock = FileLock(path)
    if not _try_lock(lock):
        on_wait()
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
