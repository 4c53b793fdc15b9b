"""Everything in a manifest is bounded, and the specification says by what: the JSON schema, walked whole."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from otcache.schemas.manifest import Manifest

SCHEMA = Manifest.model_json_schema()
TEXT = (Path(__file__).parents[2] / "schemas" / "README.md").read_text(encoding="utf-8")
BOUNDED_BY = {
    "integer": [("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")],
    "number": [("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")],
    "string": [("maxLength", "pattern", "enum", "const")],
    "array": [("maxItems",)],
    "object": [("maxProperties", "properties")],
    "boolean": [],
    "null": [],
}
"""Of a type, the words of JSON schema of which one of each group has to be there."""
UNBOUNDED = {"Sampler.config"}
"""Only the manifest's own size bounds them."""


def parts(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A field's type and those inside it, but for the classes that it refers to."""
    yield node
    inner = [*node.get("anyOf", []), *node.get("prefixItems", []), *node.get("patternProperties", {}).values()]
    inner += [node[key] for key in ("items", "additionalProperties") if isinstance(node.get(key), dict)]
    for part in inner:
        yield from parts(part)


FIELDS = {
    f"{name}.{field}": value
    for name, holder in {"Manifest": SCHEMA, **SCHEMA["$defs"]}.items()
    for field, value in holder.get("properties", {}).items()
}


@pytest.mark.parametrize("name", sorted(set(FIELDS) - UNBOUNDED))
def test_every_field_is_bounded(name):
    for part in parts(FIELDS[name]):
        for words in BOUNDED_BY[part["type"]] if "type" in part else []:
            assert any(word in part for word in words), f"{name} lacks one of {words}: {part}"


def shown(limit: float) -> str:
    """A limit as the specification writes it: large powers of two as such."""
    bits = abs(int(limit)).bit_length() - 1
    return f"{'-' * (limit < 0)}2^{bits}" if bits > 16 and abs(limit) == 1 << bits else f"{limit:g}"


def numbers() -> dict[str, str]:
    """The limits of every number, by class and field."""
    found = {}
    for name, field in FIELDS.items():
        for part in parts(field):
            if part.get("type") in ("integer", "number"):
                low = part.get("minimum", part.get("exclusiveMinimum"))
                high = part["maximum"] if "maximum" in part else part["exclusiveMaximum"]
                found[name] = f"{shown(low)} to {shown(high)}{' without it' * ('exclusiveMaximum' in part)}"
    return found


def test_the_specification_says_of_every_number_what_bounds_it():
    section = TEXT.partition("\n## Limits\n")[2].partition("\n## ")[0]
    said = {}
    for cell, limits, also in re.findall(r"^\| (`.*?`) \| (.*?) \| (.*?) \|$", section, re.MULTILINE):
        holder, *fields = re.findall(r"`(.*?)`", cell)
        said |= {f"{holder}.{field}": limits for field in fields}
        assert also
    assert said == numbers()
