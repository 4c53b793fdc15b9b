"""The one reader and the one writer of `manifest.json`; no other file of an artifact is touched.

Reading checks in this order: a folder; a regular file without links; its size; strict JSON; the major version; the
digest; then it migrates the value of an older minor version, and checks structure and consistency. Every command and
every host reads in this way, so that all of them take the same manifests and refuse the others with the same message.

A manifest that is written back is read first, as the text that it is going to be: what a reader would refuse is never
written.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
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
from .messages import damage_error, one_line
from .migrations import migrate
from .safe_files import read_small
from .strict_json import parse_object
from .whole_files import write_whole

_VERSION = re.compile(r"([0-9]{1,4})\.([0-9]{1,4})\Z")


@dataclass(frozen=True, kw_only=True)
class ManifestFile:
    """A manifest that was read and found valid, in every form that somebody needs."""

    data: bytes
    """The file's content."""
    stated: dict[str, Any]
    """The JSON value as the file has it. Who changes `measurements` or `attachments` alone writes this one back, and
    digest and signature stay.
    """
    migrated: dict[str, Any]
    """The JSON value with the fields of the newest minor version; `schema_version` still says what the file says."""
    manifest: Manifest
    """The migrated value, checked."""


def read_manifest(folder: str | os.PathLike[str]) -> ManifestFile:
    """The manifest of an artifact's folder. Raises ArtifactError and nothing else."""
    root = Path(folder)
    _check_folder(root)
    return parse_manifest(read_small(root, MANIFEST_NAME, MAX_MANIFEST_BYTES))


def parse_manifest(data: bytes) -> ManifestFile:
    """The manifest in the bytes of `manifest.json`, whose size was checked. Raises ArtifactError and nothing else."""
    try:
        stated = parse_object(data, MANIFEST_NAME)
        minor = _check_version(stated.get("schema_version"))
        digest = core_digest(stated)
        if digest != stated.get("digest"):
            expected = f"digest {one_line(stated.get('digest'), 80)} as it states"
            raise damage_error(MANIFEST_NAME, f"digest {digest}", expected)
        migrated = migrate(stated, minor, SCHEMA_MINOR)
        return ManifestFile(data=data, stated=stated, migrated=migrated, manifest=_check_structure(migrated))
    except (MemoryError, RecursionError, ValueError) as error:
        raise damage_error(MANIFEST_NAME, error, "a readable manifest") from None


def write_manifest(folder: Path, value: dict[str, Any]) -> ManifestFile:
    """Put a JSON value in the place of a folder's manifest, whole or not at all.

    `value` states its digest (`seal`). Raises ArtifactError for one that a reader would refuse, OSError where it cannot
    be written; the old manifest stays then.
    """
    data = (json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()
    if len(data) > MAX_MANIFEST_BYTES:
        raise ArtifactError(
            f"{one_line(folder)}: its manifest would have {len(data)} bytes: expected at most {MAX_MANIFEST_BYTES}, as "
            "readers do: compile it for fewer budgets or sizes"
        )
    try:
        read = parse_manifest(data)
    except ArtifactError as error:
        raise ArtifactError(
            f"{one_line(folder)}: its manifest was not written, because every reader would refuse it: {error}"
        ) from None
    write_whole(folder / MANIFEST_NAME, data)
    return read


def seal(value: dict[str, Any]) -> dict[str, Any]:
    """A manifest's JSON value with its right digest."""
    return {**value, "digest": core_digest(value)}


def _check_folder(root: Path) -> None:
    name = one_line(root)
    if not root.is_dir():
        found = "a file" if root.exists() else "nothing there"
        raise ArtifactError(f"{name} is no artifact: found {found}: expected a folder: `otc compile` makes one")
    if not os.path.lexists(root / MANIFEST_NAME):
        raise ArtifactError(
            f"{name} is no artifact: found no {MANIFEST_NAME}: expected one, it is written last: name another folder, "
            "or let `otc compile` finish"
        )


def _check_version(version: object) -> int:
    """The minor version, of a major one that this reader knows."""
    match = _VERSION.match(version) if isinstance(version, str) else None
    if match is None:
        found = f"schema_version {one_line(repr(version), 40)}"
        raise damage_error(MANIFEST_NAME, found, f"a version such as {SCHEMA_VERSION}")
    if int(match.group(1)) != SCHEMA_MAJOR:
        fix = "pip install --upgrade otcache" if int(match.group(1)) > SCHEMA_MAJOR else "compile it again"
        raise ArtifactError(
            f"artifact cannot be read: {MANIFEST_NAME}: found schema {version}: expected {SCHEMA_MAJOR}.x: {fix}"
        )
    return int(match.group(2))


def _check_structure(value: dict[str, Any]) -> Manifest:
    try:
        return Manifest.model_validate_json(canonical_json(value), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"])) or "structure"
        problem = one_line(first["msg"].removeprefix("Value error, "))
        raise damage_error(MANIFEST_NAME, f"{one_line(place)}: {problem}", "a valid manifest") from None
