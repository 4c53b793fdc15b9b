"""Files and folders appear whole or not at all, on the disk before they are seen, and nobody's link is followed."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from otcache.schemas import whole_files
from otcache.schemas.whole_files import part_folder, publish_folder, recover_folder, sync, whole_file, write_whole


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def calls(monkeypatch):
    """What the system was asked for, in order: (`sync` or `rename`, the file's or the new name's name)."""
    seen = []
    fsync, replace, rename = os.fsync, os.replace, os.rename

    def observe(name, real, place):
        def call(*arguments):
            real(*arguments)
            seen.append((name, place(*arguments)))

        return call

    def name_of(descriptor):
        return Path(os.readlink(f"/proc/self/fd/{descriptor}")).name

    if not Path("/proc/self/fd").is_dir():
        pytest.skip("reads /proc")
    monkeypatch.setattr(os, "fsync", observe("sync", fsync, name_of))
    monkeypatch.setattr(os, "replace", observe("rename", replace, lambda source, target: Path(target).name))
    monkeypatch.setattr(os, "rename", observe("rename", rename, lambda source, target: Path(target).name))
    return seen


@pytest.mark.parametrize("data", [b"\0new", memoryview(b"\0new"), "nüw"])
def test_a_file_is_on_the_disk_before_it_is_seen(tmp_path, calls, data):
    (tmp_path / "a").write_bytes(b"old")
    write_whole(tmp_path / "a", data)
    assert (tmp_path / "a").read_bytes() == (data.encode() if isinstance(data, str) else bytes(data))
    assert calls == [("sync", f".a.{os.getpid()}.part"), ("rename", "a"), ("sync", tmp_path.name)]
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("there", [True, False])
def test_what_fails_leaves_the_old_file(tmp_path, error, there):
    if there:
        (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(type(error)), whole_file(tmp_path / "a") as part:
        part.write_bytes(b"half")
        raise error
    assert names(tmp_path) == (["a"] if there else [])
    assert not there or (tmp_path / "a").read_bytes() == b"old"


def test_a_file_that_cannot_reach_the_disk_is_not_put_in_place(tmp_path, monkeypatch):
    def fail(descriptor):
        raise OSError(errno.EIO, "Input/output error")

    (tmp_path / "a").write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output error"):
        write_whole(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"old" and names(tmp_path) == ["a"]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_that_puts_no_folders_on_the_disk(tmp_path, monkeypatch, number):
    real = os.fsync

    def refuse(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(number, os.strerror(number))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)
    write_whole(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new"


@pytest.mark.parametrize("alone", [True, False])
def test_a_link_under_the_temporary_name_is_not_followed(tmp_path, alone):
    (tmp_path / "victim").write_bytes(b"old")
    part = tmp_path / (".a.part" if alone else f".a.{os.getpid()}.part")
    part.symlink_to(tmp_path / "victim")
    write_whole(tmp_path / "a", b"new", alone=alone)
    assert (tmp_path / "victim").read_bytes() == b"old" and not (tmp_path / "a").is_symlink()
    assert names(tmp_path) == ["a", "victim"]


def test_what_a_killed_process_left_of_a_large_file_is_overwritten(tmp_path):
    (tmp_path / ".a.part").write_bytes(b"half of something long")
    write_whole(tmp_path / "a", b"new", alone=True)
    assert (tmp_path / "a").read_bytes() == b"new" and names(tmp_path) == ["a"]


def test_permissions_are_those_of_any_new_file(tmp_path):
    (tmp_path / "plain").touch()
    write_whole(tmp_path / "a", b"")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "plain").stat().st_mode


WRITE = """
import itertools, sys
from pathlib import Path
from otcache.schemas.whole_files import write_whole

for number in itertools.count():
    write_whole(Path(sys.argv[1]), b"%d" % (number % 10) * 200_000)
    if number == 0:
        print("begun", flush=True)
"""


def test_a_kill_leaves_one_content_or_the_other(tmp_path):
    for delay in (0.0, 0.003, 0.01, 0.03):
        line = [sys.executable, "-c", WRITE, str(tmp_path / "a")]
        process = subprocess.Popen(line, stdout=subprocess.PIPE)
        assert process.stdout and process.stdout.readline() == b"begun\n"
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        data = (tmp_path / "a").read_bytes()
        assert len(data) == 200_000 and len(set(data)) == 1


# --- folders


def fill(folder, text):
    (folder / "inner").mkdir()
    (folder / "inner" / "file").write_text(text)
    (folder / "link").symlink_to("inner")


@pytest.mark.parametrize("exchange", [True, False])
def test_a_folder_takes_the_place_of_another(tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(whole_files, "_exchange", lambda first, second: False)
    for text in ("old", "new"):
        with part_folder(tmp_path / "a") as part:
            assert part.stat().st_mode & 0o777 == 0o700 and part.parent == tmp_path
            fill(part, text)
            publish_folder(part, tmp_path / "a")
            left = (part / "inner" / "file").read_text() if part.exists() else None
        assert left == ("old" if text == "new" else None)
        assert (tmp_path / "a" / "inner" / "file").read_text() == text and names(tmp_path) == ["a"]


def test_everything_in_a_folder_is_on_the_disk_before_it_is_seen(tmp_path, calls):
    with part_folder(tmp_path / "a") as part:
        fill(part, "new")
        publish_folder(part, tmp_path / "a")
    *before, renamed, last = calls
    assert sorted(before) == sorted([("sync", "file"), ("sync", "inner"), ("sync", part.name)])
    assert renamed == ("rename", "a") and last == ("sync", tmp_path.name)


def test_a_folder_that_must_not_be_replaced_stays(tmp_path):
    (tmp_path / "a").mkdir()
    fill(tmp_path / "a", "old")
    with part_folder(tmp_path / "a") as part:
        fill(part, "new")
        with pytest.raises(OSError, match="not empty"):
            publish_folder(part, tmp_path / "a", replace=False)
    assert (tmp_path / "a" / "inner" / "file").read_text() == "old" and names(tmp_path) == ["a"]


def test_a_folder_comes_back_after_a_kill_between_two_renames(tmp_path):
    (tmp_path / ".a.old").mkdir()
    recover_folder(tmp_path / "a", "mark")
    assert names(tmp_path) == [".a.old"], "it is not known to be ours"
    (tmp_path / ".a.old" / "mark").touch()
    recover_folder(tmp_path / "a", "mark")
    assert names(tmp_path) == ["a"]
    (tmp_path / ".a.old").mkdir()
    (tmp_path / ".a.old" / "mark").touch()
    recover_folder(tmp_path / "a", "mark")
    assert names(tmp_path) == [".a.old", "a"], "a newer one is there"


def test_a_second_rename_that_fails_brings_the_old_folder_back(tmp_path, monkeypatch):
    monkeypatch.setattr(whole_files, "_exchange", lambda first, second: False)
    rename = os.rename

    def fail(source, target):
        if Path(source).name.endswith(".part"):
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target)

    (tmp_path / "a").mkdir()
    fill(tmp_path / "a", "old")
    monkeypatch.setattr(os, "rename", fail)
    with part_folder(tmp_path / "a") as part:
        fill(part, "new")
        with pytest.raises(OSError, match="Input/output"):
            publish_folder(part, tmp_path / "a")
    assert (tmp_path / "a" / "inner" / "file").read_text() == "old" and names(tmp_path) == ["a"]


def test_a_link_is_not_followed_to_be_put_on_the_disk(tmp_path, calls):
    (tmp_path / "pipe").symlink_to("/dev/null")
    sync(tmp_path / "pipe")
    assert calls == []
