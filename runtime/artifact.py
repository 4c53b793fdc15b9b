"""Opens an artifact: every byte of it is hostile until its digest has been checked.

Consumes a folder as `schemas/README.md` specifies it. The manifest is checked in this order: a regular file, its size,
UTF-8, depth, JSON without duplicate keys or numbers that are not finite, major version, digest, structure. A file is
checked in this order: listed, no symbolic link on the way, a regular file, size, digest. Nothing is deserialised
before that, and whatever is wrong ends in one `ArtifactError`.

The path of the folder itself is the caller's and trusted: it may be or contain a symbolic link.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from pydantic import ValidationError

from otcache.schemas.errors import ArtifactError
from otcache.schemas.manifest import (
    MANIFEST_NAME,
    MAX_MANIFEST_BYTES,
    SCHEMA_MAJOR,
    SCHEMA_VERSION,
    FileEntry,
    Manifest,
    core_digest,
)

from .messages import one_line

MAX_DEPTH = 32
"""Deepest nesting of the manifest's JSON; written ones have 8."""

_VERSION = re.compile(r"(\d{1,4})\.\d{1,4}\Z")
_STRUCTURE = re.compile(r'\\.|["\[\]{}]', re.DOTALL)
_READ_FLAGS = os.O_RDONLY | sum(getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY"))
_AGAIN = "restore it from where the artifact came from, or compile it again"

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
        """Read and check the manifest; no other file is touched. Raises ArtifactError and nothing else."""
        root = Path(folder)
        try:
            _check_folder(root)
            data = _read_manifest(root)
            manifest = _parse_manifest(data)
        except (MemoryError, RecursionError, OSError, ValueError) as error:
            raise ArtifactError(_message(MANIFEST_NAME, one_line(error), "a readable manifest")) from None
        entries = {entry.path: entry for entry in (*manifest.files, *manifest.attachments)}
        return cls(root, manifest, len(data), entries)

    def path(self, name: str) -> Path:
        """Path of a listed file whose size and digest are right; checked once in a process. Raises ArtifactError."""
        entry = self._entry(name)
        path, status = self._locate(entry)
        identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns, entry.digest)
        with _verified_lock:
            known = identity in _verified
        if not known:
            _check_digest(entry, path)
            with _verified_lock:
                _verified.add(identity)
        return path

    def engine_path(self, name: str) -> Path:
        """As `path`, for a file that a library opens: listed files beside it, such as its weights, are checked too."""
        parent = name.rpartition("/")[0]
        for entry in self.manifest.files:
            if entry.path.rpartition("/")[0] == parent:
                self.path(entry.path)
        return self.path(name)

    def read(self, name: str) -> bytes:
        """Content of a listed file, the very bytes whose digest was checked. Raises ArtifactError."""
        entry = self._entry(name)
        path, _ = self._locate(entry)
        try:
            with _open(path) as file:
                data = file.read(entry.size_bytes + 1)
        except (OSError, MemoryError) as error:
            raise ArtifactError(_message(name, one_line(error), "a readable file")) from None
        _compare_digest(entry, hashlib.sha256(data).hexdigest())
        return data

    def check_structure(self) -> int:
        """Every listed file is there with its size (attachments may be absent). Returns how many; no content is read."""
        return len([self._locate(entry) for entry in self._present()])

    def verify(self) -> Verification:
        """Structure, then the digest of every listed file, always read anew. Raises ArtifactError at the first fault."""
        self.check_structure()
        present = self._present()
        for entry in present:
            _check_digest(entry, self._locate(entry)[0])
        size = self.manifest_bytes + sum(entry.size_bytes for entry in present)
        return Verification(len(present) + 1, size, self.manifest.digest, self._unlisted())

    def _entry(self, name: str) -> FileEntry:
        if name not in self._entries:
            raise ArtifactError(_message(one_line(name), "not listed in the manifest", "a listed file"))
        return self._entries[name]

    def _present(self) -> list[FileEntry]:
        attached = [entry for entry in self.manifest.attachments if os.path.lexists(self.folder / entry.path)]
        return [*self.manifest.files, *attached]

    def _locate(self, entry: FileEntry) -> tuple[Path, os.stat_result]:
        path, status = _locate(self.folder, entry.path)
        if status.st_size != entry.size_bytes:
            raise ArtifactError(_message(entry.path, f"{status.st_size} bytes", f"{entry.size_bytes} bytes"))
        return path, status

    def _unlisted(self) -> tuple[str, ...]:
        found: list[str] = []
        for parent, folders, files in os.walk(self.folder):
            links = [name for name in folders if os.path.islink(os.path.join(parent, name))]
            found += [Path(parent, name).relative_to(self.folder).as_posix() for name in (*files, *links)]
        return tuple(sorted({one_line(name) for name in found if name != MANIFEST_NAME and name not in self._entries}))


def _message(name: str, found: str, expected: str, fix: str = _AGAIN) -> str:
    return f"artifact is damaged: {name}: found {found}: expected {expected}: {fix}"


def _check_folder(root: Path) -> None:
    name = one_line(root)
    if not root.is_dir():
        found = "a file" if root.exists() else "nothing there"
        raise ArtifactError(f"{name} is no artifact: found {found}: expected a folder: `otc compile` makes one")
    if not os.path.lexists(root / MANIFEST_NAME):
        raise ArtifactError(
            f"{name} is no artifact: found no {MANIFEST_NAME}: expected one, it is written last: "
            "name another folder, or let `otc compile` finish"
        )


def _locate(root: Path, name: str) -> tuple[Path, os.stat_result]:
    """Path and status of a regular file inside `root`, with no symbolic link on the way."""
    path = root
    parts = name.split("/")
    for index, part in enumerate(parts):
        path = path / part
        is_last = index == len(parts) - 1
        try:
            status = os.lstat(path)
        except FileNotFoundError:
            raise ArtifactError(_message(name, "nothing there", "a file")) from None
        except (OSError, ValueError) as error:
            raise ArtifactError(_message(name, one_line(error), "a file")) from None
        if not (stat.S_ISREG if is_last else stat.S_ISDIR)(status.st_mode):
            expected = "a regular file" if is_last else f"{part} to be a folder"
            raise ArtifactError(_message(name, f"{_kind(status.st_mode)} at {part}", expected))
    return path, status


def _kind(mode: int) -> str:
    kinds = {stat.S_IFLNK: "a symbolic link", stat.S_IFDIR: "a folder", stat.S_IFREG: "a file"}
    return kinds.get(stat.S_IFMT(mode), "a special file")


def _open(path: Path) -> BinaryIO:
    """Opened for reading, bytes; a link or special file that took its place since it was looked at is refused."""
    descriptor = os.open(path, _READ_FLAGS)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{path.name} is no regular file")
    return os.fdopen(descriptor, "rb")


def _check_digest(entry: FileEntry, path: Path) -> None:
    running = hashlib.sha256()
    try:
        with _open(path) as file:
            while piece := file.read(1 << 20):
                running.update(piece)
    except OSError as error:
        raise ArtifactError(_message(entry.path, one_line(error), "a readable file")) from None
    _compare_digest(entry, running.hexdigest())


def _compare_digest(entry: FileEntry, found: str) -> None:
    if f"sha256:{found}" != entry.digest:
        raise ArtifactError(_message(entry.path, f"digest sha256:{found}", entry.digest))


def _read_manifest(root: Path) -> bytes:
    path, status = _locate(root, MANIFEST_NAME)
    if status.st_size > MAX_MANIFEST_BYTES:
        found, expected = f"{status.st_size} bytes", f"at most {MAX_MANIFEST_BYTES} bytes"
        raise ArtifactError(_message(MANIFEST_NAME, found, expected))
    with _open(path) as file:
        data: bytes = file.read(MAX_MANIFEST_BYTES + 1)
    if len(data) > MAX_MANIFEST_BYTES:
        raise ArtifactError(_message(MANIFEST_NAME, "a growing file", f"at most {MAX_MANIFEST_BYTES} bytes"))
    return data


def _parse_manifest(data: bytes) -> Manifest:
    value = _parse_json(data)
    _check_version(value.get("schema_version"))
    found, stated = core_digest(value), value.get("digest")
    if found != stated:
        raise ArtifactError(_message(MANIFEST_NAME, f"digest {found}", f"digest {one_line(stated)} as it states"))
    try:
        return Manifest.model_validate_json(data, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"])) or "structure"
        problem = one_line(first["msg"].removeprefix("Value error, "))
        raise ArtifactError(_message(MANIFEST_NAME, f"{one_line(place)}: {problem}", "a valid manifest")) from None


def _parse_json(data: bytes) -> dict[str, Any]:
    """JSON object of at most MAX_DEPTH levels; refuses duplicate keys and numbers that are not finite."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        found = f"byte 0x{data[error.start]:02x} at {error.start}"
        raise ArtifactError(_message(MANIFEST_NAME, found, "UTF-8")) from None
    _check_depth(text)
    try:
        value = json.loads(
            text, object_pairs_hook=_unique_pairs, parse_constant=_refuse_constant, parse_float=_finite_float
        )
    except ValueError as error:
        raise ArtifactError(_message(MANIFEST_NAME, one_line(error), "valid JSON")) from None
    if not isinstance(value, dict):
        raise ArtifactError(_message(MANIFEST_NAME, f"a JSON {type(value).__name__}", "a JSON object"))
    return value


def _check_depth(text: str) -> None:
    """One pass over brackets and quotes, before a recursive parser sees the text."""
    depth, in_string = 0, False
    for match in _STRUCTURE.finditer(text):
        mark = match.group()
        if mark == '"':
            in_string = not in_string
        elif not in_string and len(mark) == 1:
            depth += 1 if mark in "[{" else -1
            if depth > MAX_DEPTH:
                found = f"more than {MAX_DEPTH} levels at character {match.start()}"
                raise ArtifactError(_message(MANIFEST_NAME, found, f"at most {MAX_DEPTH} levels"))


def _unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"key {key!r} twice")
        result[key] = value
    return result


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"number {name}")


def _finite_float(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"number {text[:32]}, which is out of range")
    return number


def _check_version(version: object) -> None:
    match = _VERSION.match(version) if isinstance(version, str) else None
    if match is None:
        found = f"schema_version {one_line(repr(version), 40)}"
        raise ArtifactError(_message(MANIFEST_NAME, found, f"a version such as {SCHEMA_VERSION}"))
    if int(match.group(1)) != SCHEMA_MAJOR:
        fix = "pip install --upgrade otcache" if int(match.group(1)) > SCHEMA_MAJOR else "compile it again"
        raise ArtifactError(
            f"artifact cannot be read: {MANIFEST_NAME}: found schema {version}: expected {SCHEMA_MAJOR}.x: {fix}"
        )
