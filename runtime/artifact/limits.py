"""How much of an artifact is read at most: what its manifest states is compared with it before any other file is."""

from __future__ import annotations

import os

from otcache.schemas.errors import ArtifactError, UsageError
from otcache.schemas.manifest import Manifest
from otcache.schemas.messages import one_line

VARIABLE = "OTC_MAX_BYTES"
DEFAULT = 256 << 30
"""A transformer of 32 billion parameters and a text encoder of 24 billion in float32 have 224 GB."""


def max_bytes() -> int:
    """What `OTC_MAX_BYTES` says, else `DEFAULT`. Raises UsageError for anything but a whole number of at least 1."""
    text = os.environ.get(VARIABLE, "").strip()
    if not text:
        return DEFAULT
    if not (text.isascii() and text.isdigit() and len(text) < 20 and int(text) > 0):
        raise UsageError(
            f"{VARIABLE} is {one_line(text, 40)!r}: expected a whole number of bytes: set one, or unset it"
        )
    return int(text)


def check_size(manifest: Manifest, manifest_bytes: int) -> None:
    """Compare the bytes that a manifest states for all its files, and its own, with `max_bytes`. Raises ArtifactError.

    A file of terabytes costs nothing to make where it has holes, and hours to read.
    """
    total = manifest_bytes + sum(entry.size_bytes for entry in (*manifest.files, *manifest.attachments))
    if total > (limit := max_bytes()):
        raise ArtifactError(
            f"artifact states files of {total} bytes in all: expected at most {limit}: set {VARIABLE}={total} if you "
            "trust who made it, or get it again from where it came"
        )
