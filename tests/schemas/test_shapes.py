"""Symbols as the specification describes them: whole, bounded by their corners, and what an artifact at a size is."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from pydantic import ValidationError

from otcache.schemas.shapes import Axis, Symbol, Term, corners, describe_size

NAMES = ("height", "width", "num_frames", "max_sequence_length")


def axis(name, minimum, maximum, step):
    return Axis(name=name, minimum=minimum, maximum=maximum, step=step)


def test_an_axis_holds_its_steps_only():
    sides = axis("height", 16, 64, 16)
    assert [value for value in range(100) if value in sides] == [16, 32, 48, 64]
    assert str(sides) == "16 to 64 in steps of 16" and str(axis("width", 8, 8, 1)) == "8"
    for minimum, maximum, step in ((16, 60, 16), (64, 16, 16), (0, 8, 1), (8, 16, 0), (8, 1 << 32, 8)):
        with pytest.raises(ValidationError):
            axis("height", minimum, maximum, step)


def test_a_symbol_says_what_it_is_and_refuses_what_is_not_whole():
    tokens = Symbol(name="n", terms=(Term(factor=1, axes=("height", "width")), Term(factor=256 * 77)), divisor=256)
    assert str(tokens) == "(height*width + 19712)/256"
    assert tokens.size({"height": 512, "width": 256}) == 512 + 77
    frames = Symbol(name="f", terms=(Term(factor=1, axes=("num_frames",)), Term(factor=-1)), divisor=4)
    assert str(frames) == "(num_frames - 1)/4" and frames.size({"num_frames": 17}) == 4
    for value in (16, 1):
        with pytest.raises(ValueError, match=rf"symbol f \(\(num_frames - 1\)/4\) is [\d.]+ at {value} frames"):
            frames.size({"num_frames": value})
    with pytest.raises(ValidationError, match="each once"):
        Term(factor=1, axes=("height", "height"))


@given(
    st.lists(st.tuples(st.integers(-50, 50), st.sets(st.sampled_from(NAMES)).map(tuple)), min_size=1, max_size=6),
    st.lists(st.tuples(st.integers(1, 9), st.integers(0, 3)), min_size=4, max_size=4),
)
def test_corners_bound_a_symbol(terms, ranges):
    """The reason why a reader may check corners alone."""
    axes = tuple(axis(name, low, low + count, 1) for name, (low, count) in zip(NAMES, ranges, strict=True))
    symbol = Symbol(name="n", terms=tuple(Term(factor=factor, axes=names) for factor, names in terms))
    try:
        ends = [symbol.size(corner) for corner in corners(axes)]
    except ValueError:
        assume(False)
    for values in itertools.product(*(range(one.minimum, one.maximum + 1) for one in axes)):
        assert min(ends) <= symbol.size(dict(zip(NAMES, values, strict=True))) <= max(ends)


def test_sizes_are_named_as_people_write_them():
    size = {"height": 512, "width": 768, "num_frames": 17, "max_sequence_length": 77}
    assert describe_size(size) == "512x768, 17 frames, 77 tokens"
    assert describe_size({"height": 512}) == "height 512"
