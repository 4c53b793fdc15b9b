"""The shape of the house: which room may import which is the table in each README, and no imports go in a circle."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HOUSES = ("compiler", "runtime", "schemas")
Module = tuple[str, ...]


def module_of(path: Path) -> Module:
    """`compiler/graph/cut.py` → ("compiler", "graph", "cut"); a package is called like its folder."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


FILES = {module_of(path): path for house in HOUSES for path in sorted((ROOT / house).rglob("*.py"))}


def imports_of(module: Module) -> Iterator[Module]:
    """Modules of the project that a file imports, at its top or inside a function."""
    path = FILES[module]
    package = module if path.name == "__init__.py" else module[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
            yield from (tuple(name[1:]) for name in names if name[0] == "otcache")
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                base = package[: len(package) - node.level + 1]
            elif (node.module or "").split(".")[0] == "otcache":
                base = ()
            else:
                continue
            named = tuple((node.module or "").split(".")) if node.module else ()
            base += named if node.level else named[1:]
            for alias in node.names:
                yield (*base, alias.name) if (*base, alias.name) in FILES else base


EDGES = {module: {found for found in imports_of(module) if found != module} for module in FILES}


def room_of(module: Module) -> str:
    """`compiler/graph`; `compiler/.` for a file of the folder itself; `schemas` as a whole."""
    if module[0] == "schemas":
        return "schemas"
    inside = len(module) > 2 or FILES[module].name == "__init__.py"
    return "/".join(module[:2]) if inside and len(module) > 1 else f"{module[0]}/."


def front_door(module: Module) -> bool:
    """`otcache.compiler` and `otcache.runtime` themselves offer what rooms make, and are used by no room."""
    return len(module) == 1


def table(house: str) -> dict[str, set[str]]:
    """Of a house's README, the table that begins with `| room |`: room → rooms that it may use."""
    text = (ROOT / house / "README.md").read_text(encoding="utf-8")
    rows = re.findall(
        r"^\| ([a-z.]+) \| [^|]+ \| ([^|]+) \|$", text[text.index("| room |") :].split("\n\n")[0], re.MULTILINE
    )
    rows = [row for row in rows if row[0] != "room"]
    full = {
        name: name if name == "schemas" else f"{house}/{name}" for row in rows for name in (row[0], *listed(row[1]))
    }
    return {full[name]: {full[other] for other in listed(others)} for name, others in rows}


def listed(cell: str) -> list[str]:
    return [name.strip() for name in cell.split(",")]


TABLES = table("compiler") | table("runtime")


def circles(edges: dict) -> list[list]:
    """Groups of nodes that reach one another (Tarjan)."""
    order: dict = {}
    lowest: dict = {}
    stack: list = []
    found = []

    def visit(node) -> None:
        order[node] = lowest[node] = len(order)
        stack.append(node)
        for other in edges.get(node, ()):
            if other not in order:
                visit(other)
                lowest[node] = min(lowest[node], lowest[other])
            elif other in stack:
                lowest[node] = min(lowest[node], order[other])
        if lowest[node] == order[node]:
            group = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(group) > 1:
                found.append(group)

    for node in list(edges):
        if node not in order:
            visit(node)
    return found


def test_every_room_has_a_row():
    rooms = {room_of(module) for module in FILES if not front_door(module)} - {"schemas"}
    assert rooms == set(TABLES)


@pytest.mark.parametrize("room", sorted(TABLES))
def test_a_room_uses_what_its_row_names(room):
    own = [module for module in FILES if room_of(module) == room and not front_door(module)]
    wrong = [
        f"{'/'.join(module)} imports {'/'.join(other)}"
        for module in own
        for other in EDGES[module]
        if room_of(other) not in TABLES[room] | {room}
    ]
    assert own
    assert not wrong


@pytest.mark.parametrize("room", sorted(TABLES))
def test_a_row_names_no_room_that_is_not_used(room):
    used = {room_of(other) for module in FILES if room_of(module) == room for other in EDGES[module]}
    assert TABLES[room] - used - {f"{room.split('/')[0]}/."} == set()


def test_no_imports_go_in_a_circle():
    assert circles({module: edges for module, edges in EDGES.items() if not front_door(module)}) == []
    assert circles(TABLES) == []


def test_houses_meet_in_the_schemas():
    pairs = {(module[0], other[0]) for module in FILES for other in EDGES[module] if other[0] != module[0]}
    assert pairs == {("compiler", "schemas"), ("runtime", "schemas")}


def test_circles_are_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == [["b", "c"]]
