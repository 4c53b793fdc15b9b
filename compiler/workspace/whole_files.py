"""Files that appear whole or not at all, and that say so clearly when the disk is full.

A temporary name ends in `.part`. Whoever writes a `.part` folder holds a lock on it that the kernel drops with the
process, however it ends: a `.part` without one is a leftover, and the next run removes it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

from otcache.schemas.errors import HostError

try:
    import fcntl
except ImportError:  # Windows: no locks; leftovers stay, and two compiles at once are told apart by their names alone
    fcntl = None  # type: ignore[assignment]

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
FULL_TEXTS = (*(os.strerror(number) for number in FULL), "database or disk is full")


@contextlib.contextmanager
def full_disk_named(folder: Path, remedy: str) -> Iterator[None]:
    """Turn every exception that a full disk is behind into a HostError that names the folder and how much is free."""
    try:
        yield
    except HostError:
        raise
    except Exception as error:
        if not is_full_disk(error):
            raise
        place = _existing(folder)
        free = shutil.disk_usage(place).free
        raise HostError(
            f"no space left on the disk of {place} ({free / 1e6:.1f} MB free): free some or {remedy}, then run the same "
            "command again: it goes on where it stopped"
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


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Have `write` write a file under a temporary name, then put it in place."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def part_folder(target: Path) -> Iterator[Path]:
    """An empty, locked folder `.<name>.<random>.part` beside `target`; what is left of it afterwards is removed."""
    part, lock = _new_name(target), None  # named before it is made: a signal may come at any time
    try:
        while (lock := _made_and_locked(part)) is None:
            part = _new_name(target)
        yield part
    finally:
        shutil.rmtree(part, ignore_errors=True)
        if lock is not None and lock >= 0:
            os.close(lock)


def _new_name(target: Path) -> Path:
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")


def _made_and_locked(part: Path) -> int | None:
    """Make a folder; `_try_lock` of it, or None if another process took it for a leftover in the moment before."""
    part.mkdir(mode=0o700)
    try:
        lock = _try_lock(part)
    except FileNotFoundError:
        return None
    if lock is None or part.exists():
        return lock
    if lock >= 0:
        os.close(lock)
    return None


def remove_leftovers(folder: Path, name: str) -> list[Path]:
    """Remove `.<name>.<random>.part` folders, and `.<name>.<pid>.part` files, of processes that are gone.

    name: regular expression. Folders that cannot be locked, because their process lives, stay.
    """
    pattern = re.compile(rf"\.(?:{name})\.(?:[a-z0-9_]{{8}}|[0-9]+)\.part\Z")
    removed = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if fcntl is None or not pattern.match(path.name) or path.is_symlink():
            continue
        if path.is_file() and not _runs(path.name.split(".")[-2]):
            path.unlink(missing_ok=True)
            removed.append(path)
        elif path.is_dir() and (lock := _try_lock(path)) is not None and lock >= 0:
            shutil.rmtree(path, ignore_errors=True)
            os.close(lock)
            removed.append(path)
    return removed


def _runs(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, OverflowError, ValueError):
        return False
    except PermissionError:
        return True
    return True


def _try_lock(path: Path) -> int | None:
    """A descriptor that holds a lock on a file or folder; None when another holds it; −1 where there are no locks."""
    if fcntl is None:
        return -1
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError:  # a file system without locks
        os.close(descriptor)
        return -1
    return descriptor


@contextlib.contextmanager
def locked(path: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Hold the lock file `path`; while another process does, wait, and call `on_wait` once."""
    if fcntl is None:
        yield
        return
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:  # a file system without locks: whole files still do not mix
            pass
        yield
