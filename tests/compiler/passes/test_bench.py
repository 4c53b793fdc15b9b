"""A compile says how long its artifact takes here: in the report, and nowhere that its digest or its server looks."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

from command import COMPILE, otc

from otcache.compiler.passes import bench as passes
from otcache.compiler.report.evidence import read_evidence
from otcache.runtime.artifact.reader import Artifact


@pytest.fixture(scope="module")
def benched(compiled, tiny_flux_folder, workspace, tmp_path_factory):
    """The tiny pipeline's artifact, from the same workspace, with latencies."""
    target = tmp_path_factory.mktemp("benched") / "tiny"
    result = otc("compile", str(tiny_flux_folder), *COMPILE, "--bench", "-o", str(target), workspace=workspace)
    assert result.exit_code == 0, result.output
    return target


def test_latency_on_this_host_is_in_the_report_alone(compiled, benched):
    found = read_evidence(benched / "report").bench
    assert found is not None and found.missing is None
    assert found.latency_s.keys() == {"2", "4", "full"} and all(value > 0 for value in found.latency_s.values())
    assert found.command == f"otc bench {benched} --repeat 20 --seconds 5" and found.requests >= 1
    assert "CPUs" in found.host and {"onnxruntime", "otcache", "python"} <= found.versions.keys()
    page = (benched / "report.html").read_text()
    assert "Recommended: " in page and f"{found.latency_s['full']:.3g} s" in page and found.command in page
    whole, other = Artifact.open(benched), Artifact.open(compiled)
    assert whole.verify().digest == other.manifest.digest, "the digest is the same with and without"
    assert whole.manifest.measurements == ()
    assert read_evidence(compiled / "report").bench is None


def test_it_is_left_out_where_there_is_nothing_to_run(tiny_flux_folder, workspace, tmp_path):
    target = tmp_path / "programs"
    line = ["compile", str(tiny_flux_folder), *COMPILE, "--payload", "output", "--engines", "none", "--bench"]
    result = otc(*line, "-v", "-o", str(target), workspace=workspace)
    assert result.exit_code == 0 and "bench:" not in result.stderr, result.output
    assert read_evidence(target / "report").bench is None


def test_a_host_is_spared_what_would_take_long(compiled, monkeypatch):
    slow = passes.bench(compiled, [4, 8], 50, 10.0)
    assert slow.missing == "two rounds of all budgets would take about 21 min" and slow.latency_s == {}
    monkeypatch.setattr(passes, "free_bytes", lambda device: 1000)
    assert "of memory are free" in str(passes.bench(compiled, [4, 8], 50, None).missing)


def test_why_it_could_not_be_measured_is_said(tmp_path):
    (tmp_path / "manifest.json").write_text("{")
    assert "manifest.json" in str(passes.bench(tmp_path, [4], 50, None).missing)


def test_pictures_of_the_best_peer_are_kept(compiled):
    """Of each budget the one with the highest mean PSNR, and the pictures are its own."""
    evidence = read_evidence(compiled / "report")
    entries = {entry.budget: entry for entry in Artifact.open(compiled).manifest.programs}
    for found in evidence.peers:
        peers = entries[str(found.budget)].baselines
        best = max(peers, key=lambda peer: peer.quality.psnr_db.mean)
        assert found.name == best.name and len(found.psnr_db) == evidence.shown
        shown = sum(found.psnr_db) / evidence.shown
        assert shown == pytest.approx(best.quality.psnr_db.mean, rel=1e-4), "all 3 held-out prompts are shown"
