"""Results are kept under the digest of their inputs, whole or not at all."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

from otcache.compiler.workspace.disk import is_full_disk, locked_part_folder, remove_leftovers
from otcache.compiler.workspace.interrupts import Interrupted
from otcache.compiler.workspace.workspace import Workspace, default_workspace
from otcache.schemas import whole_files
from otcache.schemas.errors import HostError


def test_values_come_back_and_are_not_computed_again(tmp_path):
    workspace = Workspace(tmp_path)
    calls = []
    for _ in range(2):
        value = workspace.json("pass", {"a": 1}, lambda: calls.append(1) or {"x": [0.1, 1 / 3]})
        arrays = workspace.arrays("array", 7, lambda: calls.append(2) or {"m": np.eye(2, dtype=np.float32)})
        assert value == {"x": [0.1, 1 / 3]}
        assert np.array_equal(arrays["m"], np.eye(2)) and arrays["m"].dtype == np.float32
    assert calls == [1, 2]
    assert workspace.reused == ["pass", "array"]


def test_another_key_is_another_result(tmp_path):
    workspace = Workspace(tmp_path)
    assert workspace.json("pass", {"a": 1}, lambda: 1) == 1
    assert workspace.json("pass", {"a": 2}, lambda: 2) == 2


def test_a_failed_pass_leaves_nothing(tmp_path):
    workspace = Workspace(tmp_path)

    def fill(folder):
        (folder / "half").write_text("x")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        workspace.tree("tree", 1, fill)
    assert list(tmp_path.iterdir()) == []
    folder = workspace.tree("tree", 1, lambda folder: (folder / "whole").write_text("x"))
    assert [path.name for path in folder.iterdir()] == ["whole"]


def test_a_damaged_result_is_computed_again(tmp_path):
    workspace = Workspace(tmp_path)
    workspace.json("pass", 1, lambda: {"x": 1})
    workspace.arrays("array", 1, lambda: {"m": np.ones(3)})
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:7])
    assert workspace.json("pass", 1, lambda: {"x": 1}) == {"x": 1}
    assert workspace.arrays("array", 1, lambda: {"m": np.ones(3)})["m"].sum() == 3
    assert workspace.computed == ["pass", "array"] * 2 and workspace.reused == []


KILLED = """
import sys, time
from pathlib import Path
from otcache.compiler.workspace.workspace import Workspace

def fill(folder):
    (folder / "half").write_text("x")
    print("filling", flush=True)
    time.sleep(600)

workspace = Workspace(Path(sys.argv[1]))
workspace.tree("tree", 1, fill)
"""


def test_leftovers_of_killed_processes_are_removed_and_those_of_living_ones_stay(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout and process.stdout.readline() == b"filling\n"
    part, lock = sorted(tmp_path.iterdir())
    assert lock.name == part.name + ".lock"
    mine = tmp_path / f".pass-{'0' * 24}.json.{os.getpid()}.part"
    foreign = [tmp_path / ".notes.part", tmp_path / "pass.123.part", tmp_path / f".pass-{'0' * 24}.json.part"]
    gone = tmp_path / f".pass-{'0' * 24}.json.{process.pid}.part"
    for path in (mine, *foreign, gone):
        path.write_text("x")
    workspace = Workspace(tmp_path)
    with workspace.hold():
        assert part.is_dir() and mine.exists() and gone.exists(), "their processes live"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (part / "half").exists()
    with workspace.hold():
        assert not part.exists() and not lock.exists() and not gone.exists() and mine.exists()
    assert all(path.exists() for path in foreign)


def test_a_part_folder_is_locked_while_it_is_filled(tmp_path):
    with locked_part_folder(tmp_path / "a") as part:
        assert remove_leftovers(tmp_path, "a") == [] and part.is_dir()
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_workspace_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    with (
        pytest.raises(HostError, match=r"workspace .*file.* cannot be written to .*OTC_CACHE"),
        Workspace(tmp_path / "file" / "w").hold(),
    ):
        pass


LIMITED = """
import resource, signal, sys
from pathlib import Path
import numpy as np
from otcache.compiler.workspace.workspace import Workspace

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
workspace = Workspace(Path(sys.argv[1]))
kinds = {
    "json": lambda: workspace.json("pass", 1, lambda: list(range(100_000))),
    "arrays": lambda: workspace.arrays("pass", 1, lambda: {"m": np.zeros(100_000)}),
    "tree": lambda: workspace.tree("pass", 1, lambda folder: (folder / "f").write_bytes(bytes(100_000))),
}
try:
    kinds[sys.argv[2]]()
except BaseException as error:
    print(type(error).__name__, error)
"""


@pytest.mark.parametrize("kind", ["json", "arrays", "tree"])
def test_a_disk_that_takes_no_more_is_named(tmp_path, kind):
    """The kernel refuses the write (a file size limit), in a process of its own."""
    result = subprocess.run([sys.executable, "-c", LIMITED, str(tmp_path), kind], capture_output=True, text=True)
    assert result.stdout.startswith(f"HostError no space left on the disk of {tmp_path} ("), (
        result.stdout + result.stderr
    )
    assert "MB free" in result.stdout and len(result.stdout.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_seen_behind_other_exceptions(tmp_path):
    def wrapped():
        try:
            raise OSError(28, "No space left on device")
        except OSError as error:
            raise ValueError("the library's own") from error

    with pytest.raises(ValueError) as caught:
        wrapped()
    assert is_full_disk(caught.value)
    assert not is_full_disk(OSError(2, "No such file or directory")) and not is_full_disk(ValueError("disk"))


def test_a_signal_while_a_part_folder_is_made_leaves_none(tmp_path, monkeypatch):
    real = Path.mkdir

    def interrupted(path, *arguments, **options):
        real(path, *arguments, **options)
        raise Interrupted(signal.SIGINT)

    monkeypatch.setattr(Path, "mkdir", interrupted)
    with pytest.raises(Interrupted), locked_part_folder(tmp_path / "artifact"):
        pass
    assert not list(tmp_path.iterdir())


def test_a_lock_that_is_taken_for_a_leftover_is_made_again(tmp_path, monkeypatch):
    real, taken = whole_files.name_part, []

    def stolen(target):
        part = real(target)
        if not taken:
            taken.append(FileLock(f"{part}.lock"))
            taken[0].acquire()
        return part

    monkeypatch.setattr(whole_files, "name_part", stolen)
    with locked_part_folder(tmp_path / "artifact") as part:
        assert part.is_dir() and f"{part}.lock" != taken[0].lock_file
        assert remove_leftovers(tmp_path, "artifact") == [] and part.is_dir()
    taken[0].release()
    remove_leftovers(tmp_path, "artifact")
    assert not list(tmp_path.iterdir())


def test_the_lock_of_a_folder_that_was_never_made_is_removed(tmp_path):
    lock = tmp_path / ".artifact.0123abcd.part.lock"
    lock.touch()
    assert remove_leftovers(tmp_path, "other") == [] and lock.exists()
    assert remove_leftovers(tmp_path, "artifact") == [] and not lock.exists()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_still_works(tmp_path, monkeypatch, number):
    """Folders are made and published, a workspace is held, and nobody's folder is taken for a leftover."""

    def refuse(*arguments):
        raise OSError(number, os.strerror(number))

    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr(fcntl, "flock", refuse)
    left = tmp_path / ".tree-000000000000000000000000.0123abcd.part"
    left.mkdir()
    workspace = Workspace(tmp_path)
    with workspace.hold(lambda: pytest.fail("nobody holds it")):
        path = workspace.tree("tree", 1, lambda folder: (folder / "whole").write_text("x"))
    assert (path / "whole").is_file() and left.is_dir()
    assert workspace.json("pass", 1, lambda: 1) == 1


HOLD = """
import sys, time
from pathlib import Path
from otcache.compiler.workspace.workspace import Workspace

with Workspace(Path(sys.argv[1])).hold():
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_second_compile_waits_for_the_first_and_says_so(tmp_path):
    """Until the kernel drops the lock of a process that was killed."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout and process.stdout.readline() == b"held\n"
    notes = []

    def wait():
        notes.append("waits")
        process.send_signal(signal.SIGKILL)

    with Workspace(tmp_path).hold(wait):
        assert notes == ["waits"] and process.wait() == -signal.SIGKILL


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, "home/.cache/otcache"),
        ({"XDG_CACHE_HOME": "xdg"}, "xdg/otcache"),
        ({"XDG_CACHE_HOME": "xdg", "OTC_CACHE": "own"}, "own"),
    ],
)
@pytest.mark.skipif(sys.platform != "linux", reason="other systems have their own place for caches")
def test_the_place_of_the_workspace(tmp_path, monkeypatch, variables, expected):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("XDG_CACHE_HOME", "OTC_CACHE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, str(tmp_path / value))
    assert default_workspace() == tmp_path / expected


def test_scratch_folders_of_samples_are_leftovers_too(tmp_path):
    """A compile that is killed leaves gigabytes in one."""
    left, lived = tmp_path / ".samples.0a1b2c3d.part", tmp_path / "samples"
    for folder in (left, lived):
        folder.mkdir()
        (folder / "a.npy").write_bytes(b"x")
    with Workspace(tmp_path).hold():
        assert not left.exists() and lived.exists()
