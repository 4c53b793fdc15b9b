"""Every fault of a place for results has one exit code in all commands, and is found before anything is computed."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import small_artifact as small
from command import otc

from otcache.schemas.errors import UsageError

resource = pytest.importorskip("resource", reason="sets limits as Unix has them")
USAGE = UsageError.exit_code
FILES = {
    "run": ["run", "{artifact}", "--budget", "2", "--prompt", "a red ring", "-o", "{target}.png"],
    "pack": ["pack", "{artifact}", "-o", "{target}"],
    "encode": ["encode", "shapes", "--for", "{artifact}", "--prompt", "a red ring", "-o", "{target}"],
}
FOLDERS = {
    "compile": ["compile", "shapes", "-o", "{target}"],
    "compare": ["compare", "shapes", "-o", "{target}"],
    "export": ["export", "{artifact}", "shapes", "--force", "-o", "{target}"],
    "unpack": ["unpack", "{archive}", "-o", "{target}"],
}
INSIDE = {
    "bench": ["bench", "{artifact}", "--save"],
    "sign": ["sign", "{artifact}", "--key", "{artifact}/none.pem"],
    "report": ["report", "{artifact}"],
    "build-engines": ["build-engines", "{artifact}", "--backend", "tensorrt-rtx", "--target", "sm_89"],
}
"""Commands that write into the artifact."""
NEEDS = {"compile": "torch", "compare": "torch", "export": "torch", "encode": "torch", "report": "matplotlib"} | {
    "build-engines": "tensorrt_rtx"
}


@contextlib.contextmanager
def full_disk():
    """While it lasts, nothing can be written."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("places")
    artifact = small.write_artifact(folder / "small")
    assert otc("pack", str(artifact), "-o", str(folder / "small.tar")).exit_code == 0
    (artifact / "engines/onnx/embed.onnx").unlink()  # whatever is computed first fails with another code
    return {"artifact": artifact, "archive": folder / "small.tar"}


def outcome(name, line, places, target=Path()):
    pytest.importorskip(NEEDS.get(name, "otcache"))
    return otc(*(part.format(target=target, **places) for part in line))


@pytest.mark.parametrize("fault", ["exists", "below a file", "long", "full"])
@pytest.mark.parametrize("name", [*FILES, *FOLDERS])
def test_where_a_result_cannot_go(places, tmp_path, name, fault):
    target, there = tmp_path / "out", contextlib.nullcontext()
    if fault == "exists":
        for path in (target, target.with_suffix(".png")):
            path.write_bytes(b"mine")
    elif fault == "below a file":
        (tmp_path / "file").write_bytes(b"mine")
        target = tmp_path / "file" / "out"
    elif fault == "long":
        target = tmp_path / (250 * "x")
    else:
        there = full_disk()
    before = sorted(tmp_path.iterdir())
    with there:
        result = outcome(name, {**FILES, **FOLDERS}[name], places, target)
    assert result.exit_code == USAGE, result.output
    assert f"-o is {target}"[:200] in result.stderr and len(result.stderr.splitlines()) == 1, result.stderr
    assert sorted(tmp_path.iterdir()) == before
    assert all(path.read_bytes() == b"mine" for path in before)


@pytest.mark.parametrize("name", INSIDE)
def test_an_artifact_that_cannot_be_written_to(places, name):
    before = sorted(places["artifact"].iterdir())
    with full_disk():
        result = outcome(name, INSIDE[name], places)
    assert result.exit_code == USAGE, result.output
    assert "cannot be written: File too large" in result.stderr and len(result.stderr.splitlines()) == 1, result.stderr
    assert sorted(places["artifact"].iterdir()) == before
