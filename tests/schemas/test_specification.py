"""What schemas/README.md says in numbers and examples is what the code does; its rules, written again from its text."""

from __future__ import annotations

import json
import re
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal, localcontext
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from otcache.runtime.artifact import limits
from otcache.runtime.artifact import onnx_references as onnx_files
from otcache.schemas import consistency, manifest, program, signature, strict_json, structure, tokenizer_file
from otcache.schemas.digest import canonical_json, digest_of_value
from otcache.schemas.migrations import MIGRATIONS

TEXT = (Path(__file__).parents[2] / "schemas" / "README.md").read_text(encoding="utf-8")
FLAT = " ".join(TEXT.split())


def spaced(number):
    return f"{number:,}".replace(",", " ")


@pytest.mark.parametrize(
    "words",
    [
        f"# The artifact format, version {manifest.SCHEMA_VERSION}",
        f"at most {manifest.MAX_MANIFEST_BYTES >> 20} MiB ({spaced(manifest.MAX_MANIFEST_BYTES)} bytes)",
        f"more than {spaced(strict_json.MAX_VALUES)} commas",
        f"nesting deeper than {strict_json.MAX_DEPTH} ",
        f"of at most {signature.MAX_SIGNATURE_BYTES} bytes",
        f"(here: {spaced(onnx_files.MAX_FIELDS)} fields)",
        f"at most {spaced(limits.DEFAULT)} bytes",
        f"at most {spaced(tokenizer_file.MAX_TOKENIZER_BYTES)} bytes",
        f"at most {tokenizer_file.MAX_EXPANSION} bytes",
        f"MUST have at most {spaced(consistency.MAX_ONNX_BYTES)} bytes",
        f"the ASCII text `{signature.PREFIX[:-1].decode()}`, one zero byte",
        *(f"`{name}`" for name in sorted(consistency.RESERVED)),
        *(f"| 1.{minor} |" for minor in range(manifest.SCHEMA_MINOR + 1)),
    ],
)
def test_numbers_are_those_of_the_code(words):
    assert words in FLAT


def test_limits_that_the_text_names_as_powers():
    assert range(-(2**63), 2**64) == strict_json.INTEGERS and consistency.MAX_ELEMENTS == 2**40
    assert signature.PREFIX.endswith(b"\0") and set(MIGRATIONS) == set(range(manifest.SCHEMA_MINOR))
    schema = json.loads((Path(__file__).parents[2] / "schemas" / "manifest.schema.json").read_text())["$defs"]["Step"]
    assert schema["properties"]["residual_coefs"]["maxItems"] == 16
    assert schema["properties"]["output_coefs"]["maxItems"] == 64
    assert program.Step.model_fields["timestep"].annotation is not None
    assert schema["properties"]["timestep"]["maximum"] == 10**6


def test_path_pattern_is_that_of_the_code():
    (pattern,) = re.findall(r"`(\[A-Za-z0-9_\]\(.*?\)\?)`", TEXT)
    assert structure._PART.pattern == pattern.replace("(", "(?:") + r"\Z"


def test_vector():
    value, form, digest = re.search(
        r"Test vector: `(.*?)` has.*?`(.*?)` and the digest.*?`(.*?)`", TEXT, re.DOTALL
    ).groups()
    assert canonical_json(json.loads(value)).decode() == form and digest_of_value(json.loads(value)) == digest


# --- the canonical form, from its text
# ------------------------------------------------------------------------------------

SHORT = {'"': '\\"', "\\": "\\\\", "\b": "\\b", "\f": "\\f", "\n": "\\n", "\r": "\\r", "\t": "\\t"}


def written(value):
    """By the rules of the section "Digests", without the json module."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str):
        return '"' + "".join(SHORT.get(c, f"\\u{ord(c):04x}" if ord(c) < 0x20 else c) for c in value) + '"'
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return written_float(value)
    if isinstance(value, list):
        return "[" + ",".join(map(written, value)) + "]"
    keys = sorted(value, key=lambda key: [ord(char) for char in key])
    return "{" + ",".join(f"{written(key)}:{written(value[key])}" for key in keys) + "}"


def written_float(value):
    sign = "-" if str(value).startswith("-") else ""
    if value == 0:
        return sign + "0.0"
    shortest = next(found for found in (read_back(abs(value), figures) for figures in range(1, 18)) if found)
    closest = min(shortest, key=lambda decimal: abs(decimal - Decimal(abs(value))))
    e, figures = closest.adjusted(), "".join(map(str, closest.as_tuple().digits)).rstrip("0")
    if -4 <= e < 16:
        plain = format(Decimal(figures).scaleb(e - len(figures) + 1), "f")
        return sign + (plain if "." in plain else plain + ".0")
    return f"{sign}{figures[0]}{'.' + figures[1:] if figures[1:] else ''}e{'-' if e < 0 else '+'}{abs(e):02d}"


def read_back(value, figures):
    """Decimals of so many figures, next to the value from below and above, that are the same binary64.

    The nearer one of a power of two may be another number: its neighbour below is half as far away as the one above.
    """
    exact = Decimal(value)
    unit = Decimal(1).scaleb(exact.adjusted() - figures + 1)
    with localcontext() as context:
        context.prec = 1100
        sides = [exact.quantize(unit, rounding) for rounding in (ROUND_FLOOR, ROUND_CEILING)]
    return [decimal for decimal in sides if float(decimal) == value]


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=("Cs",))),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(exclude_categories=("Cs",))), inner),
    max_leaves=10,
)


@given(VALUES)
@example(
    [
        1e16,
        1e15,
        1e-4,
        9.9e-5,
        123456.7,
        1.5e16,
        5e-324,
        -0.0,
        1.7976931348623157e308,
        0.1,
        2.0**53,
        1e22,
        1e23,
        2.0**-24,
    ]
)
@example({"\ue000": 1, "\U0001f600": 2, "a": "\x7f\x1f\u2028/"})
def test_canonical_form(value):
    assert canonical_json(value).decode() == written(value)
