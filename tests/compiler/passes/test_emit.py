"""An artifact appears whole or not at all, and what stood there before is not lost."""

from __future__ import annotations

import json
import shutil
import threading

import pytest

from otcache.compiler.passes.emit import check_target, emit, recover
from otcache.runtime.artifact.reader import Artifact
from otcache.schemas import whole_files
from otcache.schemas.errors import OTCacheError, UsageError
from otcache.schemas.manifest import core_digest


@pytest.fixture
def parts(compiled):
    """The files and manifest fields of a real artifact, to be written again."""
    fields = json.loads((compiled / "manifest.json").read_text())
    for name in ("files", "attachments", "digest", "measurements"):
        fields.pop(name)

    def fill(folder):
        for name in ("engines", "golden", "tokenizers", "report"):
            shutil.copytree(compiled / name, folder / name)

    return fill, fields


def test_a_written_artifact_verifies(parts, tmp_path):
    fill, fields = parts
    manifest = emit(tmp_path / "a", fill, fields, force=False, attachments=frozenset({"report"}))
    assert Artifact.open(tmp_path / "a").verify().digest == manifest.digest
    assert {entry.path.split("/")[0] for entry in manifest.attachments} == {"report"}
    assert core_digest(json.loads((tmp_path / "a" / "manifest.json").read_text())) == manifest.digest
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_interrupted_write_leaves_nothing(parts, tmp_path, error):
    fill, fields = parts

    def failing(folder):
        fill(folder)
        raise error

    with pytest.raises((UsageError, KeyboardInterrupt)):
        emit(tmp_path / "a", failing, fields, force=False, attachments=frozenset())
    assert list(tmp_path.iterdir()) == []


def test_a_failed_replacement_keeps_the_old_artifact(parts, tmp_path):
    fill, fields = parts
    emit(tmp_path / "a", fill, fields, force=False, attachments=frozenset())
    before = (tmp_path / "a" / "manifest.json").read_bytes()

    def failing(folder):
        raise OSError(28, "No space left on device")

    with pytest.raises(UsageError, match=rf"no space left on the disk of {tmp_path} .*choose another folder with -o"):
        emit(tmp_path / "a", failing, fields, force=True, attachments=frozenset())
    assert (tmp_path / "a" / "manifest.json").read_bytes() == before
    emit(tmp_path / "a", fill, fields, force=True, attachments=frozenset())
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_targets_that_are_not_ours_are_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path)
    for name in ("file", "link"):
        with pytest.raises(UsageError, match="is no folder"):
            check_target(tmp_path / name, force=True)
    with pytest.raises(UsageError, match="cannot be written: Not a directory"):
        check_target(tmp_path / "file" / "below", force=False)
    (tmp_path / "empty").mkdir()
    check_target(tmp_path / "empty", force=False)


def test_a_target_that_appears_meanwhile_is_not_replaced(parts, tmp_path):
    """Two compiles to one folder: the second to finish is refused."""
    fill, fields = parts

    def slow(folder):
        fill(folder)
        emit(tmp_path / "a", fill, fields, force=False, attachments=frozenset())

    with pytest.raises(UsageError, match=r"-o is .*: it exists"):
        emit(tmp_path / "a", slow, fields, force=False, attachments=frozenset())
    Artifact.open(tmp_path / "a").verify()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_reader_always_finds_an_artifact_while_it_is_replaced(parts, tmp_path):
    fill, fields = parts
    emit(tmp_path / "a", fill, fields, force=False, attachments=frozenset())
    seen, stop = [0, 0], threading.Event()

    def read():
        while not stop.is_set():
            seen[0] += 1
            seen[1] += not (tmp_path / "a" / "manifest.json").is_file()

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(5):
        emit(tmp_path / "a", fill, fields, force=True, attachments=frozenset())
    stop.set()
    reader.join()
    assert seen[0] > 100 and seen[1] == 0


def test_without_exchange_an_artifact_is_put_back_after_a_kill(parts, tmp_path, monkeypatch):
    """The moment between the two renames of a system that cannot exchange folders."""
    fill, fields = parts
    monkeypatch.setattr(whole_files, "_exchange", lambda first, second: False)
    emit(tmp_path / "a", fill, fields, force=False, attachments=frozenset())
    emit(tmp_path / "a", fill, fields, force=True, attachments=frozenset())
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    (tmp_path / "a").rename(tmp_path / ".a.old")
    recover(tmp_path / "a")
    Artifact.open(tmp_path / "a").verify()
    with pytest.raises(OTCacheError, match="--force"):
        emit(tmp_path / "a", fill, fields, force=False, attachments=frozenset())
