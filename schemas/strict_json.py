"""JSON from outside, read so that no two readers can disagree about it and no input can exhaust the reader.

In this order: UTF-8, number of values, depth, then a parser that refuses a key that comes twice in one object, `NaN`
and the infinities, floats beyond the range of float64 and integers beyond 64 bits. Every refusal is one ArtifactError.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

from .messages import damage_error, one_line

MAX_DEPTH = 32
"""Deepest nesting; written manifests have 8."""
MAX_VALUES = 1 << 21
"""Commas, brackets and braces in the text; 16 MiB of them would take gigabytes once parsed."""
INTEGERS = range(-(1 << 63), 1 << 64)

_STRUCTURE = re.compile(r'\\.|["\[\]{}]', re.DOTALL)


def parse_object(data: bytes, name: str) -> dict[str, Any]:
    """The JSON object in `data`; `name` is what messages call it. Raises ArtifactError.

    >>> parse_object(b'{"a": [1, 1.0]}', "a.json")
    {'a': [1, 1.0]}
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise damage_error(name, f"byte 0x{data[error.start]:02x} at {error.start}", "UTF-8") from None
    if sum(map(text.count, ",[{")) > MAX_VALUES:
        raise damage_error(name, f"more than {MAX_VALUES} values", "fewer")
    _check_depth(text, name)
    try:
        value = json.loads(
            text,
            object_pairs_hook=_unique_pairs,
            parse_constant=_refuse_constant,
            parse_float=_finite_float,
            parse_int=_integer,
        )
    except ValueError as error:
        raise damage_error(name, one_line(error), "valid JSON") from None
    if not isinstance(value, dict):
        raise damage_error(name, f"a JSON {type(value).__name__}", "a JSON object")
    return value


def _check_depth(text: str, name: str) -> None:
    """One pass over brackets and quotes, before a recursive parser sees the text."""
    depth, in_string = 0, False
    for match in _STRUCTURE.finditer(text):
        mark = match.group()
        if mark == '"':
            in_string = not in_string
        elif not in_string and len(mark) == 1:
            depth += 1 if mark in "[{" else -1
            if depth > MAX_DEPTH:
                found = f"more than {MAX_DEPTH} levels at character {match.start()}"
                raise damage_error(name, found, f"at most {MAX_DEPTH} levels")


def _unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} twice")
    return result


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"number {name}")


def _finite_float(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"number {text[:32]}, which is out of range")
    return number


def _integer(text: str) -> int:
    if len(text) > 20 or (number := int(text)) not in INTEGERS:
        raise ValueError(f"number {text[:32]}, which is out of range")
    return number
