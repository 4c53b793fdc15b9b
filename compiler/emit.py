"""Pass `emit`: everything so far → the artifact folder, whole or not at all.

Files are gathered in a temporary folder beside the target, the manifest is written last, and one rename puts the
folder in place. An existing target is replaced only with `force`, and only if it is an artifact or empty.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from otcache.schemas.digest import digest_of_file
from otcache.schemas.errors import ArtifactError
from otcache.schemas.manifest import MANIFEST_NAME, FileEntry, Manifest, core_digest


def check_target(target: Path, *, force: bool) -> None:
    """Raise ArtifactError when the artifact cannot be written to `target`."""
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise ArtifactError(f"output {target} exists and is no folder: choose another with -o")
    if target.is_dir() and any(target.iterdir()):
        if not force:
            raise ArtifactError(f"output folder {target} exists: choose another with -o, or replace it with --force")
        if not (target / MANIFEST_NAME).is_file():
            raise ArtifactError(
                f"output folder {target} holds no {MANIFEST_NAME}, so it is no artifact: --force will not remove it"
            )
    parent = target.absolute().parent
    ancestor = next(folder for folder in (parent, *parent.parents) if folder.exists())
    if not ancestor.is_dir() or not os.access(ancestor, os.W_OK):
        raise ArtifactError(
            f"output folder {target} cannot be made in {ancestor}: expected a folder that can be written to"
        )


def emit(
    target: Path, fill: Callable[[Path], None], manifest: dict[str, Any], *, force: bool, attachments: frozenset[str]
) -> Manifest:
    """Write an artifact.

    Args:
        target: the artifact folder.
        fill: writes all files but the manifest into the folder that it is given.
        manifest: the manifest's fields without `files`, `attachments` and `digest`.
        attachments: first parts of the paths that are reports rather than parts of the artifact.

    Returns the manifest as written. Raises ArtifactError, and leaves nothing behind, when something cannot be written.
    """
    check_target(target, force=force)
    target = target.absolute()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent))
    except OSError as error:
        raise ArtifactError(f"output folder {target} cannot be made: {error.strerror}") from error
    try:
        fill(work)
        entries = _entries(work)
        inside = [entry for entry in entries if entry["path"].split("/")[0] not in attachments]
        outside = [entry for entry in entries if entry["path"].split("/")[0] in attachments]
        fields = {**manifest, "files": inside, "attachments": outside, "digest": "sha256:" + "0" * 64}
        value = Manifest.model_validate(fields).model_dump(mode="json")
        value["digest"] = core_digest(value)
        whole = Manifest.model_validate(value)
        (work / MANIFEST_NAME).write_text(
            json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8"
        )
        work.chmod(0o755)
        _swap(work, target)
    except OSError as error:
        raise ArtifactError(
            f"artifact {target} could not be written: {error.strerror or error}; nothing was left behind"
        ) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return whole


def _entries(folder: Path) -> list[dict[str, Any]]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return [
        FileEntry(
            path=path.relative_to(folder).as_posix(), size_bytes=path.stat().st_size, digest=digest_of_file(path)
        ).model_dump(mode="json")
        for path in paths
    ]


def _swap(work: Path, target: Path) -> None:
    """Put `work` in the place of `target`; the old folder goes only when the new one is there."""
    if not target.exists():
        os.rename(work, target)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".old", dir=target.parent))
    os.rename(target, old / "old")
    try:
        os.rename(work, target)
    except OSError:
        os.rename(old / "old", target)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)
