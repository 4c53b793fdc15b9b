"""Compiler and runtime meet in the schemas: neither imports the other, and the schemas import neither."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def imported(path: Path) -> set[str]:
    """Names of the modules that a file imports from the project."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return plain | {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}


@pytest.mark.parametrize(
    ("package", "others"),
    [("compiler", ("runtime",)), ("runtime", ("compiler",)), ("schemas", ("compiler", "runtime"))],
)
def test_a_package_imports_none_that_it_must_not(package, others):
    found = {str(path.relative_to(ROOT)): imported(path) for path in sorted((ROOT / package).rglob("*.py"))}
    assert found
    wrong = [(path, name) for path, names in found.items() for name in names
             if name.startswith(tuple(f"otcache.{other}" for other in others))]  # fmt: skip
    assert not wrong
