"""Sizes as functions of a request: from what was seen at some points, the formulas that hold at all of them.

A size that a pipeline or a graph has at several requests becomes a `Symbol` of the manifest: the sum of fewest products
of axes that gives every value exactly. In rational arithmetic; at the corners of ranges such a formula is the only one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction

import numpy as np

from otcache.schemas.errors import ModelError
from otcache.schemas.shapes import AxisName, Request, Symbol, Term, describe_size

MOST_TERMS = 4
LETTERS: dict[AxisName, str] = {"height": "h", "width": "w", "num_frames": "f", "max_sequence_length": "t"}
"""Of axes in the names of symbols."""


class SymbolBook:
    """The symbols of one artifact. `points` are the requests at which sizes are seen.

    >>> book = SymbolBook([{"height": 512, "width": 512}, {"height": 768, "width": 512}, {"height": 512, "width": 256}])
    >>> tokens = book.of([1024, 1536, 512])
    >>> tokens.name, tokens.divisor, [(term.factor, term.axes) for term in tokens.terms]
    ('hw_by_256', 256, [(1, ('height', 'width'))])
    >>> book.of([3072, 3072, 3072]) is None
    True
    """

    def __init__(self, points: Sequence[Request]) -> None:
        self.points = tuple(points)
        self.axes: tuple[AxisName, ...] = tuple(
            name for name in (points[0] if points else ()) if len({point[name] for point in points}) > 1
        )
        self._found: dict[tuple[int, ...], Symbol] = {}

    @property
    def symbols(self) -> tuple[Symbol, ...]:
        """In the order in which they were first asked for."""
        return tuple(self._found.values())

    def of(self, sizes: Sequence[int], subject: str = "a size") -> Symbol | None:
        """The symbol of a dimension that has `sizes` at the points; None for one that stays. Raises ModelError."""
        key = tuple(sizes)
        if len(set(key)) == 1:
            return None
        if key not in self._found:
            terms = self._terms(key, subject)
            divisor = math.lcm(*(factor.denominator for factor in terms.values()))
            self._found[key] = Symbol(
                name=_name(terms, divisor),
                divisor=divisor,
                terms=tuple(Term(factor=int(factor * divisor), axes=axes) for axes, factor in terms.items()),
            )
        return self._found[key]

    def shape(self, shapes: Sequence[Sequence[int]], subject: str) -> list[str | None]:
        """Names of the symbols of each dimension of a shape that was seen at the points; empty where all stay."""
        if len({len(shape) for shape in shapes}) != 1:
            raise ModelError(f"{subject} is {shapes[0]} and {shapes[-1]}: expected as many dimensions at every size")
        found = [self.of(sizes, subject) for sizes in zip(*shapes, strict=True)]
        return [symbol.name if symbol else None for symbol in found] if any(found) else []

    def _terms(self, sizes: tuple[int, ...], subject: str) -> dict[tuple[AxisName, ...], Fraction]:
        products = [axes for count in range(1, len(self.axes) + 1) for axes in itertools.combinations(self.axes, count)]
        products.append(())
        for count in range(1, MOST_TERMS + 1):
            for chosen in itertools.combinations(products, count):
                rows = [[math.prod(point[name] for name in axes) for axes in chosen] for point in self.points]
                if _nearly(rows, sizes) and (factors := _solve(rows, sizes)):
                    return dict(zip(chosen, factors, strict=True))
        seen = "; ".join(f"{size} at {describe_size(point)}" for size, point in zip(sizes, self.points, strict=True))
        raise ModelError(f"{subject} is {seen}: expected a sum of products of {', '.join(self.axes)}; list fewer sizes")


def _name(terms: Mapping[tuple[AxisName, ...], Fraction], divisor: int) -> str:
    """A name that says what a symbol is, so that the same size has the same name in every file.

    >>> _name({("max_sequence_length",): Fraction(1), (): Fraction(77)}, 1)
    't_plus_77'
    """
    text = ""
    for axes, factor in terms.items():
        number = abs(int(factor * divisor))
        sign = "minus_" if factor < 0 else "plus_" if text else ""
        letters = "".join(LETTERS[axis] for axis in axes)
        text += f"{'_' if text else ''}{sign}{letters}" + (f"_times_{number}" if letters and number != 1 else "")
        text += "" if letters else str(number)
    return text + (f"_by_{divisor}" if divisor != 1 else "")


def _nearly(rows: Sequence[Sequence[int]], wanted: Sequence[int]) -> bool:
    """Whether there may be an x with rows · x = wanted: in floating point, which is quick.

    >>> _nearly([[1, 1], [2, 1], [3, 1]], [3, 5, 7]), _nearly([[1, 1], [2, 1], [3, 1]], [3, 5, 8])
    (True, False)
    """
    a, b = np.asarray(rows, np.float64), np.asarray(wanted, np.float64)
    a = a / np.abs(a).max(0)
    return bool(np.abs(a @ np.linalg.lstsq(a, b)[0] - b).max() < 1e-6 * np.abs(b).max())


def _solve(rows: Sequence[Sequence[int]], wanted: Sequence[int]) -> list[Fraction] | None:
    """The x, none of it zero, with rows · x = wanted; None if there is none or more than one.

    >>> _solve([[1, 1], [2, 1], [3, 1]], [3, 5, 7])
    [Fraction(2, 1), Fraction(1, 1)]
    >>> _solve([[1, 2], [2, 4]], [3, 6]) is None
    True
    """
    table = [[Fraction(value) for value in (*row, size)] for row, size in zip(rows, wanted, strict=True)]
    count = len(rows[0])
    for column in range(count):
        pivot = next((row for row in range(column, len(table)) if table[row][column]), None)
        if pivot is None:
            return None
        table[column], table[pivot] = table[pivot], table[column]
        table[column] = [value / table[column][column] for value in table[column]]
        for row in range(len(table)):
            if row != column and table[row][column]:
                factor = table[row][column]
                table[row] = [a - factor * b for a, b in zip(table[row], table[column], strict=True)]
    found = [table[row][count] for row in range(count)]
    return found if all(found) and not any(row[count] for row in table[count:]) else None
