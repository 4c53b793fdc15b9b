"""A compile on workers ends in the digest of one without, whatever happens to the workers, and leaves nothing behind.

Clusters are real: two nodes of Ray on this machine.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import signal
import time
from functools import partial
from pathlib import Path

import pytest
from command import otc

from otcache.runtime.artifact.reader import Artifact

if importlib.util.find_spec("ray") is None or importlib.util.find_spec("torch") is None:
    pytest.skip("needs torch, and ray (pip install 'otcache[ray]')", allow_module_level=True)

from clusters import COMPILE, Otc, gone, name_of, processes_below, two_nodes, wait_for, workers

MOMENTS = int(os.environ.get("OTC_TEST_KILLS", "10"))
KILLS_A_COMPILE = 5
BOUND_BYTES = 10_000
"""That may cross the network for a sample and step."""


@pytest.fixture(scope="module")
def cluster():
    with two_nodes(2, 1) as found:
        yield found


@pytest.fixture(scope="module")
def alone(tiny_flux_folder, tmp_path_factory) -> str:
    """The digest of a compile without workers."""
    folder = tmp_path_factory.mktemp("alone")
    arguments = ("compile", str(tiny_flux_folder), *COMPILE, "-o", str(folder / "a"), "--json")
    result = otc(*arguments, workspace=folder / "w")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)["digest"]


@pytest.fixture
def start(tiny_flux_folder, tmp_path, cluster):
    """Starts a compile on the cluster."""
    count = [0]

    def begin(*more: str, address: str | None = None, workspace: str = "w", options=COMPILE) -> Otc:
        count[0] += 1
        where = ("--ray", address or cluster.address) if address != "" else ()
        target = ("-o", str(tmp_path / f"a{count[0]}"))
        log = tmp_path / f"log{count[0]}"
        arguments = ("compile", str(tiny_flux_folder), *options, *where, *more, *target)
        return Otc(*arguments, workspace=tmp_path / workspace, log=log)

    running: list[Otc] = []

    def track(*arguments, **more) -> Otc:
        running.append(begin(*arguments, **more))
        return running[-1]

    yield track
    for each in running:
        if each.process.poll() is None:
            each.process.kill()
            each.wait()


def kill_one(draw: random.Random) -> bool:
    """Kill a worker, if there is one."""
    found = workers()
    if found:
        draw.choice(found).kill()
    return bool(found)


def at_work(otc_: Otc, count: int) -> bool:
    """Whether so many workers live, or nobody needs them any more."""
    return len(workers()) == count or otc_.process.poll() is not None


def traffic(otc_: Otc) -> str:
    """What was said of the network in the end."""
    return next(each["text"] for each in reversed(otc_.events) if each["event"] == "note" and "crossed" in each["text"])


@pytest.mark.slow
def test_killed_in_a_walk_a_worker_is_replaced_and_the_digest_is_that_of_no_workers(start, alone, tmp_path):
    compile_ = start("--workers", "2")
    compile_.until('"anchor", "done": 1')
    assert kill_one(random.Random(0)), compile_.stderr
    assert compile_.wait() == 0, compile_.stderr
    assert compile_.result["digest"] == alone
    notes = [each["text"] for each in compile_.events if each["event"] == "note"]
    assert sum("has died: its samples are made again" in note for note in notes) == 1
    assert "2 workers on the cluster at" in notes[-1] and ", 1 replaced: " in notes[-1]
    kilobytes = float(traffic(compile_).split(" kB a sample")[0].split(", ")[-1])
    assert 0 < kilobytes * 1e3 < BOUND_BYTES
    progress = [each for each in compile_.events if each["event"] == "progress" and each["name"] == "capture"]
    assert progress[-1].items() >= {"workers": 2, "samples": 8, "done": 64, "total": 64, "seconds_left": 0.0}.items()
    assert wait_for(lambda: not workers()), "no worker is left on the cluster"
    assert not list(tmp_path.glob("w/*/.*.part")), "nor anything of theirs in the workspace"


def test_a_cluster_that_is_too_small_says_in_one_line_what_is_missing(tiny_flux_folder, cluster, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    found = otc("compile", str(tiny_flux_folder), "--device", "cpu", "--workers", "4")
    assert found.exit_code == 6 and found.stderr.strip() == (
        f"Error: --workers is 4: the cluster at {cluster.address} has 3 CPUs on 2 nodes, and each worker takes one: "
        "give --workers 3, or add nodes"
    )
    monkeypatch.delenv("RAY_ADDRESS")
    found = otc("compile", str(tiny_flux_folder), "--device", "cpu", "--workers", "999")
    assert found.exit_code == 6 and "--workers is 999: this host has" in found.stderr and len(found.stderr) < 200
    found = otc("compile", str(tiny_flux_folder), "--device", "cpu", "--ray", "127.0.0.1:1")
    assert found.exit_code == 6 and "--ray is 127.0.0.1:1: no connection (" in found.stderr
    assert len(found.stderr.strip().splitlines()) == 1
    found = otc("compile", str(tiny_flux_folder), "--workers", "0", "--ray", "auto")
    assert found.exit_code == 2 and "expected at least 1 worker" in found.stderr


@pytest.mark.long
@pytest.mark.parametrize("payload", ["output", "residual"])
def test_any_number_of_workers_gives_the_same_digest(start, payload):
    options = (*COMPILE, "--payload", payload)
    digests = {}
    for number in (0, 1, 2, 3):
        more = ("--workers", str(number))
        compile_ = start(*more, address=None if number else "", workspace=f"w{number}", options=options)
        assert compile_.wait() == 0, compile_.stderr
        digests[number] = compile_.result["digest"]
        print(number, digests[number], traffic(compile_) if number else "", flush=True)
    assert len(set(digests.values())) == 1, digests


@pytest.mark.long
def test_with_engines_a_compile_on_workers_is_whole(start, tmp_path):
    options = [each for each in COMPILE if each not in ("--engines", "none")]
    digests = []
    for number in (0, 2):
        compile_ = start("--workers", str(number), address=None if number else "", workspace="w", options=options)
        assert compile_.wait() == 0, compile_.stderr
        digests.append(Artifact.open(Path(compile_.result["artifact"])).verify().digest)
    assert digests[0] == digests[1]


@pytest.mark.long
@pytest.mark.parametrize("moment", ['"workers": 2', '"name": "interpolate, fit"', '"budgets 2, 4 and peers"'])
def test_killed_in_a_pass_a_worker_is_replaced(start, alone, moment):
    """While full runs are made, in walks, and while held-out samples are measured."""
    compile_ = start("--workers", "2")
    compile_.until(moment)
    assert kill_one(random.Random(1)), compile_.stderr
    assert compile_.wait() == 0, compile_.stderr
    assert compile_.result["digest"] == alone


@pytest.mark.long
def test_workers_that_are_killed_at_random_moments_change_nothing(start, alone):
    draw, killed, reach = random.Random(22), 0, 12.0
    for round_ in range(MOMENTS):
        began, moments = time.monotonic(), list[str]()
        compile_ = start("--workers", "2", workspace=f"w{round_}")
        while len(moments) < KILLS_A_COMPILE and killed + len(moments) < MOMENTS:
            wait_for(partial(at_work, compile_, 2))
            time.sleep(draw.uniform(0.0, reach))
            if compile_.process.poll() is not None or not kill_one(draw):
                break
            moments.append([each["name"] for each in compile_.events if each["event"] == "start"][-1])
        assert compile_.wait() == 0, compile_.stderr
        assert compile_.result["digest"] == alone
        killed += len(moments)
        print(f"killed in {moments}: the same digest after {time.monotonic() - began:.0f} s", flush=True)
        if killed >= MOMENTS:
            return
    pytest.fail(f"killed {killed} workers")


@pytest.mark.long
def test_a_node_that_dies_leaves_its_work_to_the_others(tiny_flux_folder, alone, tmp_path):
    with two_nodes(1, 1) as cluster:
        arguments = ("compile", str(tiny_flux_folder), *COMPILE, "--ray", cluster.address, "--workers", "2")
        compile_ = Otc(*arguments, "-o", str(tmp_path / "a"), workspace=tmp_path / "w", log=tmp_path / "log")
        compile_.until('"anchor", "done": 1')
        cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)
        assert compile_.wait() == 0, compile_.stderr
    assert compile_.result["digest"] == alone
    assert "finds no room in the cluster: another one does its work" in compile_.stderr


@pytest.mark.long
def test_a_killed_process_leaves_no_worker_and_goes_on_from_its_workspace(start, alone):
    compile_ = start("--workers", "2")
    compile_.until('"name": "interpolate, fit"')
    compile_.process.send_signal(signal.SIGKILL)
    assert compile_.wait() == -signal.SIGKILL
    assert wait_for(lambda: not workers())
    again = start("--workers", "2")
    assert again.wait() == 0, again.stderr
    assert again.result["digest"] == alone
    made = {name: sum(e["evaluations"] for e in again.events if e["event"] == "pass" and e["name"] == name)
            for name in ("capture", "anchor")}  # fmt: skip
    assert made == {"capture": 0, "anchor": 0}, "what it had is not made again"


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_compile_leaves_nothing_of_its_own_cluster(start, tmp_path, number):
    before = set(Path("/tmp").glob("otc-ray-*"))
    compile_ = start("--workers", "2", address="")
    compile_.until('"anchor", "done": 1')
    below = processes_below(compile_.process.pid)
    assert sum("ray::Worker" in name_of(each) for each in below) == 2
    os.killpg(compile_.process.pid, number) if number == signal.SIGINT else compile_.process.send_signal(number)
    assert compile_.wait(60) == (-number if number == signal.SIGKILL else 128 + number), compile_.stderr
    assert gone(below) == []
    if number != signal.SIGKILL:
        assert "Traceback" not in compile_.stderr
        assert set(Path("/tmp").glob("otc-ray-*")) == before
        assert not list(tmp_path.glob("w/*/.*.part"))


@pytest.mark.long
def test_a_comparison_on_workers_is_that_of_none(tiny_flux_folder, cluster, tmp_path):
    cells = []
    for number in (0, 2):
        where = ("--ray", cluster.address, "--workers", str(number)) if number else ()
        options = [each for each in COMPILE if each not in ("--engines", "none", "--threads", "1")]
        more = ("--against", "euler,fora,teacache,lemica,otcache (paper)", "--no-claim", "--no-robustness")
        target = ("-o", str(tmp_path / f"c{number}"))
        arguments = ("compare", str(tiny_flux_folder), *options, *more, *where, *target)
        comparison = Otc(*arguments, workspace=tmp_path / f"w{number}", log=tmp_path / f"log{number}")
        assert comparison.wait() == 0, comparison.stderr
        cells.append([{**each, "seconds": None} for each in comparison.result["cells"]])
    assert len({each["method"] for each in cells[0]}) == 6
    assert cells[0] == cells[1]
