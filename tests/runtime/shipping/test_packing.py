"""`otc pack`, `otc unpack`: one file for an artifact, any tar can read it, and no archive can harm who unpacks it."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import small_artifact as small
from click.testing import CliRunner

from otcache.runtime.artifact.reader import Artifact
from otcache.runtime.cli import main as cli
from otcache.runtime.shipping.packing import BLOCK, END, header, pack, padding, unpack
from otcache.runtime.shipping.verify import verify
from otcache.schemas.digest import digest_of_bytes
from otcache.schemas.errors import ArtifactError, UsageError
from otcache.schemas.manifest import MANIFEST_NAME


def otc(*arguments, stdin=None):
    return CliRunner().invoke(cli.main, list(map(str, arguments)), input=stdin)


def packed(folder):
    stream = io.BytesIO()
    pack(Artifact.open(folder), stream)
    return stream.getvalue()


def tree(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def archive(artifact_folder):
    return packed(artifact_folder)


@pytest.fixture
def reported(damaged):
    """The small artifact with a report, and one that was deleted."""
    (damaged / "report.html").write_bytes(b"report")
    entry = {"path": "report.html", "size_bytes": 6, "digest": digest_of_bytes(b"report")}
    value = small.read_manifest(damaged)
    value["attachments"] = [entry, {**entry, "path": "report/gone.png"}]
    small.write_manifest(damaged, value)
    return damaged


def refused(data, folder, *words):
    """Unpacking ends in an ArtifactError with these words, and leaves nothing."""
    with pytest.raises(ArtifactError) as caught:
        unpack(io.BytesIO(data), folder / "out")
    message = str(caught.value)
    assert "\n" not in message and message.isprintable()
    for word in words:
        assert word in message, message
    assert list(folder.iterdir()) == []


def test_there_and_back(reported, tmp_path):
    (reported / "notes.txt").write_text("mine")
    (tmp_path / "x").mkdir()
    result = otc("pack", reported, "-o", tmp_path / "x/a.tar")
    assert result.exit_code == 0 and "left out: notes.txt (1 in all)" in result.stderr
    result = otc("unpack", tmp_path / "x/a.tar", "-o", tmp_path / "x/b", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["digest"] == small.read_manifest(reported)["digest"] and found["signed"] is False
    expected = tree(reported)
    expected.pop("notes.txt")
    assert tree(tmp_path / "x/b") == expected and found["files"] == len(expected)
    assert (tmp_path / "x/a.tar").stat().st_size == found["size_bytes"]
    assert packed(tmp_path / "x/b") == (tmp_path / "x/a.tar").read_bytes()
    assert sorted(path.name for path in (tmp_path / "x").iterdir()) == ["a.tar", "b"]
    verify(tmp_path / "x/b")


def test_the_same_bytes_whoever_packs(artifact_folder, archive, tmp_path):
    """Whatever times, modes and order on the disk the files have."""
    other = tmp_path / "other"
    for name, data in sorted(tree(artifact_folder).items(), reverse=True):
        (other / name).parent.mkdir(parents=True, exist_ok=True)
        (other / name).write_bytes(data)
        (other / name).chmod(0o600)
        os.utime(other / name, (1, 1))
    assert packed(other) == archive
    assert archive.endswith(END) and len(archive) % BLOCK == 0


def test_other_tars_read_it(artifact_folder, archive, tmp_path):
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        members = tar.getmembers()
        assert members[0].name == MANIFEST_NAME
        names = [member.name for member in members[1:]]
        assert names == sorted(names)
        for member in members:
            assert (member.mtime, member.uid, member.gid, member.mode, member.uname) == (0, 0, 0, 0o644, "")
        tar.extractall(tmp_path / "python", filter="data")
    assert tree(tmp_path / "python") == tree(artifact_folder)
    if shutil.which("tar"):
        (tmp_path / "gnu").mkdir()
        done = subprocess.run(["tar", "-x", "-C", tmp_path / "gnu"], input=archive, capture_output=True, check=True)
        assert not done.stderr and tree(tmp_path / "gnu") == tree(artifact_folder)


@pytest.mark.parametrize(
    "name", ["a", "a" * 100, "d/" * 7 + "a", "p" * 100 + "/" + "n" * 100, "p" * 154 + "/" + "n" * 100]
)
@pytest.mark.parametrize("size", [0, 1, 511, 512, 8**11 - 1, 8**11, 1 << 48])
def test_headers_are_those_of_a_standard_tar(name, size):
    info = tarfile.TarInfo.frombuf(header(name, size), "utf-8", "strict")
    assert (info.name, info.size, info.type) == (name, size, tarfile.REGTYPE)


def test_a_path_that_no_tar_can_hold(damaged):
    value, name = small.read_manifest(damaged), "n" * 101
    value["files"].append({"path": name, "size_bytes": 0, "digest": digest_of_bytes(b"")})
    small.write_manifest(damaged, value)
    (damaged / name).write_bytes(b"")
    stream = io.BytesIO()
    with pytest.raises(ArtifactError, match="too long a path"):
        pack(Artifact.open(damaged), stream)
    assert stream.getvalue() == b""


def test_stdin_and_stdout(artifact_folder, archive, tmp_path):
    result = otc("pack", artifact_folder, "-o", "-")
    assert result.exit_code == 0 and result.stdout_bytes == archive and result.stderr == ""
    assert otc("unpack", "-", "-o", tmp_path / "a", stdin=archive).exit_code == 0
    assert tree(tmp_path / "a") == tree(artifact_folder)
    result = otc("pack", artifact_folder, "-o", "-", "--json")
    assert result.exit_code == 2 and "both write to stdout" in result.stderr and result.stdout_bytes == b""


def test_a_pipe_between_two_processes(artifact_folder, tmp_path):
    call = f"{sys.executable} -c 'from otcache.runtime.cli.main import main; main(prog_name=\"otc\")'"
    line = f"set -o pipefail; {call} pack {artifact_folder} -o - | {call} unpack - -o {tmp_path / 'a'}"
    subprocess.run(["bash", "-c", line], check=True, capture_output=True)
    assert tree(tmp_path / "a") == tree(artifact_folder)


def test_packing_what_is_damaged(damaged, tmp_path):
    (tmp_path / "x").mkdir()
    path = damaged / "engines/onnx/head.onnx"
    path.write_bytes(bytes(path.stat().st_size))
    result = otc("pack", damaged, "-o", tmp_path / "x/a.tar")
    assert result.exit_code == 4 and "head.onnx: found digest" in result.stderr and not list((tmp_path / "x").iterdir())
    result = otc("pack", damaged, "-o", "-")
    assert result.exit_code == 4
    refused(result.stdout_bytes, tmp_path / "x", "head.onnx")


def test_targets_that_are_refused(artifact_folder, archive, tmp_path):
    (tmp_path / "a.tar").write_bytes(archive)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("keep me")
    for arguments, words in {
        ("pack", artifact_folder, "-o", tmp_path / "a.tar"): "--force",
        ("pack", artifact_folder, "-o", tmp_path / "mine"): "a folder is there",
        ("pack", artifact_folder, "-o", tmp_path / "none/a.tar"): "does not exist",
        ("unpack", tmp_path / "a.tar", "-o", tmp_path / "mine"): "--force",
        ("unpack", tmp_path / "a.tar", "-o", tmp_path / "mine", "--force"): "no artifact",
        ("unpack", tmp_path / "a.tar", "-o", tmp_path / "a.tar", "--force"): "no folder",
        ("unpack", tmp_path / "a.tar", "-o", tmp_path / "none/a"): "does not exist",
        ("unpack", tmp_path / "none.tar", "-o", tmp_path / "b"): "No such file",
        ("unpack", tmp_path / "mine", "-o", tmp_path / "b"): "directory",
    }.items():
        result = otc(*arguments)
        assert result.exit_code == 2 and words in result.stderr, result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar", "mine"]
    assert (tmp_path / "mine/notes.txt").read_text() == "keep me" and (tmp_path / "a.tar").read_bytes() == archive


def test_replacing_with_force(artifact_folder, archive, tmp_path):
    old = Path(shutil.copytree(artifact_folder, tmp_path / "a"))
    (old / "notes.txt").write_text("old")
    (tmp_path / "a.tar").write_bytes(archive)
    assert otc("unpack", tmp_path / "a.tar", "-o", old, "--force").exit_code == 0
    assert tree(old) == tree(artifact_folder)
    broken = archive[: len(archive) // 2]
    result = otc("unpack", "-", "-o", old, "--force", stdin=broken)
    assert result.exit_code == 4 and tree(old) == tree(artifact_folder), "what stood there before stays"
    assert otc("pack", old, "-o", tmp_path / "a.tar", "--force").exit_code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "a.tar"]


# --- archives that nobody packed
# ------------------------------------------------------------------------------------------


def member(name, data, **change):
    """A member as Python's tarfile writes it."""
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(data), 0o644
    for key, value in change.items():
        setattr(info, key, value)
    return info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(padding(len(data)))


def whole_members(archive):
    """(name, bytes of header, content and padding) of every member."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        places = [(each.name, each.offset) for each in tar.getmembers()]
    ends = [place for _, place in places[1:]] + [len(archive) - len(END)]
    return [(name, archive[start:end]) for (name, start), end in zip(places, ends, strict=True)]


EXTRA = {
    "a file": member("x", b"1"),
    "a parent": member("../x", b"1"),
    "an absolute path": member("/x", b"1"),
    "a symbolic link": member("x", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
    "a hard link": member("x", b"", type=tarfile.LNKTYPE, linkname="manifest.json"),
    "a device": member("x", b"", type=tarfile.CHRTYPE),
    "a pipe": member("x", b"", type=tarfile.FIFOTYPE),
    "a folder": member("x", b"", type=tarfile.DIRTYPE),
    "a second manifest": member(MANIFEST_NAME, b"{}"),
    "a file of no end": tarfile.TarInfo("x").tobuf(tarfile.USTAR_FORMAT).replace(b"0" * 11, b"7" * 11, 1),
    "a long name": member("././@LongLink", b"x" * 300, type=tarfile.GNUTYPE_LONGNAME),
    "an extended header": member("x", b"20 path=../../etc/x\n", type=tarfile.XHDTYPE),
}


@pytest.mark.parametrize("what", EXTRA)
@pytest.mark.parametrize("place", ["first", "second", "in the middle", "last", "behind the end"])
def test_members_that_are_not_expected(archive, tmp_path, what, place):
    parts = [data for _, data in whole_members(archive)]
    at = {"first": 0, "second": 1, "in the middle": 4, "last": len(parts)}.get(place)
    data = (
        b"".join([*parts, END, EXTRA[what]]) if at is None else b"".join([*parts[:at], EXTRA[what], *parts[at:], END])
    )
    refused(data, tmp_path)


def test_links_are_named(archive, tmp_path):
    parts = [data for _, data in whole_members(archive)]
    refused(b"".join([*parts, EXTRA["a symbolic link"], END]), tmp_path, "a symbolic link 'x'")
    refused(EXTRA["a device"] + archive, tmp_path, "a device 'x'", "expected manifest.json")


def test_members_in_another_order_or_missing(archive, tmp_path):
    parts = [data for _, data in whole_members(archive)]
    refused(b"".join([*parts[1:], parts[0], END]), tmp_path, "expected manifest.json")
    refused(b"".join([parts[0], *parts[:0:-1], END]), tmp_path, "expected engines/onnx/block_0.onnx")
    refused(b"".join([*parts[:-1], END]), tmp_path, "the end of the archive's members")
    refused(b"".join([*parts, parts[-1], END]), tmp_path, "after the last file")
    refused(b"".join(parts), tmp_path, "the end of the archive")
    refused(archive + b"\0", tmp_path)
    refused(b"", tmp_path, "the end of the archive")


def test_another_size_than_the_manifest_says(archive, tmp_path):
    parts = whole_members(archive)
    name, _ = parts[1]
    forged = member(name, b"x" * 100)
    refused(b"".join([parts[0][1], forged, *(data for _, data in parts[2:]), END]), tmp_path, f"expected {name} of")


def test_a_huge_manifest_is_not_read(tmp_path):
    class Endless(io.RawIOBase):
        """A manifest of 8 GiB minus one; the reader must not take more than the header."""

        taken = 0

        def readable(self):
            return True

        def readinto(self, buffer):
            data = (header(MANIFEST_NAME, 8**11 - 1) + bytes(1 << 20))[self.taken : self.taken + len(buffer)]
            buffer[: len(data)] = data
            self.taken += len(data)
            return len(data)

    stream = Endless()
    with pytest.raises(ArtifactError, match="at most 16777216 bytes"):
        unpack(stream, tmp_path / "out")
    assert stream.taken <= BLOCK and not list(tmp_path.iterdir())


def test_every_flip_in_the_headers(archive, tmp_path):
    """Of the first three members: header, and padding behind the content."""
    starts = [0]
    for _, data in whole_members(archive)[:2]:
        starts.append(starts[-1] + len(data))
    for start in starts:
        for place in (*range(start, start + BLOCK, 7), start + 124, start + 148, start + 156):
            data = archive[:place] + bytes([archive[place] ^ 1]) + archive[place + 1 :]
            refused(data, tmp_path)


@pytest.mark.parametrize("step", [997])
def test_every_cut(archive, tmp_path, step):
    for length in range(0, len(archive), step):
        refused(archive[:length], tmp_path)


def test_wrong_content(archive, tmp_path):
    parts = whole_members(archive)
    place = len(parts[0][1]) + BLOCK + 20
    refused(archive[:place] + bytes([archive[place] ^ 1]) + archive[place + 1 :], tmp_path, parts[1][0], "found digest")


def test_a_manifest_whose_paths_leave(damaged, tmp_path):
    value = small.read_manifest(damaged)
    value["files"][0]["path"] = "../../x"
    small.write_manifest(damaged, value)
    data = (damaged / MANIFEST_NAME).read_bytes()
    (tmp_path / "x").mkdir()
    refused(member(MANIFEST_NAME, data) + END, tmp_path / "x")
    data = header(MANIFEST_NAME, len(data)) + data + bytes(padding(len(data))) + END
    refused(data, tmp_path / "x", "no plain relative path")


# --- memory, disk, signals
# -----------------------------------------------------------------------------------------------


@pytest.fixture
def large(damaged):
    """With an attachment of 200 MB that takes no disk."""
    with open(damaged / "large.bin", "wb") as file:
        file.truncate(200_000_000)
    running = hashlib.sha256()
    for _ in range(200):
        running.update(bytes(1_000_000))
    value = small.read_manifest(damaged)
    entry = {"path": "large.bin", "size_bytes": 200_000_000, "digest": f"sha256:{running.hexdigest()}"}
    value["attachments"] = [entry]
    small.write_manifest(damaged, value)
    return damaged


MEASURED = """
import io, resource, sys
from pathlib import Path
from otcache.runtime.artifact.reader import Artifact
from otcache.runtime.shipping.packing import pack, unpack
class Nowhere(io.RawIOBase):
    def write(self, data): return len(data)
def peak(): return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1])
artifact = Artifact.open(sys.argv[1])
pack(Artifact.open(sys.argv[2]), Nowhere())
before = peak()
pack(artifact, Nowhere())
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_large_file_passes_through_little_memory(large, artifact_folder):
    line = [sys.executable, "-c", MEASURED, str(large), str(artifact_folder)]
    done = subprocess.run(line, check=True, capture_output=True, text=True)
    assert int(done.stdout) < 20_000, "kilobytes"


def test_a_full_disk(artifact_folder, archive, tmp_path, monkeypatch):
    """Where writing fails half-way."""
    written = [0]

    def fsync(descriptor):
        written[0] += 1
        if written[0] == 3:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(UsageError, match="cannot be written: No space left on device"):
        unpack(io.BytesIO(archive), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_nothing(archive, tmp_path, number):
    """While it waits for the rest of a pipe."""
    line = [
        sys.executable,
        "-c",
        "from otcache.runtime.cli.main import main; main(prog_name='otc')",
        "unpack",
        "-",
        "-o",
        "out",
    ]

    def heed() -> None:  # a background job of a shell ignores SIGINT, and so would its children
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    process = subprocess.Popen(line, stdin=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path, preexec_fn=heed)
    assert process.stdin is not None
    process.stdin.write(archive[:-2000])
    process.stdin.flush()
    deadline = time.monotonic() + 60
    while not list(tmp_path.rglob("block_0.onnx")) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert list(tmp_path.iterdir())
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode in (143, 130, 1) and b"Traceback" not in stderr
    assert list(tmp_path.iterdir()) == []


def test_a_signature_travels_along(damaged, tmp_path):
    pytest.importorskip("cryptography")
    from cryptography.hazmat.primitives import serialization as s
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    for name in ("mine", "other"):
        key = Ed25519PrivateKey.generate()
        (tmp_path / name).write_bytes(key.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.NoEncryption()))
        public = key.public_key().public_bytes(s.Encoding.PEM, s.PublicFormat.SubjectPublicKeyInfo)
        (tmp_path / f"{name}.pub").write_bytes(public)
    plain = packed(damaged)
    assert otc("sign", damaged, "--key", tmp_path / "mine").exit_code == 0
    data = packed(damaged)
    assert data != plain
    for stdin, key, code, words in (
        (data, "mine", 0, ""),
        (data, "other", 4, "made with another key"),
        (plain, "mine", 4, "archive is not signed"),
    ):
        target = tmp_path / "out" / f"{key}{code}{len(stdin)}"
        target.parent.mkdir(exist_ok=True)
        result = otc("unpack", "-", "-o", target, "--public-key", tmp_path / f"{key}.pub", stdin=stdin)
        assert result.exit_code == code and words in result.stderr and target.exists() == (code == 0), result.output
    assert otc("verify", tmp_path / "out" / f"mine0{len(data)}", "--public-key", tmp_path / "mine.pub").exit_code == 0
    assert len(list((tmp_path / "out").iterdir())) == 1
