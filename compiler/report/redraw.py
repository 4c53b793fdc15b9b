"""Draw the report of an artifact again, from its manifest and `report/evidence.json`, with what was measured since."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

from otcache.schemas.digest import digest_of_file
from otcache.schemas.errors import ArtifactError, UsageError
from otcache.schemas.manifest import FileEntry, Manifest
from otcache.schemas.manifest_file import read_manifest, write_manifest
from otcache.schemas.places import check_writable, unwritable
from otcache.schemas.whole_files import write_whole

from ..workspace.disk import locked_part_folder, name_full_disk
from .data import LATENCY
from .evidence import Bench, read_evidence, write_evidence
from .page import ATTACHMENTS, FOLDER, PAGE, draw_report


def redraw(artifact: Path, bench: Bench | None = None) -> tuple[Path, list[str]]:
    """Write report.html and the figures anew; returns the page and the names of the budgets whose latency the manifest
    holds.

    bench: what was measured of the artifact just now, which is kept with the report.

    The manifest first lets go of the attachments that change and lists them again when they are in place, so the
    artifact is whole at every moment. Raises ArtifactError, UsageError where it cannot be written.
    """
    read = read_manifest(artifact)
    check_writable(artifact / PAGE, "ARTIFACT")
    manifest = read.manifest
    try:
        with name_full_disk(artifact, "free some of it", UsageError), locked_part_folder(artifact.absolute()) as work:
            _copy_evidence(artifact, manifest, work)
            if bench is not None:
                found = read_evidence(work / FOLDER)
                write_evidence(work / FOLDER, found.model_copy(update={"bench": bench}))
            draw_report(work, manifest.model_dump(mode="json"))
            drawn = {path.relative_to(work).as_posix(): path for path in work.rglob("*") if path.is_file()}
            changed = {name: path for name, path in drawn.items() if not _same(artifact / name, path)}
            entries = [_entry(work, name) for name in drawn]
            listed = read.stated.get("attachments", [])
            kept = [entry for entry in listed if entry["path"].split("/")[0] not in ATTACHMENTS]
            stays = [entry for entry in listed if entry["path"] not in changed]
            write_manifest(artifact, {**read.stated, "attachments": stays})
            for name, path in changed.items():
                write_whole(artifact / name, path.read_bytes())
            new = sorted(kept + entries, key=lambda entry: entry["path"])
            write_manifest(artifact, {**read.stated, "attachments": new})
    except OSError as error:
        raise unwritable(artifact / PAGE, "ARTIFACT", error) from error
    return artifact / PAGE, [m.name.removeprefix(LATENCY) for m in manifest.measurements if m.name.startswith(LATENCY)]


def _copy_evidence(artifact: Path, manifest: Manifest, work: Path) -> None:
    """What the report is drawn from, if it is what the manifest lists."""
    (work / FOLDER).mkdir()
    listed = {entry.path: entry.digest for entry in manifest.attachments}
    for name in _sources(listed):
        source = artifact / name
        if source.is_symlink() or not source.is_file():
            raise ArtifactError(f"{source} is missing: compile the artifact again to have a report")
        if digest_of_file(source) != listed[name]:
            raise ArtifactError(f"{source} does not match its digest: see otc verify {artifact}")
        shutil.copyfile(source, work / name)


def _sources(listed: Collection[str]) -> list[str]:
    names = [f"{FOLDER}/{name}" for name in ("evidence.json", "pictures.png", "worst.png")]
    missing = [name for name in names if name not in listed]
    if missing:
        raise ArtifactError(
            f"the manifest lists no {missing[0]}: it was compiled by an older version or lost its report: compile it "
            "again"
        )
    return names


def _same(first: Path, second: Path) -> bool:
    return first.is_file() and first.read_bytes() == second.read_bytes()


def _entry(folder: Path, name: str) -> dict[str, Any]:
    path = folder / name
    entry = FileEntry(path=name, size_bytes=path.stat().st_size, digest=digest_of_file(path))
    return entry.model_dump(mode="json")
