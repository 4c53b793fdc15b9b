"""Every example in a docstring of the project runs, and gives what it says."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
HOUSES = ("artifacts", "compiler", "runtime", "schemas")


def modules_with_examples() -> list[str]:
    """Dotted names of the files that have an example."""
    paths = [path for house in HOUSES for path in sorted((ROOT / house).rglob("*.py"))]
    found = [path.relative_to(ROOT).with_suffix("") for path in paths if ">>> " in path.read_text(encoding="utf-8")]
    return sorted({".".join(("otcache", *path.parts)).removesuffix(".__init__") for path in found})


@pytest.mark.parametrize("name", modules_with_examples())
def test_examples_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(name)
    with np.printoptions(precision=6, suppress=True):
        results = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert results.attempted, f"{name} has `>>>` in no docstring that is looked at"
    assert not results.failed


def test_examples_are_found():
    assert {"otcache.compiler.sizes.symbols", "otcache.artifacts.training.flow"} <= set(modules_with_examples())


def test_wrong_examples_fail():
    """The runner compares: a module with a wrong example is told from one without."""
    parsed = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3\n", {}, "wrong", None, None)
    assert doctest.DocTestRunner(verbose=False).run(parsed, out=lambda _: None).failed == 1
