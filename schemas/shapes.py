"""Sizes that a request may choose, and how dimensions follow from them. `schemas/README.md`, "Sizes".

A request chooses a value on each *axis* (`height`, `width`, `num_frames`, `max_sequence_length`). Every dimension that
varies with it follows a *symbol*: a sum of products of axes over a divisor, such as `height*width/256`, in which no
axis is squared. Such a function is largest and smallest at corners of the ranges, so that checking the corners bounds
it everywhere.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Annotated, Literal

from pydantic import Field, model_validator

from .program import Frozen

AxisName = Literal["height", "width", "num_frames", "max_sequence_length"]
MAX_EXTENT = 1 << 16
Extent = Annotated[int, Field(ge=1, le=MAX_EXTENT)]
"""Of a request along one axis: pixels, frames or text tokens."""
Factor = Annotated[int, Field(ge=-(1 << 40), le=1 << 40)]
SymbolName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_.]*$", max_length=128)]
Symbols = tuple[SymbolName | None, ...]
"""Of each dimension of a shape the symbol that it follows; None for one that stays. Empty where all stay."""
Request = Mapping[AxisName, int]
"""A value for every axis."""


class Axis(Frozen):
    """What a request may choose: minimum, minimum + step, … maximum."""

    name: AxisName
    minimum: Extent
    maximum: Extent
    step: Extent

    @model_validator(mode="after")
    def _consistent(self) -> Axis:
        if self.maximum not in self or self.maximum < self.minimum:
            raise ValueError(f"axis {self.name} is {self}: expected steps that lead from one to the other")
        return self

    def __contains__(self, value: int) -> bool:
        return self.minimum <= value <= self.maximum and (value - self.minimum) % self.step == 0

    def __str__(self) -> str:
        if self.minimum == self.maximum:
            return str(self.minimum)
        return f"{self.minimum} to {self.maximum} in steps of {self.step}"


class Term(Frozen):
    """A factor times the product of some axes, each taken once."""

    factor: Factor
    axes: tuple[AxisName, ...] = Field(default=(), max_length=4)

    @model_validator(mode="after")
    def _consistent(self) -> Term:
        if len(set(self.axes)) != len(self.axes):
            raise ValueError(f"a term has axes {self.axes}: expected each once")
        return self


class Symbol(Frozen):
    """A size that follows from a request: Σ terms / divisor."""

    name: SymbolName
    terms: tuple[Term, ...] = Field(min_length=1, max_length=16)
    divisor: Annotated[int, Field(ge=1, le=1 << 31)] = 1

    def size(self, request: Request) -> int:
        """The size at a request. Raises ValueError where it is no whole number from 1 to 2³¹.

        >>> tokens = Symbol(name="tokens", terms=(Term(factor=1, axes=("height", "width")),), divisor=256)
        >>> str(tokens), tokens.size({"height": 512, "width": 768})
        ('height*width/256', 1536)
        """
        total = 0
        for term in self.terms:
            product = term.factor
            for axis in term.axes:
                product *= request[axis]
            total += product
        size, rest = divmod(total, self.divisor)
        if rest or not 1 <= size <= 1 << 31:
            raise ValueError(f"symbol {self.name} ({self}) is {total / self.divisor:g} at {describe_size(request)}")
        return size

    def __str__(self) -> str:
        text = ""
        for term in self.terms:
            factors = [*([str(abs(term.factor))] if abs(term.factor) != 1 or not term.axes else []), *term.axes]
            sign = ("-" if term.factor < 0 else "") if not text else " - " if term.factor < 0 else " + "
            text += sign + "*".join(factors)
        if self.divisor == 1:
            return text
        return f"({text})/{self.divisor}" if len(self.terms) > 1 else f"{text}/{self.divisor}"


def describe_size(request: Request) -> str:
    """A request in words, with as many of the axes as there are.

    >>> describe_size({"height": 512, "width": 768, "num_frames": 16, "max_sequence_length": 77})
    '512x768, 16 frames, 77 tokens'
    """
    parts = []
    if "height" in request and "width" in request:
        parts.append(f"{request['height']}x{request['width']}")
    else:
        parts += [f"{name} {request[name]}" for name in ("height", "width") if name in request]  # type: ignore[index]
    if "num_frames" in request:
        parts.append(f"{request['num_frames']} frames")
    if "max_sequence_length" in request:
        parts.append(f"{request['max_sequence_length']} tokens")
    return ", ".join(parts)


def corners(axes: tuple[Axis, ...]) -> Iterator[dict[AxisName, int]]:
    """Every combination of smallest and largest values.

    >>> list(corners((Axis(name="height", minimum=16, maximum=32, step=16),)))
    [{'height': 16}, {'height': 32}]
    """
    for values in itertools.product(*({axis.minimum: 0, axis.maximum: 0} for axis in axes)):
        yield {axis.name: value for axis, value in zip(axes, values, strict=True)}
