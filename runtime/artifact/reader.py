"""Opens an artifact: every byte of it is hostile until its digest has been checked.

Consumes a folder as `schemas/README.md` specifies it. `schemas/manifest_file.py` reads the manifest and checks it. A
file is checked in this order: listed, no symbolic link on the way, a regular file, size, digest; an ONNX file then for
the files that it refers to. Nothing is deserialised before that, and whatever is wrong ends in one `ArtifactError`.

The path of the folder itself is the caller's and trusted: it may be or contain a symbolic link.
"""

from __future__ import annotations

import hashlib
import os
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from otcache.schemas.manifest import MANIFEST_NAME, SIGNATURE_NAME, FileEntry, Manifest
from otcache.schemas.manifest_file import read_manifest
from otcache.schemas.messages import AGAIN, damage_error, one_line
from otcache.schemas.safe_files import locate, open_regular

from ..messages import MODULES, build_command
from .limits import check_size
from .onnx_references import external_locations

_verified: set[tuple[Any, ...]] = set()
"""Identities of the files whose digest this process has checked."""
_verified_lock = threading.Lock()


@dataclass(frozen=True)
class Verification:
    """What `Artifact.verify` has checked."""

    files: int
    """Files whose size and digest are right, the manifest among them."""
    size_bytes: int
    digest: str
    """Of the manifest's core."""
    unlisted: tuple[str, ...] = ()
    """Files in the folder that the manifest does not know; never read."""


@dataclass(frozen=True)
class Artifact:
    """A folder whose manifest has been read and found valid."""

    folder: Path
    manifest: Manifest
    manifest_bytes: int = 0
    _entries: dict[str, FileEntry] = field(default_factory=dict, repr=False)

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Artifact:
        """Read and check the manifest, and the sizes that it states; no other file is touched.

        Raises ArtifactError; UsageError for an `OTC_MAX_BYTES` that is no number.
        """
        read = read_manifest(folder)
        check_size(read.manifest, len(read.data))
        entries = {entry.path: entry for entry in (*read.manifest.files, *read.manifest.attachments)}
        return cls(Path(folder), read.manifest, len(read.data), entries)

    def path(self, name: str) -> Path:
        """Path of a listed file whose size and digest are right; checked once in a process. Raises ArtifactError."""
        entry = self._entry(name)
        path, status = self._locate(entry)
        identity = _identity(status, entry)
        with _verified_lock:
            known = identity in _verified
        if not known:
            _check_digest(entry, path, self._fix(name))
            with _verified_lock:
                _verified.add(identity)
        return path

    def engine_path(self, name: str) -> Path:
        """As `path`, for a file that a library opens: files that it refers to are the manifest's, and checked too."""
        path = self.path(name)
        if name.endswith(".onnx"):
            self._check_references(name, path)
        return path

    def read(self, name: str, limit: int | None = None) -> bytes:
        """Content of a listed file, the very bytes whose digest was checked.

        limit: bytes that it may have, for what is made of it; None for what an artifact may have. Raises ArtifactError.
        """
        entry = self._entry(name)
        if limit is not None and entry.size_bytes > limit:
            raise damage_error(name, f"{entry.size_bytes} bytes", f"at most {limit} bytes")
        path, _ = self._locate(entry)
        try:
            with open_regular(path) as file:
                data = file.read(entry.size_bytes + 1)
        except (OSError, MemoryError) as error:
            raise damage_error(name, error, "a readable file") from None
        _compare_digest(entry, hashlib.sha256(data).hexdigest(), self._fix(name))
        return data

    def open_file(self, name: str) -> tuple[FileEntry, BinaryIO]:
        """A listed file with its stated size, open for reading; its content is not checked. Raises ArtifactError."""
        entry = self._entry(name)
        path, _ = self._locate(entry)
        try:
            return entry, open_regular(path)
        except OSError as error:
            raise damage_error(name, error, "a readable file") from None

    def check_structure(self) -> Verification:
        """Check that every listed file is there with its size; no content is read. Attachments may be absent."""
        present = self.present()
        for entry in present:
            self._locate(entry)
        size = self.manifest_bytes + sum(entry.size_bytes for entry in present)
        return Verification(len(present) + 1, size, self.manifest.digest, self._find_unlisted())

    def verify(self) -> Verification:
        """Check the structure, then the digest of every listed file, read anew, then what ONNX files refer to.

        Raises ArtifactError at the first fault.
        """
        result = self.check_structure()
        for entry in self.present():
            path, status = self._locate(entry)
            _check_digest(entry, path, self._fix(entry.path))
            with _verified_lock:
                _verified.add(_identity(status, entry))
        for name in sorted({stage.onnx for stage in self.manifest.stages}):
            self.engine_path(name)
        return result

    def present(self) -> list[FileEntry]:
        """Files, then the attachments that are there, each sorted by path."""
        attached = [entry for entry in self.manifest.attachments if os.path.lexists(self.folder / entry.path)]
        return [*sorted(self.manifest.files, key=_by_path), *sorted(attached, key=_by_path)]

    def _check_references(self, name: str, path: Path) -> None:
        allowed = {file for stage in self.manifest.stages if stage.onnx == name for file in stage.external_data}
        folder = name.rpartition("/")[0]
        for location in external_locations(path, name):
            if (f"{folder}/{location}" if folder else location) not in allowed:
                expected = f"one of {', '.join(sorted(allowed))}" if allowed else "no other file, as the manifest says"
                raise damage_error(name, f"weights that are read from {location!r}", expected, "compile it again")
        for other in sorted(allowed):
            self.path(other)

    def _fix(self, name: str) -> str:
        """What mends a listed file that is not what it has to be: plans can be built where they are."""
        for engine in self.manifest.engines:
            if engine.backend in MODULES and name in (*engine.stages.values(), *engine.combinations.values()):
                return build_command(self.folder, engine)
        return AGAIN

    def _entry(self, name: str) -> FileEntry:
        if name not in self._entries:
            raise damage_error(name, "not listed in the manifest", "a listed file")
        return self._entries[name]

    def _locate(self, entry: FileEntry) -> tuple[Path, os.stat_result]:
        fix = self._fix(entry.path)
        path, status = locate(self.folder, entry.path, fix)
        if status.st_size != entry.size_bytes:
            raise damage_error(entry.path, f"{status.st_size} bytes", f"{entry.size_bytes} bytes", fix)
        return path, status

    def _find_unlisted(self) -> tuple[str, ...]:
        found: list[str] = []
        known = {MANIFEST_NAME, SIGNATURE_NAME, *self._entries}
        for parent, folders, files in os.walk(self.folder):
            links = [name for name in folders if os.path.islink(os.path.join(parent, name))]
            found += [Path(parent, name).relative_to(self.folder).as_posix() for name in (*files, *links)]
        return tuple(sorted({one_line(name) for name in found if name not in known}))


def _by_path(entry: FileEntry) -> str:
    return entry.path


def _identity(status: os.stat_result, entry: FileEntry) -> tuple[Any, ...]:
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns, entry.digest)


def _check_digest(entry: FileEntry, path: Path, fix: str) -> None:
    running, left = hashlib.sha256(), entry.size_bytes + 1  # a file that grows meanwhile has another digest
    try:
        with open_regular(path) as file:
            while piece := file.read(min(1 << 20, left)):
                running.update(piece)
                left -= len(piece)
    except OSError as error:
        raise damage_error(entry.path, error, "a readable file", fix) from None
    _compare_digest(entry, running.hexdigest(), fix)


def _compare_digest(entry: FileEntry, found: str, fix: str) -> None:
    if f"sha256:{found}" != entry.digest:
        raise damage_error(entry.path, f"digest sha256:{found}", entry.digest, fix)
