"""The small artifact, once for reading and anew for tests that damage it."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path

import pytest


def _helper(name: str, file: str):
    """A module beside this file, importable by its name from every test."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(file))
    assert spec is not None and spec.loader is not None
    module = sys.modules.setdefault(name, importlib.util.module_from_spec(spec))
    spec.loader.exec_module(module)
    return module


small = _helper("small_artifact", "small.py")
_helper("host_device", "host_device.py")
_helper("sized_artifact", "sized_small.py")


@pytest.fixture(scope="session")
def artifact_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be changed."""
    return small.write_artifact(tmp_path_factory.mktemp("artifacts") / "small")


@pytest.fixture
def damaged(artifact_folder: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(artifact_folder, tmp_path / "small"))
