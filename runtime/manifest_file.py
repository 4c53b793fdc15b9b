"""Write an artifact's manifest anew, whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from otcache.schemas.manifest import MANIFEST_NAME

from .files import write_whole


def replace_manifest(folder: Path, value: dict[str, Any]) -> None:
    """Put a JSON value in the place of the manifest, in one rename. Raises OSError and leaves the old one then."""
    text = json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n"
    write_whole(folder / MANIFEST_NAME, text.encode(), part=f".{os.getpid()}")
