"""Digests of bytes, files and values: `sha256:<hex>`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def digest_of_bytes(data: bytes | memoryview) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def digest_of_file(path: Path) -> str:
    """Digest of a file's content, read in pieces."""
    running = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            running.update(piece)
    return "sha256:" + running.hexdigest()


def canonical_json(value: Any) -> bytes:
    """JSON with sorted keys and no spaces; floats in their shortest form that reads back the same."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    return text.encode()


def digest_of_value(value: Any) -> str:
    """Digest of a JSON value, independent of the order of its keys."""
    return digest_of_bytes(canonical_json(value))


def digest_of_files(folder: Path, paths: Iterable[Path]) -> str:
    """Digest of several files: of their names relative to `folder` and their digests."""
    return digest_of_value({str(path.relative_to(folder).as_posix()): digest_of_file(path) for path in sorted(paths)})
