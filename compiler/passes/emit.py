"""Pass `emit`: everything so far → the artifact folder, whole or not at all.

Files are gathered in a temporary folder beside the target, the manifest is written last, and one rename puts the
folder in place. An existing target is replaced only with `force`, and only if it is an artifact or empty; where the
system can exchange two folders (Linux), there is no moment without an artifact.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from otcache.schemas.digest import digest_of_file
from otcache.schemas.errors import UsageError
from otcache.schemas.manifest import MANIFEST_NAME, FileEntry, Manifest
from otcache.schemas.manifest_file import seal, write_manifest
from otcache.schemas.places import check_creatable, unwritable
from otcache.schemas.whole_files import publish_folder, recover_folder

from ..workspace.disk import locked_part_folder, name_full_disk, remove_leftovers


def check_target(target: Path, *, force: bool) -> None:
    """Raise UsageError when the artifact cannot be written to `target`."""
    check_creatable(target, "-o")
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise UsageError(f"-o is {target}: it exists and is no folder: choose another")
    if target.is_dir() and any(target.iterdir()):
        if not force:
            raise UsageError(f"-o is {target}: it exists: choose another, or replace it with --force")
        if not (target / MANIFEST_NAME).is_file():
            raise UsageError(
                f"-o is {target}: it holds no {MANIFEST_NAME}, so it is no artifact: --force will not remove it: "
                "choose another"
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

    Returns the manifest as written. Raises UsageError and leaves nothing behind when something cannot be written. What
    killed compiles to the same target left beside it is removed.
    """
    target = target.absolute()
    recover(target)
    check_target(target, force=force)
    try:
        with name_full_disk(target.parent, "choose another folder with -o", UsageError):
            target.parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(target.parent, re.escape(target.name))
            with locked_part_folder(target) as work:
                fill(work)
                whole = _finish(work, manifest, attachments)
                check_target(target, force=force)  # another compile may have finished meanwhile
                publish_folder(work, target)
    except OSError as error:
        raise unwritable(target, "-o", error) from error
    return whole


def recover(target: Path) -> None:
    """Put an artifact back that a process killed while it replaced it left under another name."""
    recover_folder(target, MANIFEST_NAME)


def _finish(work: Path, manifest: dict[str, Any], attachments: frozenset[str]) -> Manifest:
    """Write the manifest of the files in `work`."""
    entries = _entries(work)
    inside = [entry for entry in entries if entry["path"].split("/")[0] not in attachments]
    outside = [entry for entry in entries if entry["path"].split("/")[0] in attachments]
    stages = [{**stage, "external_data": _external_data(work, stage["onnx"])} for stage in manifest["stages"]]
    fields = {**manifest, "stages": stages, "files": inside, "attachments": outside, "digest": "sha256:" + "0" * 64}
    whole = write_manifest(work, seal(Manifest.model_validate(fields).model_dump(mode="json"))).manifest
    work.chmod(0o755)
    return whole


def _external_data(work: Path, onnx: str) -> list[str]:
    """The file beside an ONNX file that pass `export` puts large weights into, if it did."""
    data = onnx + ".data"
    return [data] if (work / data).is_file() else []


def _entries(folder: Path) -> list[dict[str, Any]]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return [
        FileEntry(
            path=path.relative_to(folder).as_posix(), size_bytes=path.stat().st_size, digest=digest_of_file(path)
        ).model_dump(mode="json")
        for path in paths
    ]
