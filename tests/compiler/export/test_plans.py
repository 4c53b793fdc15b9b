"""Plans as a part of `otc compile`, through the entry points between compiler and runtime."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from otcache.compiler.export import plans as engines
from otcache.compiler.workspace.progress import Pass, Reporter
from otcache.runtime.cli.main import main
from otcache.schemas.combinations import combinations
from otcache.schemas.errors import HostError, UsageError
from otcache.schemas.manifest_file import read_manifest

GOLDEN = Path(__file__).parents[2] / "golden" / "1.5" / "artifact"


class Recorder(Reporter):
    def __init__(self):
        self.seen = []

    def on(self, name, description):
        return contextlib.nullcontext(Pass(name, description, self._see))

    def _see(self, current):
        self.seen.append((current.name, current.description, current.done, current.total))


def test_options():
    assert engines.parse_backends("onnx") == () and engines.parse_targets([]) == ()
    assert engines.parse_backends("tensorrt-rtx, onnx,tensorrt-rtx") == ("tensorrt-rtx",)
    with pytest.raises(UsageError, match="has 'openvino': expected some of onnx, tensorrt, tensorrt-rtx"):
        engines.parse_backends("onnx,openvino")
    with pytest.raises(UsageError, match="add --backend onnx,tensorrt-rtx"):
        engines.check((), ("sm_89",))


def test_a_runtime_without_a_builder_is_named(monkeypatch):
    monkeypatch.setattr(engines, "GROUP", "otcache.nothing")
    with pytest.raises(HostError, match=r"entry points otcache\.nothing"):
        engines.check(("tensorrt-rtx",), ("sm_89",))


def test_what_cannot_be_built_is_refused_before_the_compile(tmp_path):
    pytest.importorskip("tensorrt_rtx")
    line = ["compile", "shapes", "--backend", "onnx,tensorrt-rtx", "--target", "sm_90", "-o", str(tmp_path / "out")]
    result = CliRunner(env={"OTC_CACHE": str(tmp_path)}).invoke(main, line)
    assert result.exit_code == 2 and "sm_90: tensorrt-rtx builds for" in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_plans_are_added(tmp_path):
    """Of a tiny FLUX for several sizes: text encoders, blocks with attention and rotation, convolutions, sums; for all
    that it lists.
    """
    pytest.importorskip("tensorrt_rtx")
    folder, reporter = Path(shutil.copytree(GOLDEN, tmp_path / "flux")), Recorder()
    (added,) = engines.build(folder, ("tensorrt-rtx",), ("sm_120",), reporter)
    manifest = read_manifest(folder).manifest
    assert manifest.engines[-1].stages["embed"] == f"{added}/embed.plan"
    assert reporter.seen[-1][:2] == ("build tensorrt-rtx", "plans for sm_120")
    plans = len(manifest.stages) + len(combinations(manifest))
    assert reporter.seen[-1][2] == reporter.seen[-1][3] == len(manifest.engines[-1].layers) == plans
    profile = {"batch": (1, 1, 4), "height": (16, 16, 24), "width": (16, 16, 16), "max_sequence_length": (4, 6, 6)}
    assert manifest.engines[-1].profile == profile
