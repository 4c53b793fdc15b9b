"""`otc bench` and `otc run --profile`: the numbers add up, and --save changes nothing but the measurements."""

import json
import os
import threading

import numpy as np
import pytest
import small_artifact as small
from click.testing import CliRunner

from otcache.runtime import Artifact, ArtifactError, Sampler, UsageError
from otcache.runtime.cli import main as cli
from otcache.runtime.loop.timing import PARTS
from otcache.runtime.serving import bench


def otc(*arguments):
    return CliRunner().invoke(cli.main, list(map(str, arguments)))


def test_json(artifact_folder):
    result = otc(
        "bench", artifact_folder, "--budget", "3,full", "--batch", "1,2", "--repeat", 4, "--threads", 1, "--json"
    )
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["threads"] == 1 and found["repeat"] == 4 and found["saved"] is False
    assert found["digest"] == Artifact.open(artifact_folder).manifest.digest
    assert {"python", "otcache", "numpy", "onnxruntime"} <= set(found["versions"]) and found["host"]["cpus"] >= 1
    assert 0 < sum(found["load"]["stages"].values()) <= found["load"]["total_s"]
    assert [(entry["budget"], entry["batch"]) for entry in found["results"]] == [
        ("3", 1),
        ("3", 2),
        ("full", 1),
        ("full", 2),
    ]
    for entry in found["results"]:
        latency = entry["latency_s"]
        ranks = [latency[name] for name in ("min", "p50", "p90", "p95", "p99", "max")]
        assert entry["requests"] == 4 and ranks == sorted(ranks) and ranks[0] > 0
        assert set(entry["parts"]) == set(PARTS)
        means = sum(entry["parts"][part]["mean"] for part in PARTS if part != "wait")
        assert means == pytest.approx(latency["mean"], abs=1e-5)
        assert set(entry["stages"]) == set(small.STAGES)
    steps = found["results"][0]["steps"]
    assert steps["computed"]["count"] == 4 * 3 and steps["cached"]["count"] == 4 * 3
    assert "blocks" in steps["computed"]["parts"] and "blocks" not in steps["cached"]["parts"]
    assert "cached" not in found["results"][2]["steps"]


def test_table(artifact_folder):
    result = otc("bench", artifact_folder, "--repeat", 2)
    assert result.exit_code == 0 and not result.stderr
    for word in ("p50", "p99", "overhead", "full", "Latency", "Median of each part"):
        assert word in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_statistics_are_numpys():
    found = bench.statistics_of([0.4, 0.1, 0.2, 0.3])
    assert found == {"mean": 0.25, "min": 0.1, "p50": 0.25, "p90": 0.37, "p95": 0.385, "p99": 0.397, "max": 0.4}


def test_save(damaged):
    """The digest stays, other measurements and fields of a later version stay, `budget_for` reads the new ones."""
    value = small.read_manifest(damaged)
    value["measurements"].append({"name": "peak_bytes", "value": 1.0, "unit": "B", "later": 2})
    value["later"] = {"field": 1}
    small.write_manifest(damaged, value)
    before = small.read_manifest(damaged)
    result = otc("bench", damaged, "--budget", "2,full", "--repeat", 3, "--save", "--json")
    assert result.exit_code == 0, result.output
    measured = {entry["budget"]: entry["latency_s"]["p50"] for entry in json.loads(result.stdout)["results"]}
    after = small.read_manifest(damaged)
    found = {entry["name"]: entry["value"] for entry in after["measurements"]}
    assert found == {
        "latency_s/2": measured["2"],
        "latency_s/3": 0.2,
        "latency_s/full": measured["full"],
        "peak_bytes": 1.0,
    }
    assert {k: v for k, v in before.items() if k != "measurements"} == {
        k: v for k, v in after.items() if k != "measurements"
    }
    assert [entry for entry in after["measurements"] if "later" in entry] == before["measurements"][-1:]
    assert Artifact.open(damaged).verify().unlisted == ()
    with Sampler.load(damaged) as sampler:
        assert sampler.budget_for(latency_s=max(measured["full"], measured["2"])) == "full"


def test_save_while_somebody_reads(damaged):
    artifact, stop, failures = Artifact.open(damaged), threading.Event(), []

    def read():
        while not stop.is_set():
            try:
                Artifact.open(damaged)
            except ArtifactError as error:
                failures.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    for index in range(50):
        bench.save_latencies(artifact, {"2": 0.001 * (index + 1)})
    stop.set()
    reader.join()
    assert not failures and small.read_manifest(damaged)["measurements"][-1]["value"] == 0.05


def test_save_that_is_refused(damaged, monkeypatch):
    artifact = Artifact.open(damaged)
    before = (damaged / "manifest.json").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(UsageError, match="No space left on device"):
        patch.setattr(os, "fsync", full)
        bench.save_latencies(artifact, {"2": 1.0})
    assert (damaged / "manifest.json").read_bytes() == before and not list(damaged.glob(".*"))
    value = small.read_manifest(damaged)
    value["producer"]["otcache"] = "9"
    small.write_manifest(damaged, value)
    with pytest.raises(ArtifactError, match="has changed while it was measured"):
        bench.save_latencies(artifact, {"2": 1.0})


@pytest.mark.parametrize(
    ("options", "exit_code", "words"),
    [
        (["--budget", "9"], 5, "expected one of 2, 3, full"),
        (["--batch", "0"], 2, "expected numbers of pictures"),
        (["--batch", "1,x"], 2, "expected numbers of pictures"),
        (["--batch", "2", "--save"], 2, "expected 1 among them"),
        (["--repeat", "0"], 2, "--repeat"),
        (["--backend", "tensorrt"], 6, "no engines"),
    ],
)
def test_options_that_are_refused(artifact_folder, options, exit_code, words):
    result = otc("bench", artifact_folder, *options)
    assert result.exit_code == exit_code and words in result.stderr and "Traceback" not in result.stderr


def test_profile_of_a_run(artifact_folder, tmp_path):
    arguments = (
        "run",
        artifact_folder,
        "--budget",
        "3,full",
        "--prompt",
        "a",
        "--force",
        "-o",
        tmp_path / "x.png",
        "--profile",
    )
    result = otc(*arguments)
    assert result.exit_code == 0 and result.stdout.count("\n") == 1
    for word in ("load", "encode", "forecast", "overhead", "computed", "cached", "budget full"):
        assert word in result.stderr
    found = json.loads(otc(*arguments, "--json").stdout)["profile"]
    assert set(found["load"]["stages"]) == {"tokenizers", *small.STAGES}
    for budget, steps in (("3", 6), ("full", 6)):
        timing = found["budgets"][budget]
        assert len(timing["steps"]) == steps and set(timing["parts"]) == set(PARTS)
        assert np.isclose(sum(timing["parts"].values()), timing["total_s"], atol=1e-5)
    assert "profile" not in json.loads(otc(*arguments[:-1], "--json").stdout)
