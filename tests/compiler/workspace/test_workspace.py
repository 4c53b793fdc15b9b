"""Results are kept under the digest of their inputs, whole or not at all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from otcache.compiler.workspace import whole_files as disk
from otcache.compiler.workspace.interrupts import Interrupted
from otcache.compiler.workspace.whole_files import is_full_disk, part_folder, remove_leftovers
from otcache.compiler.workspace.workspace import Workspace
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
    (part,) = tmp_path.iterdir()
    mine = tmp_path / f".pass-{'0' * 24}.json.{os.getpid()}.part"
    foreign = [tmp_path / ".notes.part", tmp_path / "pass.123.part", tmp_path / f".pass-{'0' * 24}.json.part"]
    gone = tmp_path / f".pass-{'0' * 24}.json.{process.pid}.part"
    for path in (mine, *foreign, gone):
        path.write_text("x")
    workspace = Workspace(tmp_path)
    with workspace.held():
        assert part.is_dir() and mine.exists() and gone.exists(), "their processes live"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (part / "half").exists()
    with workspace.held():
        assert not part.exists() and not gone.exists() and mine.exists()
    assert all(path.exists() for path in foreign)


def test_a_part_folder_is_locked_while_it_is_filled(tmp_path):
    with part_folder(tmp_path / "a") as part:
        assert remove_leftovers(tmp_path, "a") == [] and part.is_dir()
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_workspace_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    with (
        pytest.raises(HostError, match=r"workspace .*file.* cannot be written to .*OTC_CACHE"),
        Workspace(tmp_path / "file" / "w").held(),
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
    def interrupted(path):
        assert path.is_dir()
        raise Interrupted(signal.SIGINT)

    monkeypatch.setattr(disk, "_try_lock", interrupted)
    with pytest.raises(Interrupted), part_folder(tmp_path / "artifact"):
        pass
    assert not list(tmp_path.iterdir())


def test_a_part_folder_that_is_taken_for_a_leftover_is_made_again(tmp_path, monkeypatch):
    real, taken = disk._try_lock, []

    def stolen(path):
        if not taken:
            taken.append(path)
            path.rmdir()
        return real(path)

    monkeypatch.setattr(disk, "_try_lock", stolen)
    with part_folder(tmp_path / "artifact") as part:
        assert part.is_dir() and part != taken[0]
    assert not list(tmp_path.iterdir())
