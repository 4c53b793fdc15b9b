"""`otc verify`: what each level finds, what it leaves to the next one, and how it exits."""

from __future__ import annotations

import json

import pytest
import small_artifact as small
from click.testing import CliRunner

from otcache.runtime.cli import main as cli
from otcache.runtime.cli.shipping import LEVELS as OFFERED
from otcache.runtime.engines import choose as engine
from otcache.runtime.shipping.verify import LEVELS, verify
from otcache.schemas.manifest import SCHEMA_VERSION

BLOCK = "engines/onnx/block_0.onnx"


def otc(*arguments):
    return CliRunner().invoke(cli.main, ["verify", *map(str, arguments)])


def exits(folder, *options):
    """Exit codes of the four levels."""
    return [otc(folder, "--level", level, *options).exit_code for level in LEVELS]


def with_golden(folder, **change):
    """The small artifact with a golden record of what it makes itself."""
    import numpy as np

    from otcache.runtime import Sampler

    with Sampler.load(folder) as sampler:
        latents = sampler.sample(sampler.encode("a red ring"), budget=2, seed=3, guidance_scale=5.0)
    (folder / "golden").mkdir()
    (folder / "golden/latents.f32").write_bytes(np.asarray(latents, "<f4").tobytes())
    value = small.read_manifest(folder)
    value["golden"] = {
        "prompt": "a red ring",
        "budget": "2",
        "seed": 3,
        "guidance_scale": 5.0,
        "latents": "golden/latents.f32",
        "max_relative_error": 1e-3,
        **change,
    }
    value["files"].append(
        {"path": "golden/latents.f32", "size_bytes": 4 * latents.size, "digest": "sha256:" + "0" * 64}
    )
    small.write_manifest(folder, value)
    small.reseal_file(folder, "golden/latents.f32")
    return folder


def test_levels_are_those_that_are_offered():
    assert LEVELS == OFFERED


def test_whole(damaged):
    with_golden(damaged)
    assert exits(damaged) == [0, 0, 0, 0]
    found = json.loads(otc(damaged, "--level", "golden", "--json").stdout)
    assert found["ok"] and found["level"] == "golden" and found["host"]["backend"] == "onnxruntime"
    assert (
        found["golden"]["relative_error"] < 1e-6
        and found["unlisted"] == []
        and found["schema_version"] == SCHEMA_VERSION
    )
    found = json.loads(otc(damaged, "--json").stdout)
    assert (found["level"], found["host"], found["golden"], found["public_key"]) == ("digests", None, None, None)


def test_each_level_finds_its_own(damaged):
    """From the deepest fault to the first: every level up to it still passes."""
    with_golden(damaged, seed=4)
    assert exits(damaged) == [0, 0, 0, 6]
    small.write_manifest(damaged, {**small.read_manifest(damaged), "golden": None})
    assert exits(damaged) == [0, 0, 0, 4]
    (damaged / "tokenizers/words.json").write_text("{}")
    small.reseal_file(damaged, "tokenizers/words.json")
    assert exits(damaged) == [0, 0, 4, 4]
    data = bytearray((damaged / BLOCK).read_bytes())
    data[50] ^= 1
    (damaged / BLOCK).write_bytes(data)
    assert exits(damaged) == [0, 4, 4, 4]
    (damaged / BLOCK).unlink()
    assert exits(damaged) == [4, 4, 4, 4]


def test_a_host_that_cannot_serve_says_what_would(damaged, monkeypatch):
    monkeypatch.setattr(engine.importlib.util, "find_spec", lambda name: None)
    assert exits(damaged) == [0, 0, 6, 4], "without a golden record that is the fault, whatever the host"
    assert "onnxruntime: it is not installed: pip install onnxruntime" in otc(damaged, "--level", "host").stderr
    result = otc(damaged, "--level", "host", "--backend", "tensorrt")
    assert result.exit_code == 6 and "the artifact holds no engines for it" in result.stderr
    assert otc(damaged, "--level", "host", "--backend", "other").exit_code == 2


@pytest.mark.parametrize("content", [b"\0", b"\xff"])
def test_golden_latents_that_are_none(damaged, content):
    with_golden(damaged)
    path = damaged / "golden/latents.f32"
    path.write_bytes(content * path.stat().st_size)
    small.reseal_file(damaged, "golden/latents.f32")
    result = otc(damaged, "--level", "golden")
    assert result.exit_code == 4 and "golden/latents.f32" in result.stderr and "not finite" in result.stderr


def test_unlisted_files_are_reported(damaged):
    (damaged / "engines/onnx/extra.so").write_text("x")
    assert verify(damaged).unlisted == ("engines/onnx/extra.so",)
    result = otc(damaged)
    assert (
        result.exit_code == 0 and "note: not part of it, never read: engines/onnx/extra.so (1 in all)" in result.stderr
    )


def test_options_that_are_refused(artifact_folder):
    assert otc(artifact_folder, "--level", "all").exit_code == 2
    assert otc(artifact_folder, "--threads", "0").exit_code == 2
