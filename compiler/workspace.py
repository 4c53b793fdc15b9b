"""Where an interrupted compile goes on: the result of each pass, kept under a digest of what it was made from.

Values are JSON or arrays in `.npz` files (no pickle), written to a temporary name and renamed, so that a file that
exists is whole. Deleting the folder loses time and nothing else.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from otcache.schemas.digest import digest_of_value


def default_workspace() -> Path:
    """`$OTC_CACHE`, or `otcache` in the user's cache folder."""
    if folder := os.environ.get("OTC_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "otcache"


class Workspace:
    """Results of passes in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.reused: list[str] = []
        """Names of the passes whose result was found here."""

    def path(self, name: str, key: Any, suffix: str) -> Path:
        """Where the result of pass `name` with inputs `key` (a JSON value) is kept."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return self.folder / f"{name}-{digest_of_value(key)[7:31]}{suffix}"

    def json(self, name: str, key: Any, compute: Callable[[], Any]) -> Any:
        """The JSON value kept for this pass and key, or `compute()`."""
        path = self.path(name, key, ".json")
        if path.exists():
            self.reused.append(name)
            return json.loads(path.read_text())
        value = compute()
        self._write(path, lambda part: part.write_text(json.dumps(value)))
        return value

    def arrays(self, name: str, key: Any, compute: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """The named arrays kept for this pass and key, or `compute()`."""
        path = self.path(name, key, ".npz")
        if path.exists():
            self.reused.append(name)
            with np.load(path, allow_pickle=False) as file:
                return {name: file[name] for name in file.files}
        values = compute()

        def save(part: Path) -> None:
            with open(part, "wb") as file:
                np.savez(file, **values)  # type: ignore[arg-type]

        self._write(path, save)
        return values

    @staticmethod
    def _write(path: Path, write: Callable[[Path], Any]) -> None:
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            write(part)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)

    def tree(self, name: str, key: Any, compute: Callable[[Path], None]) -> Path:
        """A folder of files kept for this pass and key, filled by `compute(folder)`."""
        path = self.path(name, key, "")
        if path.is_dir():
            self.reused.append(name)
            return path
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        try:
            compute(part)
            os.replace(part, path)
        finally:
            shutil.rmtree(part, ignore_errors=True)
        return path
