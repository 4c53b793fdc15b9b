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
        preexec_fn=heed_interrupts,
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


def heed_interrupts():
    """In the child: Ctrl-C is ignored in what a shell starts in the background, this process perhaps among it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


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


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (["verify", "--level", "host", "--threads", "100000"], "1<=x<=1024"),
        (["bench", "--threads", "100000"], "1<=x<=1024"),
        (["bench", "--repeat", 10**12], "1<=x<=1000000"),
        (["bench", "--warmup", 10**12], "0<=x<=1000000"),
        (["inspect", "--memory", "-n", 10**12], "1<=x<=4096"),
        (["build-engines", "--backend", "tensorrt-rtx", "--jobs", 10**6], "1<=x<=256"),
    ],
)
def test_so_are_those_of_other_commands(folder, line, words):
    command, *options = line
    result = otc(command, folder, *options)
    assert result.returncode == 2 and f"is not in the range {words}" in result.stderr


def test_what_an_artifact_may_hold_can_be_said(folder, tmp_path):
    def at_most(number):
        return otc("verify", folder, env={**os.environ, "OTC_MAX_BYTES": number})

    whole = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert at_most(str(whole)).returncode == 0
    refused = at_most(str(whole - 1))
    assert refused.returncode == 4 and f"set OTC_MAX_BYTES={whole}" in refused.stderr
    wrong = at_most("1 TB")
    assert wrong.returncode == 2 and "OTC_MAX_BYTES is '1 TB'" in wrong.stderr
    archive = tmp_path / "small.tar"
    assert otc("pack", folder, "-o", archive).returncode == 0
    unpacked = otc("unpack", archive, "-o", tmp_path / "a", env={**os.environ, "OTC_MAX_BYTES": "1000"})
    assert unpacked.returncode == 4 and not (tmp_path / "a").exists()


def test_a_file_of_terabytes_is_refused_at_once(folder):
    path = folder / "tokenizers/words.json"
    with open(path, "r+b") as file:
        file.truncate(4 << 40)
    value = small.read_manifest(folder)
    next(entry for entry in value["files"] if entry["path"] == "tokenizers/words.json")["size_bytes"] = 4 << 40
    small.write_manifest(folder, value)
    begin = time.monotonic()
    result = otc("verify", folder)
    assert result.returncode == 4 and "expected at most 274877906944" in result.stderr
    assert time.monotonic() - begin < 20


@pytest.mark.parametrize("command", ["pack", "unpack"])
def test_what_a_killed_one_leaves_is_swept_by_the_next(folder, tmp_path, command):
    archive, target = tmp_path / "small.tar", tmp_path / "target"
    assert otc("pack", folder, "-o", archive).returncode == 0
    code = (
        "import os, signal, sys; from pathlib import Path; from otcache.schemas.whole_files import *\n"
        "target = Path(sys.argv[2])\n"
        "with whole_file(target) if sys.argv[1] == 'pack' else part_folder(target, own_part(target)) as part:\n"
        "    (part / 'x').write_bytes(b'x') if part.is_dir() else part.write_bytes(b'x')\n"
        "    print('there', flush=True) or sys.stdin.read()\n"
    )
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", code, command, target], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    for writer in writers:
        assert writer.stdout.readline() == "there\n"
    killed, living = writers
    killed.kill()
    killed.wait()
    source = folder if command == "pack" else archive
    result = otc(command, source, "-o", target)
    assert result.returncode == 0, result.stderr
    assert [path.name for path in tmp_path.glob(".*")] == [f".target.{living.pid}.part"]
    living.communicate("")


def test_a_benchmark_of_too_many_pictures_is_refused(folder):
    result = otc("bench", folder, "--batch", "65536")
    assert result.returncode == 5 and "expected at most 4096" in result.stderr
