"""Formulas of sizes: found again from their values, named alike in every file, refused where there is none."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from otcache.compiler.sizes.symbols import SymbolBook
from otcache.schemas.errors import ModelError

RANGES = {"height": (16, 64), "width": (16, 48), "num_frames": (5, 17), "max_sequence_length": (8, 32)}
CORNERS = [dict(zip(RANGES, values, strict=True)) for values in itertools.product(*RANGES.values())]
BETWEEN = {"height": 48, "width": 32, "num_frames": 9, "max_sequence_length": 16}
PRODUCTS = [names for count in range(5) for names in itertools.combinations(RANGES, count)]


def value(terms, point):
    return sum(factor * math.prod(point[name] for name in names) for names, factor in terms.items())


@settings(deadline=None, max_examples=25)
@given(st.dictionaries(st.sampled_from(PRODUCTS), st.integers(1, 40), min_size=1, max_size=3))
def test_what_holds_at_the_corners_holds_between_them(terms):
    assume(any(terms))  # else it is a constant
    symbol = SymbolBook(CORNERS).of([value(terms, point) for point in CORNERS])
    assert symbol.size(BETWEEN) == value(terms, BETWEEN)


def test_names_say_what_a_size_is():
    book = SymbolBook(CORNERS)
    found = {
        "hw_by_256": [point["height"] * point["width"] // 256 for point in CORNERS],
        "t_plus_77": [point["max_sequence_length"] + 77 for point in CORNERS],
        "f_plus_3_by_4": [(point["num_frames"] + 3) // 4 for point in CORNERS],
        "f_minus_1": [point["num_frames"] - 1 for point in CORNERS],
    }
    assert [book.of(sizes).name for sizes in found.values()] == list(found)
    assert book.of([7] * len(CORNERS)) is None
    assert book.shape([(1, 4, point["height"]) for point in CORNERS], "x") == [None, None, "h"]
    assert book.shape([(1, 4)] * len(CORNERS), "x") == []
    assert book.of(found["hw_by_256"]) is book.of(found["hw_by_256"])


def test_a_size_that_no_formula_gives_is_refused():
    squares = [
        point["height"] ** 2 + 1000 * (point["width"] > 20) * (point["num_frames"] > 9) * point["height"]
        for point in CORNERS
    ]
    points = [*CORNERS, BETWEEN]
    with pytest.raises(ModelError, match="tensor 'x' is 256 at 16x16"):
        SymbolBook(points).of([*squares, 48**2], "tensor 'x'")
