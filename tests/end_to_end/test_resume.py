"""A compile that is stopped at any moment leaves no half artifact, and the next one goes on where it stopped."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command import COMPILE, otc
from forks import Forks

from otcache.runtime.artifact.reader import Artifact

MOMENTS = int(os.environ.get("OTC_TEST_KILLS", "20"))
pytestmark = pytest.mark.skipif(
    not hasattr(os, "fork") or importlib.util.find_spec("torch") is None, reason="needs fork and torch"
)


@pytest.fixture(scope="module")
def forks():
    server = Forks()
    yield server
    server.close()


class Undisturbed:
    """A compile that only the exports were there for: its digest, how long it took, its events, and its workspace."""

    def __init__(self, forks: Forks, model: Path, exports: Path, digest: str, folder: Path) -> None:
        self.model, self.folder, self.workspace = model, folder, folder / "workspace"
        self.workspace.mkdir()
        shutil.copytree(
            exports, self.workspace / exports.name, ignore=shutil.ignore_patterns(*(f"{name}*" for name in SEARCHES))
        )
        start = time.monotonic()
        status = forks.run(
            "compile",
            str(model),
            *COMPILE,
            "-o",
            str(folder / "a"),
            "--json",
            workspace=self.workspace,
            log=folder / "log",
        )
        self.seconds = time.monotonic() - start
        assert status == 0, forks.stderr
        self.digest, self.events = forks.result["digest"], forks.events
        assert self.digest == digest, "as without any workspace"

    def copy_without(self, target: Path, *names: str) -> Path:
        """A copy of the workspace that lacks the results whose names start so."""
        return Path(
            shutil.copytree(self.workspace, target, ignore=shutil.ignore_patterns(*(f"{name}*" for name in names)))
        )


@pytest.fixture(scope="module")
def undisturbed(forks, compiled, tiny_flux_folder, workspace, tmp_path_factory):
    arguments = ("compile", str(tiny_flux_folder), *COMPILE, "--dry-run", "--json")
    of_model = Path(json.loads(otc(*arguments, workspace=workspace).stdout)["workspace"])
    digest = Artifact.open(compiled).manifest.digest
    return Undisturbed(forks, tiny_flux_folder, of_model, digest, tmp_path_factory.mktemp("undisturbed"))


SEARCHES = ("search", "attempt", "anchor", "measured", "pictures", "evaluate", "capture")
"""All results but the exports, which take most of a small compile's time."""
WHOLE = 6
"""How many times as long a compile with its exports takes at most."""


def evaluations(events, name):
    """Sample evaluations that the passes of a name computed."""
    return sum(e.get("evaluations", 0) for e in events if e["event"] == "pass" and e["name"] == name)


def stop_and_resume(forks, undisturbed, folder, workspace, number, wait):
    """Stop a compile when `wait()` returns; check what it left; start it again. Returns the status of the first."""
    target = folder / "out" / "a"
    arguments = ("compile", str(undisturbed.model), *COMPILE, "-o", str(target), "--json")
    pid = forks.start(*arguments, workspace=workspace, log=folder / "stopped")
    wait()
    with contextlib.suppress(ProcessLookupError):  # it had ended
        os.kill(pid, number)
    status = forks.wait()
    assert "Traceback" not in forks.stderr
    if target.exists():
        Artifact.open(target).verify()
        assert status == 0, "an artifact that is there is whole, and then its compile had ended"
    else:
        assert status == (-number if number == signal.SIGKILL else 128 + number), forks.stderr
        if number != signal.SIGKILL:
            last = [json.loads(line) for line in forks.stderr.splitlines()][-1]
            assert (last["event"], last["kind"], last["exit_code"]) == ("error", "interrupted", 128 + number)
            assert last["message"].endswith("run the same command again to go on where it stopped")
            assert not list(folder.glob("out/.*")), "a compile that is asked to stop cleans up"
    again = forks.run(*arguments, "--force", workspace=workspace, log=folder / "resumed")
    assert again == 0, forks.stderr
    assert forks.result["digest"] == undisturbed.digest
    assert Artifact.open(target).verify().digest == undisturbed.digest
    assert [path.name for path in target.parent.iterdir()] == ["a"], "nothing is left beside the artifact"
    assert not list(workspace.glob("*/.*.part")), "nor in the workspace"
    return status


@pytest.mark.slow
def test_killed_in_the_anchor_search_it_goes_on_at_the_unfinished_trial(forks, undisturbed, tmp_path):
    workspace, known = undisturbed.copy_without(tmp_path / "w", "search", "attempt", "anchor"), {}

    def in_the_search():
        forks.until('"anchor", "done": 1')
        known.update({path: path.stat().st_mtime_ns for path in workspace.glob("*/attempt-*")})

    stop_and_resume(forks, undisturbed, tmp_path, workspace, signal.SIGKILL, in_the_search)
    events = forks.events
    for name in ("capture", "residuals", "reference"):
        assert evaluations(events, name) == 0, f"{name} was done"
    assert evaluations(undisturbed.events, "anchor") > 0
    assert known and all(path.stat().st_mtime_ns == written for path, written in known.items()), "not made again"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_in_one_line_and_a_documented_status(forks, undisturbed, tmp_path, number):
    where = {signal.SIGTERM: '"name": "cut"', signal.SIGINT: '"name": "emit"'}[number]
    workspace = undisturbed.copy_without(tmp_path / "w", "measured")
    status = stop_and_resume(forks, undisturbed, tmp_path, workspace, number, lambda: forks.until(where))
    assert status in (128 + number, 0)


@pytest.mark.long
def test_killed_at_random_moments_it_always_ends_in_the_same_digest(forks, undisturbed, tmp_path):
    draw = random.Random(20)
    reach, stopped = WHOLE * undisturbed.seconds, 0
    while stopped < MOMENTS:
        number = draw.choice([signal.SIGKILL] * 3 + [signal.SIGTERM, signal.SIGINT])
        moment = draw.uniform(0.0, reach)
        folder = tmp_path / "moment"
        folder.mkdir()
        start = time.monotonic()
        status = stop_and_resume(
            forks, undisturbed, folder, folder / "w", number, lambda moment=moment: time.sleep(moment)
        )
        if status == 0:
            reach = moment  # it had ended by then: this compile was quicker than the undisturbed one
        else:
            stopped += 1
        reached = [json.loads(line) for line in (folder / "stopped.err").read_text().splitlines() if line[:1] == "{"]
        last = [event["name"] for event in reached if event["event"] == "start"][-1:] or ["imports"]
        print(f"{signal.Signals(number).name} after {moment:.1f} s in {last[0]}: {status}, same digest", end=" ")
        print(f"({time.monotonic() - start:.0f} s)", flush=True)
        shutil.rmtree(folder)


@pytest.mark.slow
def test_a_budget_is_added_without_calibrating_again(forks, undisturbed, tmp_path):
    more = ("compile", str(undisturbed.model), *COMPILE, "--budgets", "2,3,4", "--json")
    workspace = undisturbed.copy_without(tmp_path / "w")
    assert forks.run(*more, "-o", str(tmp_path / "added"), workspace=workspace, log=tmp_path / "l") == 0, forks.stderr
    added, events = forks.result["digest"], forks.events
    for name in ("capture", "residuals", "reference", "anchor"):
        assert evaluations(events, name) == 0, f"{name} was computed again"
    assert 0 < evaluations(events, "interpolate, fit") < evaluations(undisturbed.events, "interpolate, fit")
    reused = [event["name"] for event in events if event["event"] == "reused"]
    assert {"export", "export-text", "export-decoder"} <= set(reused) and reused.count("measured") == 2
    fresh = undisturbed.copy_without(tmp_path / "fresh", *SEARCHES)
    assert forks.run(*more, "-o", str(tmp_path / "fresh-a"), workspace=fresh, log=tmp_path / "l") == 0, forks.stderr
    assert evaluations(forks.events, "anchor") > 0
    assert forks.result["digest"] == added


@pytest.mark.slow
def test_a_second_compile_waits_for_the_first(forks, undisturbed, tmp_path):
    workspace = undisturbed.copy_without(tmp_path / "w", "measured")
    (folder,) = workspace.iterdir()
    holder = (
        "import fcntl, sys, time; f = open(sys.argv[1], 'a'); fcntl.flock(f, fcntl.LOCK_EX); print('held', "
        "flush=True); sys.stdin.read()"
    )
    first = subprocess.Popen(
        [sys.executable, "-c", holder, str(folder / ".lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert first.stdout and first.stdout.readline() == b"held\n"
    forks.start(
        "compile",
        str(undisturbed.model),
        *COMPILE,
        "-o",
        str(tmp_path / "a"),
        workspace=workspace,
        log=tmp_path / "log",
    )
    forks.until("waiting until it ends")
    assert "another compile of this model is at work" in forks.stderr and not (tmp_path / "a").exists()
    first.communicate()
    assert forks.wait() == 0, forks.stderr
    assert Artifact.open(tmp_path / "a").manifest.digest == undisturbed.digest


def mounted(folder: Path) -> bool:
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=50m", "tmpfs", str(folder)]
    return shutil.which("mount") is not None and subprocess.run(command, capture_output=True).returncode == 0


def resize(folder: Path, size: int) -> None:
    """Give a mounted disk this many bytes."""
    subprocess.run(["mount", "-o", f"remount,size={size // 1024}k", str(folder)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["workspace", "target"])
def test_a_full_disk_is_named_and_nothing_is_lost(forks, undisturbed, tmp_path, where):
    small = tmp_path / "small"
    if not mounted(small):
        pytest.skip("needs the right to mount a tmpfs")
    try:
        target = tmp_path / "a"
        if where == "workspace":
            used = undisturbed.copy_without(small / "w", "export-text", "measured", "anchor", "evaluate", "capture")
        else:
            target, used = small / "a", undisturbed.copy_without(tmp_path / "w", "measured")
        # Room for small results, and neither for the text encoder, whose tokenizers take 600 kB, nor for the artifact.
        resize(small, shutil.disk_usage(small).used + 300 * 1024)
        arguments = ("compile", str(undisturbed.model), *COMPILE, "-o", str(target))
        status = forks.run(*arguments, workspace=used, log=tmp_path / "full")
        assert status == (6 if where == "workspace" else 2), forks.stderr
        assert len(forks.stderr.strip().splitlines()) == 1, forks.stderr
        assert f"no space left on the disk of {small}" in forks.stderr and "MB free" in forks.stderr
        assert not target.exists() and not list(small.glob("**/.*.part"))
        resize(small, 50 << 20)
        assert forks.run(*arguments, "--json", workspace=used, log=tmp_path / "again") == 0, forks.stderr
        assert forks.result["digest"] == undisturbed.digest
    finally:
        subprocess.run(["umount", str(small)], check=True)
