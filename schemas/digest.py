"""Digests of bytes, files and values: `sha256:<hex>`."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

FLOAT = "__float__"
"""Key of an object that stands for a float which JSON does not have."""


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
    """JSON with sorted keys and no spaces; floats in their shortest form that reads back the same.

    Numbers that JSON does not have stand as transformers writes them in configs.

    >>> canonical_json({"b": 0.1, "a": float("-inf")})
    b'{"a":{"__float__":"-Infinity"},"b":0.1}'
    """
    try:
        text = _dumps(value)
    except ValueError:
        text = _dumps(with_named_floats(value))
    return text.encode("utf-8", "surrogatepass")  # configs may hold half a pair as an escape


def _dumps(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False)


def with_named_floats(value: Any) -> Any:
    """The value with `{"__float__": "Infinity"}`, `"-Infinity"` or `"NaN"` in place of floats that JSON has not."""
    if isinstance(value, float) and not math.isfinite(value):
        return {FLOAT: json.dumps(value)}
    if isinstance(value, Mapping):
        return {key: with_named_floats(item) for key, item in value.items()}
    return [with_named_floats(item) for item in value] if isinstance(value, list | tuple) else value


def digest_of_value(value: Any) -> str:
    """Digest of a JSON value, independent of the order of its keys."""
    return digest_of_bytes(canonical_json(value))


def digest_of_files(folder: Path, paths: Iterable[Path]) -> str:
    """Digest of several files: of their names relative to `folder` and their digests."""
    return digest_of_value({str(path.relative_to(folder).as_posix()): digest_of_file(path) for path in sorted(paths)})
