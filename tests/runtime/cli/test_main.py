"""The command line: pictures, reports, messages and exit codes."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import small_artifact as small
from click.testing import CliRunner
from PIL import Image

from otcache.runtime import Sampler
from otcache.runtime.cli import main as cli
from otcache.runtime.cli.inspect import timeline


def otc(*arguments):
    return CliRunner().invoke(cli.main, list(map(str, arguments)))


def failed(result, exit_code, *words):
    assert result.exit_code == exit_code, result.output
    lines = result.stderr.strip().splitlines()
    assert lines[-1].startswith("Error: ") and "Traceback" not in result.stderr
    if exit_code != 2:
        assert len(lines) == 1
    for word in words:
        assert word in lines[-1], result.stderr


def test_run(artifact_folder, tmp_path):
    out = tmp_path / "one.png"
    result = otc("run", artifact_folder, "--budget", 2, "--prompt", "a red ring", "--seed", 4, "-o", out)
    assert result.exit_code == 0 and str(out) in result.stdout and not result.stderr
    with Sampler.load(artifact_folder) as sampler:
        expected = np.round(sampler("a red ring", budget=2, seed=4)[0] * 255)
    np.testing.assert_array_equal(np.asarray(Image.open(out)), expected)


def test_run_by_quality(damaged, tmp_path):
    small.with_qualities(damaged, {"2": (26.0, 0.9), "3": (41.0, 0.99)})
    for quality, budget in (("draft", "2"), ("high", "3"), ("psnr>=30, ssim>=0.95", "3"), ("best", "full")):
        out = tmp_path / f"{budget}-{len(quality)}.png"
        result = otc("run", damaged, "--quality", quality, "--prompt", "a red ring", "-o", out, "--json")
        assert result.exit_code == 0, result.output
        assert {name: json.loads(result.stdout)[name] for name in ("budget", "quality")} == {
            "budget": budget,
            "quality": quality,
        }
    result = otc("run", damaged, "--quality", "high", "--prompt", "a", "-o", tmp_path / "said.png")
    assert "budget 3" in result.stdout and "for quality high" in result.stdout
    tiers = json.loads(otc("inspect", damaged, "--json").stdout)["tiers"]
    assert {name: tier["budget"] for name, tier in tiers.items()} == {
        "draft": "2",
        "good": "3",
        "high": "3",
        "best": "full",
    }
    assert tiers["high"]["quality"]["psnr_db"]["mean"] == 41.0 and tiers["best"]["quality"] is None
    assert [
        line.split() for line in otc("inspect", damaged).stdout.splitlines() if line.strip().startswith("high")
    ] == [["high", "psnr>=40", "3", "41.0", "36.0", "0.990"]]


def test_run_several(artifact_folder, tmp_path):
    out = tmp_path / "all.png"
    arguments = ("run", artifact_folder, "--budget", "full", "--prompt", "a", "--prompt", "star", "-n", 2, "-o", out)
    result = otc(*arguments, "--json")
    assert result.exit_code == 0 and json.loads(result.stdout)["images"] == 4
    assert Image.open(out).size == (10, 10)
    result = otc(*arguments, "--separate")
    assert result.exit_code == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["all-1.png", "all-2.png", "all-3.png", "all-4.png", "all.png"]


def test_outputs_that_are_refused(artifact_folder, tmp_path):
    out = tmp_path / "x.png"
    out.write_text("mine")
    base = ("run", artifact_folder, "--budget", 2, "--prompt", "a", "-o")
    failed(otc(*base, out), 2, "it exists", "--force")
    assert out.read_text() == "mine"
    assert otc(*base, out, "--force").exit_code == 0
    failed(otc(*base, tmp_path / "none" / "x.png"), 2, "does not exist")
    failed(otc(*base, tmp_path / "x.txt"), 2, "ends in .png")
    assert not (tmp_path / "x.txt").exists()


@pytest.mark.parametrize(
    ("options", "exit_code", "words"),
    [
        (["--budget", "9"], 5, "2, 3, full"),
        (["--quality", "finest"], 5, "draft, good, high, best"),
        (["--quality", "psnr=30"], 5, "such as psnr>=35"),
        (["--quality", "high", "--budget", "2"], 2, "and not both"),
        ([], 2, "expected --budget or --quality"),
        (["--budget", "2", "--guidance-scale", "9"], 5, "2 to 6"),
        (["--budget", "2", "-n", "0"], 2, "-n"),
        (["--budget", "2", "--seed", "x"], 2, "--seed"),
        (["--budget", "2", "--backend", "tensorrt"], 6, "no engines"),
        (["--budget", "2", "--backend", "what"], 2, "onnxruntime"),
    ],
)
def test_requests_that_are_refused(artifact_folder, tmp_path, options, exit_code, words):
    result = otc("run", artifact_folder, "--prompt", "a", "-o", tmp_path / "x.png", *options)
    failed(result, exit_code, words)
    assert not list(tmp_path.iterdir())


def test_inspect(artifact_folder):
    result = otc("inspect", artifact_folder)
    assert result.exit_code == 0
    for word in ("small", "block_1", "h2 batch×4×12", "ids int64 batch×3", "full", "30.0", "█··█··"):
        assert word in result.stdout, result.stdout
    found = json.loads(otc("inspect", artifact_folder, "--json").stdout)
    assert [entry["budget"] for entry in found["budgets"]] == ["2", "3", "full"]
    assert found["budgets"][1]["schedule"] == [0, 2, 4] and found["stages"][0]["size_bytes"] > 0


def test_verify(artifact_folder, damaged):
    result = otc("verify", artifact_folder)
    assert result.exit_code == 0 and result.stdout.startswith("ok: 8 files")
    assert json.loads(otc("verify", artifact_folder, "--json").stdout)["ok"] is True
    (damaged / "tokenizers/words.json").write_text("{}")
    failed(otc("verify", damaged), 4, "tokenizers/words.json", "expected")
    failed(otc("verify", damaged / "none"), 4, "nothing there")


def test_help():
    for arguments in ([], ["run"], ["inspect"], ["verify"]):
        result = otc(*arguments, "--help")
        assert result.exit_code == 0 and ("Examples:" in result.stdout or not arguments)
    result = otc("--help")
    assert "4  artifact" in result.stdout and "compile" in result.stdout
    assert "0.1.0" in otc("--version").stdout


def test_missing_compiler(monkeypatch):
    class Point:
        name = "compile"

        def load(self):
            raise ImportError("No module named 'torch'")

    monkeypatch.setattr(cli, "_entry_points", lambda: {"compile": Point()})
    assert "compile" in otc("--help").stdout
    failed(otc("compile", "shapes", "--budgets", "4"), 6, "pip install 'otcache[compiler]'")


def test_unexpected_error(monkeypatch, artifact_folder):
    def fail(folder):
        raise ZeroDivisionError("line one\nline two")

    monkeypatch.setattr("otcache.runtime.artifact.reader.Artifact.open", fail)
    failed(otc("verify", artifact_folder), 1, "ZeroDivisionError", "OTC_LOG=debug")
    monkeypatch.setenv("OTC_LOG", "debug")
    result = otc("verify", artifact_folder)
    assert result.exit_code == 1 and "Traceback" in result.stderr and "in fail" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("Error: unexpected ZeroDivisionError")


def test_timeline():
    assert timeline((0, 3), 6) == "█··█··"
    assert timeline((0, 1, 2), 8, width=2) == "▆·"
    assert len(timeline(tuple(range(1000)), 1000)) == 64


def test_a_real_process(artifact_folder, tmp_path):
    command = [sys.executable, "-m", "otcache.runtime.cli.main", "run", str(artifact_folder), "--budget", "2"]
    done = subprocess.run(
        [*command, "--prompt", "a ring", "-o", str(tmp_path / "x.png"), "--json"], capture_output=True, text=True
    )
    assert done.returncode == 0 and not done.stderr
    assert Path(json.loads(done.stdout)["outputs"][0]).is_file()
    done = subprocess.run([*command[:-1], "7", "--prompt", "a", "-o", str(tmp_path / "y.png")], capture_output=True)
    assert done.returncode == 5 and done.stderr.count(b"\n") == 1
