"""Read the manifest of an artifact, and no other file of it. Imports neither torch nor the runtime."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from otcache.schemas.errors import ArtifactError
from otcache.schemas.manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES, Manifest, core_digest


def read_manifest(artifact: Path) -> tuple[Manifest, dict[str, Any]]:
    """The manifest and the JSON value that it was read from. Raises ArtifactError."""
    path = artifact / MANIFEST_NAME
    try:
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise ArtifactError(f"{path}: expected at most {MAX_MANIFEST_BYTES} bytes")
        value = json.loads(path.read_bytes())
        manifest = Manifest.model_validate(value)
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read ({error.strerror}): expected an artifact's folder") from error
    except (ValueError, RecursionError, ValidationError) as error:
        raise ArtifactError(f"{path} is no manifest: see otc verify {artifact}") from error
    if core_digest(value) != manifest.digest:
        raise ArtifactError(f"{path} does not match its digest: see otc verify {artifact}")
    return manifest, value
