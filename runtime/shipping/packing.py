"""An artifact as one file and back: `otc pack`, `otc unpack`. `schemas/README.md`, "Archive", is the specification.

The archive is a plain tar (POSIX ustar) that any tar reads, and there is exactly one for an artifact: `manifest.json`
first, then `manifest.sig` if there is one, then the listed files in the order of their paths, then the attachments that
are there; times, owners and padding all zero. So a reader needs no tar library, whose many forms of headers, links and
sparse files have been attacked often: it builds the header that it expects and compares the 512 bytes.

Both directions stream, hold a piece of a file at a time, and check every digest on the way.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from otcache.schemas.errors import ArtifactError, UsageError
from otcache.schemas.manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES, SIGNATURE_NAME, FileEntry, Manifest
from otcache.schemas.manifest_file import parse_manifest, read_manifest
from otcache.schemas.messages import damage_error, one_line
from otcache.schemas.places import check_creatable, check_new_file, unwritable
from otcache.schemas.safe_files import read_small
from otcache.schemas.signature import MAX_SIGNATURE_BYTES
from otcache.schemas.whole_files import (
    own_part,
    part_folder,
    publish_folder,
    recover_folder,
    sweep_leftovers,
    whole_file,
)

from ..artifact.limits import check_size
from ..artifact.reader import Artifact
from .signing import compare_signature, load_public_key, parse_signature, unsigned_error

BLOCK = 512
END = bytes(2 * BLOCK)
PIECE = 1 << 20
_OCTAL_LIMIT = 8**11
"""Sizes from here on do not fit in eleven octal digits and are written in base 256, as GNU tar does."""


@dataclass(frozen=True, kw_only=True)
class Packed:
    """What an archive holds."""

    digest: str
    """Of the artifact."""
    files: int
    size_bytes: int
    """Of the archive."""
    signed: bool
    """Whether a signature travels along; only `public_key` checks it."""


def header(name: str, size: int) -> bytes:
    """The one header of a member: a regular file, mode 0644, owner and time 0. Raises ArtifactError for a long path."""
    prefix, short = _split(name)
    digits = b"%011o\0" % size if size < _OCTAL_LIMIT else b"\x80" + size.to_bytes(11, "big")
    fields = (
        short.ljust(100, b"\0"),
        b"0000644\0",
        b"0000000\0",
        b"0000000\0",
        digits,
        b"00000000000\0",
        b" " * 8,
        b"0",
        bytes(100),
        b"ustar\00000",
        bytes(32),
        bytes(32),
        b"0000000\0",
        b"0000000\0",
        prefix.ljust(155, b"\0"),
        bytes(12),
    )
    whole = b"".join(fields)
    return whole[:148] + b"%06o\0 " % sum(whole) + whole[156:]


def _split(name: str) -> tuple[bytes, bytes]:
    """A path as ustar's prefix of at most 155 bytes and name of at most 100, the prefix as short as can be."""
    path = name.encode("ascii")
    if len(path) <= 100:
        return b"", path
    for place in range(len(path) - 101, 156):
        if path[place : place + 1] == b"/":
            return path[:place], path[place + 1 :]
    raise ArtifactError(
        f"{name} is too long a path for an archive: expected parts of at most 100 characters: rename it"
    )


def padding(size: int) -> int:
    """How many zeros stand after a member's content of so many bytes.

    >>> padding(512), padding(513)
    (0, 511)
    """
    return -size % BLOCK


def pack(artifact: Artifact, out: BinaryIO) -> Packed:
    """Write an artifact to a stream; the bytes depend on those of its files alone.

    Raises ArtifactError for a damaged file; the archive is then left without its end.
    """
    parts = small_parts(artifact)
    present = artifact.present()
    for entry in present:
        header(entry.path, entry.size_bytes)  # a path that does not fit is found before anything is written
    written = 0
    for name, data in parts:
        written += _write(out, header(name, len(data)) + data + bytes(padding(len(data))))
    for entry in present:
        written += _write(out, header(entry.path, entry.size_bytes))
        entry, file = artifact.open_file(entry.path)
        with file:
            copy_checked(file.read, entry, lambda piece: out.write(piece))
        written += entry.size_bytes + _write(out, bytes(padding(entry.size_bytes)))
    written += _write(out, END)
    out.flush()
    signed = len(parts) > 1
    return Packed(digest=artifact.manifest.digest, files=len(parts) + len(present), size_bytes=written, signed=signed)


def small_parts(artifact: Artifact) -> list[tuple[str, bytes]]:
    """The manifest's bytes, and then those of the signature if there is one, whose form is checked.

    Raises ArtifactError, also for a manifest that is not the one that was opened.
    """
    read = read_manifest(artifact.folder)
    parts = [(MANIFEST_NAME, read.data)]
    if read.manifest != artifact.manifest:
        raise ArtifactError(f"{one_line(artifact.folder)}: it has changed while it was read: start it again")
    if os.path.lexists(artifact.folder / SIGNATURE_NAME):
        parts.append((SIGNATURE_NAME, read_small(artifact.folder, SIGNATURE_NAME, MAX_SIGNATURE_BYTES)))
        parse_signature(parts[1][1])
    return parts


def _write(out: BinaryIO, data: bytes) -> int:
    out.write(data)
    return len(data)


def copy_checked(read: Callable[[int], bytes], entry: FileEntry, write: Callable[[bytes], object]) -> None:
    """Copy exactly the bytes that an entry states. Raises ArtifactError unless size and digest are right."""
    running, left = hashlib.sha256(), entry.size_bytes
    while left:
        piece = read(min(left, PIECE))
        if not piece:
            raise damage_error(entry.path, f"{entry.size_bytes - left} bytes", f"{entry.size_bytes} bytes")
        running.update(piece)
        write(piece)
        left -= len(piece)
    if f"sha256:{running.hexdigest()}" != entry.digest:
        raise damage_error(entry.path, f"digest sha256:{running.hexdigest()}", entry.digest)


def pack_file(artifact: Artifact, target: Path, *, force: bool) -> Packed:
    """Write an artifact's archive to a file, whole or not at all. Raises ArtifactError, UsageError, HostError."""
    check_new_file(target, "-o", force=force)
    with _naming(target):
        sweep_leftovers(target)
    with _naming(target), whole_file(target) as part:
        with open(part, "wb") as out:
            packed = pack(artifact, out)
        check_new_file(target, "-o", force=force)  # something may have appeared there meanwhile
    return packed


@contextlib.contextmanager
def _naming(target: Path) -> Iterator[None]:
    """Turn the system's errors of writing into one that names the target."""
    try:
        yield
    except OSError as error:
        raise unwritable(target, "-o", error) from None


class _Members:
    """The members of an archive, read in order from a stream that cannot be rewound."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.consumed = 0
        self._next: bytes | None = None

    def peek(self) -> bytes:
        """The next header."""
        if self._next is None:
            self._next = self.read(BLOCK)
        return self._next

    def take(self, name: str, size: int) -> None:
        """Go past the header of the member that has to come next. Raises ArtifactError if another one is there."""
        if self.peek() != header(name, size):
            expected = f"{name} of {size} bytes, a regular file as otc pack writes it"
            raise _broken(f"{_describe(self.peek())} at byte {self.consumed - len(self.peek())}", expected)
        self._next = None

    def read(self, size: int) -> bytes:
        """Up to `size` bytes; less at the end of the stream only."""
        pieces = []
        while size and (piece := self._stream.read(size)):
            pieces.append(piece)
            size -= len(piece)
            self.consumed += len(piece)
        return b"".join(pieces)

    def end_member(self, size: int) -> None:
        """Go past the zeros after a member of so many bytes. Raises ArtifactError if anything else is there."""
        if self.read(padding(size)) != bytes(padding(size)):
            raise _broken("padding that is not zero, or a cut", "zeros")

    def small(self, name: str, limit: int) -> bytes:
        """Content of a member whose size only its header says."""
        size = _stated_size(self.peek())
        if size is None or size > limit:
            raise _broken(_describe(self.peek()), f"{name} of at most {limit} bytes")
        self.take(name, size)
        data = self.read(size)
        if len(data) < size:
            raise damage_error(name, f"{len(data)} bytes, then the end of the archive", f"{size} bytes")
        self.end_member(size)
        return data


def _stated_size(block: bytes) -> int | None:
    digits = block[124:135]
    return int(digits, 8) if len(digits) == 11 and all(48 <= digit < 56 for digit in digits) else None


def _describe(block: bytes) -> str:
    """What a header that is not the expected one says of itself."""
    if len(block) < BLOCK:
        return "the end of the archive"
    if block == bytes(BLOCK):
        return "the end of the archive's members"
    kinds = {
        b"1": "a hard link",
        b"2": "a symbolic link",
        b"3": "a device",
        b"4": "a device",
        b"5": "a folder",
        b"6": "a pipe",
    }
    kind = kinds.get(block[156:157], "a member")
    return f"{kind} {one_line(block[:100].rstrip(bytes(1)).decode('utf-8', 'replace'), 100)!r}"


def _broken(found: str, expected: str) -> ArtifactError:
    return ArtifactError(
        f"archive is damaged or was not made by otc pack: found {found}: expected {expected}: get it again from where "
        "it came"
    )


def unpack(stream: BinaryIO, target: Path, *, force: bool = False, public_key: Path | None = None) -> Packed:
    """Restore an artifact from an archive into the folder `target`: checked as a whole before it stands there.

    Nothing is written outside a temporary folder beside `target`, which is gone afterwards whatever happens (but for a
    kill, whose `.<name>.<process>.part` the next one removes). With `public_key` the signature is checked before any
    file is read. Raises ArtifactError, UsageError, HostError.
    """
    with _naming(target):
        recover_folder(target, MANIFEST_NAME)
    _check_folder(target, force)
    key = load_public_key(public_key) if public_key else None
    with _naming(target):
        sweep_leftovers(target)
    with _naming(target), part_folder(target, own_part(target.absolute())) as part:
        members = _Members(stream)
        read = parse_manifest(members.small(MANIFEST_NAME, MAX_MANIFEST_BYTES))
        manifest = read.manifest
        check_size(manifest, len(read.data))
        count = 1
        if _names(members, SIGNATURE_NAME):
            data = members.small(SIGNATURE_NAME, MAX_SIGNATURE_BYTES)
            signature = parse_signature(data)
            if key and public_key:
                compare_signature(signature, manifest.digest, key, public_key)
            (part / SIGNATURE_NAME).write_bytes(data)
            count += 1
        elif key:
            raise unsigned_error("archive")
        signed = count > 1
        for entry in _entries_to_come(manifest, members):
            _extract(part, entry, members)
            count += 1
        if members.peek() + members.read(BLOCK) != END or members.read(1):
            raise _broken(f"{_describe(members.peek())} after the last file", "the end of the archive")
        (part / MANIFEST_NAME).write_bytes(read.data)
        if Artifact.open(part).manifest != manifest:
            raise damage_error(MANIFEST_NAME, "another manifest on the disk", "that of the archive")
        part.chmod(0o755)
        _check_folder(target, force)
        publish_folder(part, target)
    return Packed(digest=manifest.digest, files=count, size_bytes=members.consumed, signed=signed)


def _names(members: _Members, name: str) -> bool:
    """Whether the next member has this name, whatever else its header says."""
    return members.peek()[:100].rstrip(b"\0") == name.encode("ascii")


def _entries_to_come(manifest: Manifest, members: _Members) -> Iterator[FileEntry]:
    """Every file, then the attachments that come."""
    yield from sorted(manifest.files, key=lambda entry: entry.path)
    for entry in sorted(manifest.attachments, key=lambda entry: entry.path):
        if members.peek() == header(entry.path, entry.size_bytes):
            yield entry


def _extract(part: Path, entry: FileEntry, members: _Members) -> None:
    members.take(entry.path, entry.size_bytes)
    path = part / entry.path
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "xb") as file:
        copy_checked(members.read, entry, file.write)
    members.end_member(entry.size_bytes)


def _check_folder(target: Path, force: bool) -> None:
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise UsageError(f"-o is {one_line(target)}: it is there and no folder: choose another")
    if not target.absolute().parent.is_dir():
        raise UsageError(f"-o is {one_line(target)}: its folder does not exist: create it, or choose another")
    if target.is_dir() and any(target.iterdir()):
        if not force:
            raise UsageError(f"-o is {one_line(target)}: it exists: choose another, or replace it with --force")
        if not (target / MANIFEST_NAME).is_file():
            raise UsageError(
                f"-o is {one_line(target)}: it is no artifact, so --force will not remove it: choose another"
            )
    check_creatable(target, "-o")
