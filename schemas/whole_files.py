"""The one writer of files and folders that appear whole or not at all.

What is written goes to a temporary name beside its place, which ends in `.part`; it is put on the disk, renamed, and
then the folder that holds the name is put on the disk as well. After a power cut, therefore, the old content or the new
one is there, never a part of it. What a killed process leaves behind is a `.part`: whoever fills one holds a lock on
it, which the kernel drops with the process, so that `sweep_leftovers` knows it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def whole_file(path: Path, *, alone: bool = False) -> Iterator[Path]:
    """A new, empty file `.<name>.<process>.part` to write to, which takes the place of `path` when the context ends.

    It is removed, and `path` left as it was, if the context raises. Raises OSError.

    Args:
        path: the file; its folder must exist.
        alone: whether no other process can write it at the same time. The temporary name is then `.<name>.part`, and
            what a killed process left there is overwritten: for files that are too large to be left.
    """
    part = path.with_name(f".{path.name}.part") if alone else own_part(path)
    try:
        part.unlink(missing_ok=True)
        os.close(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))  # nobody's link is followed from here on
        with _locked(part):
            yield part
            sync(part)
            os.replace(part, path)
        sync(path.parent)
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def write_whole(path: Path, data: bytes | memoryview | str, *, alone: bool = False) -> None:
    """Put data, text as UTF-8, in the place of a file (`whole_file`). Raises OSError and leaves the old file then."""
    with whole_file(path, alone=alone) as part:
        part.write_bytes(data.encode() if isinstance(data, str) else data)


def own_part(target: Path) -> Path:
    """A name for a temporary file or folder beside `target` that says whose it is: `.<name>.<process>.part`."""
    return target.with_name(f".{target.name}.{os.getpid()}.part")


def name_part(target: Path) -> Path:
    """A name for a temporary folder beside `target` that no other process has: `.<name>.<8 hex digits>.part`."""
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")


@contextlib.contextmanager
def part_folder(target: Path, part: Path | None = None) -> Iterator[Path]:
    """An empty folder of the user's own beside `target`, to be filled and published.

    What is left of it when the context ends is removed: all of it, unless it was published. `part` is its name if that
    is known before (`name_part`). Raises OSError.
    """
    part = part or name_part(target.absolute())  # named before it is made: a signal may come at any time
    try:
        part.mkdir(mode=0o700)
        with _locked(part):
            yield part
    finally:
        shutil.rmtree(part, ignore_errors=True)


def sweep_leftovers(target: Path) -> list[Path]:
    """Remove the files and folders `.<name>.<process>.part` beside `target` that killed processes have left.

    One whose process lives, or whose lock is held, as by a process of another host, stays. Returns what is gone; raises
    OSError.
    """
    pattern = re.compile(rf"\.{re.escape(target.name)}\.([0-9]+)\.part\Z")
    folder, removed = target.absolute().parent, []
    for name in sorted(os.listdir(folder)):
        part = folder / name
        match = pattern.match(name)
        if match is None or part.is_symlink() or (runs(match.group(1)) and int(match.group(1)) != os.getpid()):
            continue
        with contextlib.suppress(OSError), _locked(part) as is_ours:  # another's may not even be opened
            if is_ours:
                shutil.rmtree(part) if part.is_dir() else part.unlink()
                removed.append(part)
    return removed


def runs(process: str) -> bool:
    """Whether the process of a number lives."""
    try:
        os.kill(int(process), 0)
    except (ProcessLookupError, OverflowError, ValueError):
        return False
    except PermissionError:
        return True
    return True


@contextlib.contextmanager
def _locked(part: Path) -> Iterator[bool]:
    """Hold a lock on a file or folder. False where another process holds it, or the system has no such locks."""
    try:
        import fcntl

        descriptor = os.open(part, os.O_RDONLY)
    except (ImportError, OSError):
        yield False
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_held = True
        except OSError:
            is_held = False
        yield is_held
    finally:
        os.close(descriptor)


def publish_folder(part: Path, target: Path, *, replace: bool = True) -> None:
    """Put the folder `part` in the place of `target`, with everything in it on the disk. Raises OSError.

    A folder that was there is afterwards where `part` was. Where the system can exchange two folders (Linux), there is
    no moment without one; elsewhere the old one stands under another name for a moment, from which `recover_folder`
    brings it back. Without `replace`, a folder that is not empty is an error.
    """
    for parent, _, names in os.walk(part):
        for name in names:
            sync(Path(parent, name))
        sync(Path(parent))
    if not replace or not target.exists() or not any(target.iterdir()):
        os.rename(part, target)  # fails if something has appeared there since
    elif not _exchange(part, target):
        old = _old(target)
        os.rename(target, old)
        try:
            os.rename(part, target)
        except OSError:
            os.rename(old, target)
            raise
        os.rename(old, part)
    sync(target.absolute().parent)


def recover_folder(target: Path, mark: str) -> None:
    """Put a folder back that a process killed between two renames left under another name.

    `mark` is a file that such a folder holds. Raises OSError.
    """
    old = _old(target.absolute())
    if (old / mark).is_file() and not target.exists():
        os.rename(old, target)


def sync(path: Path) -> None:
    """Have the system put a file's content, or the names in a folder, on the disk. Raises OSError.

    Links are left alone, and folders where the system or the file system does not do this for folders.
    """
    if path.is_symlink():
        return
    is_folder = path.is_dir()
    if is_folder and os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not is_folder or error.errno not in _NO_SYNC:
            raise
    finally:
        os.close(descriptor)


_NO_SYNC = frozenset({errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF, errno.EROFS})
"""What file systems answer that put no folders on the disk."""


def _old(target: Path) -> Path:
    """Where the old folder stands between the two renames of a system that cannot exchange folders."""
    return target.with_name(f".{target.name}.old")


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two folders in one step; False where the system or the file system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    with contextlib.suppress(OSError, AttributeError):
        # renameat2(AT_FDCWD, first, AT_FDCWD, second, RENAME_EXCHANGE)
        rename = ctypes.CDLL(None, use_errno=True).renameat2
        return bool(rename(-100, os.fsencode(first), -100, os.fsencode(second), ctypes.c_uint(2)) == 0)
    return False
