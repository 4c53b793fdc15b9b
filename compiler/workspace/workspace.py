"""Where an interrupted compile goes on: the result of each pass, kept under a digest of what it was made from.

Values are JSON or arrays in `.npz` files (no pickle), written to a temporary name and renamed, so that a file that
exists is whole. One compile at a time works in a folder. Deleting the folder loses time and nothing else.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs

from otcache.schemas.digest import digest_of_value
from otcache.schemas.errors import HostError
from otcache.schemas.whole_files import publish_folder, whole_file

from .disk import hold_lock, is_full_disk, locked_part_folder, name_full_disk, remove_leftovers

RESULT = r"[a-z-]+-[0-9a-f]{24}(?:\.\w+)?"
"""Names of results, as a regular expression."""

LOCK = ".lock"
ELSEWHERE = "name another folder in OTC_CACHE"
"""What a user can do about a workspace that is of no use."""


def default_workspace() -> Path:
    """`$OTC_CACHE`, `$XDG_CACHE_HOME/otcache`, or `otcache` in the cache folder that the system gives the user."""
    if folder := os.environ.get("OTC_CACHE"):
        return Path(folder)
    if folder := os.environ.get("XDG_CACHE_HOME"):  # on every system, although only some know it
        return Path(folder) / "otcache"
    return platformdirs.user_cache_path("otcache", appauthor=False)


def make_folder(folder: Path) -> None:
    """Make a folder of the workspace if it is missing. Raises HostError where nothing can be written to it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        if is_full_disk(error):
            raise
        raise HostError(f"workspace {folder} cannot be written to ({error.strerror}): {ELSEWHERE}") from error


class Workspace:
    """Results of passes in one folder."""

    def __init__(self, folder: Path, on_reuse: Callable[[str], None] | None = None) -> None:
        self.folder = folder
        self.on_reuse = on_reuse
        self.reused: list[str] = []
        """Names of the passes whose result was found here."""
        self.computed: list[str] = []
        """Names of those whose was not."""

    @contextlib.contextmanager
    def hold(self, on_wait: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Keep other compiles out of the folder, and remove what killed ones left.

        Waits while another one is at work, and calls `on_wait` once then. Raises HostError for a folder that cannot be
        written to, or a disk that is full.
        """
        with self.name_full_disk():
            make_folder(self.folder)
            with hold_lock(self.folder / LOCK, on_wait):
                remove_leftovers(self.folder, f"samples|{RESULT}")
                yield

    def name_full_disk(self) -> contextlib.AbstractContextManager[None]:
        """Turn what a full disk is behind into a HostError that names this folder (`whole_files`)."""
        return name_full_disk(self.folder, ELSEWHERE)

    def has(self, name: str, key: Any, suffix: str) -> bool:
        """Whether the result of a pass is kept here."""
        return self.path(name, key, suffix).exists()

    def path(self, name: str, key: Any, suffix: str) -> Path:
        """Where the result of pass `name` with inputs `key` (a JSON value) is kept."""
        return self.folder / f"{name}-{digest_of_value(key)[7:31]}{suffix}"

    def json(self, name: str, key: Any, compute: Callable[[], Any]) -> Any:
        """The JSON value kept for this pass and key, or `compute()`."""

        def read(path: Path) -> Any:
            return json.loads(path.read_text(encoding="utf-8"))

        def write(path: Path, value: Any) -> None:
            path.write_text(json.dumps(value), encoding="utf-8")

        return self._kept(name, self.path(name, key, ".json"), compute, read, write)

    def arrays(self, name: str, key: Any, compute: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """The named arrays kept for this pass and key, or `compute()`."""

        def read(path: Path) -> dict[str, np.ndarray]:
            with np.load(path, allow_pickle=False) as file:
                return {name: file[name] for name in file.files}

        def write(path: Path, values: dict[str, np.ndarray]) -> None:
            with open(path, "wb") as file:
                np.savez(file, **values)  # type: ignore[arg-type]

        found: dict[str, np.ndarray] = self._kept(name, self.path(name, key, ".npz"), compute, read, write)
        return found

    def tree(self, name: str, key: Any, compute: Callable[[Path], None]) -> Path:
        """A folder of files kept for this pass and key, filled by `compute(folder)`."""
        path = self.path(name, key, "")
        if path.is_dir():
            self._reuse(name)
            return path
        self.computed.append(name)
        with self.name_full_disk():
            self.folder.mkdir(parents=True, exist_ok=True)
            with locked_part_folder(path) as part:
                compute(part)
                try:
                    publish_folder(part, path, replace=False)
                except OSError:
                    if not path.is_dir():  # else another compile was faster, where the file system has no locks
                        raise
        return path

    def _kept(
        self,
        name: str,
        path: Path,
        compute: Callable[[], Any],
        read: Callable[[Path], Any],
        write: Callable[[Path, Any], None],
    ) -> Any:
        if path.exists():
            # A result that the disk has damaged is made again.
            with contextlib.suppress(ValueError, EOFError, KeyError, zipfile.BadZipFile):
                value = read(path)
                self._reuse(name)
                return value
        self.computed.append(name)
        with self.name_full_disk():
            value = compute()
            self.folder.mkdir(parents=True, exist_ok=True)
            with whole_file(path) as part:
                write(part, value)
        return value

    def _reuse(self, name: str) -> None:
        self.reused.append(name)
        if self.on_reuse:
            self.on_reuse(name)
