"""The small artifact, once for reading and anew for tests that damage it."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path

import pytest

_spec = importlib.util.spec_from_file_location("small_artifact", Path(__file__).with_name("small.py"))
assert _spec is not None and _spec.loader is not None
small = sys.modules.setdefault("small_artifact", importlib.util.module_from_spec(_spec))
_spec.loader.exec_module(small)


@pytest.fixture(scope="session")
def artifact_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be changed."""
    return small.write_artifact(tmp_path_factory.mktemp("artifacts") / "small")


@pytest.fixture
def damaged(artifact_folder: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(artifact_folder, tmp_path / "small"))
