"""What a production host meets: Ctrl-C, places that cannot be written, slips of the finger; in real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import small_artifact as small

resource = pytest.importorskip("resource", reason="sets limits as Unix has them")
if not os.path.isdir("/proc/self"):
    pytest.skip("looks at processes in /proc", allow_module_level=True)

OTC = [sys.executable, "-m", "otcache.runtime.cli.main"]
TIMEOUT_S = 60


def otc(*line, **options):
    return subprocess.run(
        [*OTC, *map(str, line)], capture_output=True, text=True, timeout=TIMEOUT_S, check=False, **options
    )


@pytest.fixture
def folder(tmp_path):
    return small.write_artifact(tmp_path / "small")


def drawing(folder, target):
    return ["run", folder, "--budget", "2", "--prompt", "a red ring", "-o", target]


@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT")
@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize("command", ["run", "bench"])
def test_ctrl_c_is_130_and_leaves_nothing(folder, tmp_path, command, as_json):
    lines = {
        "run": ["run", folder, "--budget", ",".join(["full", "3", "2"]), *["--prompt", "a red ring"] * 2000],
        "bench": ["bench", folder, "--repeat", 10**6],
    }
    options = ["--json"] if as_json else []
    if command == "run":
        options += ["-o", tmp_path / "out.png", "--threads", 1, "-n", 2]
    environment = {**os.environ, "OTC_LOG": "info"}
    process = subprocess.Popen(
        [*OTC, *map(str, [*lines[command], *options])],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    wait_for_work(process, command)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 130, err
    assert not out and not list(tmp_path.glob("*.png")) and not list(tmp_path.glob(".*"))
    last = err.strip().splitlines()[-1]
    assert "interrupted: start it again" in last and "Traceback" not in err
    if as_json:
        assert json.loads(last) | {"message": ""} == {
            "event": "error",
            "exit_code": 130,
            "kind": "interrupted",
            "message": "",
        }


def wait_for_work(process, command):
    """Until the artifact is loaded: `run` logs that; `bench` says nothing, so its threads are counted."""
    if command == "run":
        while "loaded in" not in process.stderr.readline():
            assert process.poll() is None
        return
    end = time.monotonic() + TIMEOUT_S
    while time.monotonic() < end:
        with open(f"/proc/{process.pid}/maps", encoding="utf-8") as maps:
            if "onnxruntime_pybind11_state" in maps.read():
                time.sleep(1.0)
                return
        time.sleep(0.05)
    raise AssertionError("bench has not begun")


def no_room():
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


@pytest.mark.parametrize("fault", ["exists", "folder", "missing", "long", "full", "kind", "no folder at all"])
def test_an_output_place_has_one_code_and_is_checked_before_anything_is_drawn(folder, tmp_path, fault):
    target = tmp_path / "out.png"
    options = {}
    if fault == "exists":
        target.write_bytes(b"mine")
    elif fault == "folder":
        target.mkdir()
    elif fault == "missing":
        target = tmp_path / "none" / "out.png"
    elif fault == "long":
        target = tmp_path / f"{250 * 'x'}.png"
    elif fault == "full":
        options["preexec_fn"] = no_room
    elif fault == "kind":
        target = tmp_path / "out.txt"
    else:
        target = folder / "manifest.json" / "out.png"
    (folder / "engines/onnx/embed.onnx").unlink()  # whatever is drawn first fails with another code
    result = otc(*drawing(folder, target), **options)
    assert result.returncode == 2 and f"-o is {str(target)[:200]}" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert fault != "exists" or target.read_bytes() == b"mine"
    assert not list(tmp_path.glob(".*"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_read_only_folder_is_an_output_place_like_others(folder, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o555)
    assert otc(*drawing(folder, tmp_path / "locked" / "out.png")).returncode == 2
    folder.chmod(0o555)
    assert otc("bench", folder, "--repeat", 1, "--save").returncode == 2


def test_bench_finds_a_full_disk_before_it_measures(folder):
    (folder / "engines/onnx/embed.onnx").unlink()
    result = otc("bench", folder, "--save", preexec_fn=no_room)
    assert result.returncode == 2 and "--save is" in result.stderr and "cannot be written" in result.stderr


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["-n", "100000000"], 5, "the request is for 100000000 pictures: expected at most 4096"),
        (["--threads", "100000"], 2, "is not in the range 1<=x<=1024"),
        (["--seed", 2**64], 5, "seed is"),
    ],
)
def test_slips_of_the_finger_are_told_at_once(folder, tmp_path, options, code, words):
    begin = time.monotonic()
    result = otc(*drawing(folder, tmp_path / "out.png"), *options)
    assert result.returncode == code and words in result.stderr
    assert time.monotonic() - begin < 20


def test_a_benchmark_of_too_many_pictures_is_refused(folder):
    result = otc("bench", folder, "--batch", "65536")
    assert result.returncode == 5 and "expected at most 4096" in result.stderr
