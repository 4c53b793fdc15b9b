"""Read the manifest of an artifact, and no other file of it. Imports neither torch nor the runtime."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from .digest import canonical_json
from .errors import ArtifactError
from .manifest import (
    MANIFEST_NAME,
    MAX_MANIFEST_BYTES,
    SCHEMA_MAJOR,
    SCHEMA_MINOR,
    SCHEMA_VERSION,
    Manifest,
    core_digest,
)
from .messages import damaged, one_line
from .migrations import migrate
from .strict_json import parse_object
from .whole_files import write_whole


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


_VERSION = re.compile(r"([0-9]{1,4})\.([0-9]{1,4})\Z")


def parse_manifest(data: bytes) -> Manifest:
    """The manifest in the bytes of `manifest.json`, as of the newest minor version. Raises ArtifactError, ValueError."""
    value = manifest_value(data)
    try:
        return Manifest.model_validate_json(canonical_json(value), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"])) or "structure"
        problem = one_line(first["msg"].removeprefix("Value error, "))
        raise damaged(MANIFEST_NAME, f"{one_line(place)}: {problem}", "a valid manifest") from None


def manifest_value(data: bytes) -> dict[str, Any]:
    """The JSON value in the bytes of `manifest.json`, migrated but not compared with the schema. Raises ArtifactError."""
    value = parse_object(data, MANIFEST_NAME)
    minor = _check_version(value.get("schema_version"))
    found, stated = core_digest(value), value.get("digest")
    if found != stated:
        raise damaged(MANIFEST_NAME, f"digest {found}", f"digest {one_line(stated, 80)} as it states")
    return migrate(value, minor, SCHEMA_MINOR)


def _check_version(version: object) -> int:
    """The minor version, of a major one that this reader knows."""
    match = _VERSION.match(version) if isinstance(version, str) else None
    if match is None:
        raise damaged(
            MANIFEST_NAME, f"schema_version {one_line(repr(version), 40)}", f"a version such as {SCHEMA_VERSION}"
        )
    if int(match.group(1)) != SCHEMA_MAJOR:
        fix = "pip install --upgrade otcache" if int(match.group(1)) > SCHEMA_MAJOR else "compile it again"
        raise ArtifactError(
            f"artifact cannot be read: {MANIFEST_NAME}: found schema {version}: expected {SCHEMA_MAJOR}.x: {fix}"
        )
    return int(match.group(2))


def replace_manifest(folder: Path, value: dict[str, Any]) -> None:
    """Put a JSON value in the place of the manifest, in one rename. Raises OSError and leaves the old one then."""
    text = json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n"
    write_whole(folder / MANIFEST_NAME, text.encode(), part=f".{os.getpid()}")
