"""Write an artifact's manifest anew, whole or not at all."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from otcache.schemas.manifest import MANIFEST_NAME


def replace_manifest(folder: Path, value: dict[str, Any]) -> None:
    """Put a JSON value in the place of the manifest, in one rename. Raises OSError and leaves the old one then."""
    target = folder / MANIFEST_NAME
    partial = target.with_name(f".{MANIFEST_NAME}.{os.getpid()}.partial")
    try:
        with open(partial, "w", encoding="utf-8") as file:
            file.write(json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
    finally:
        with suppress(OSError):
            partial.unlink()
