"""Which sizes a user asks for beside the one that is compiled: `--sizes`, `--frame-counts`, `--text-lengths`.

Each is a list, `512x512,768x512`, or a range with its step, `256x256:1024x1024:64`; heights come first.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from otcache.schemas.errors import UsageError
from otcache.schemas.shapes import Axis, AxisName, corners

FORMS = "a list such as {0},{1}, or a range with its step such as {0}:{1}:{2}"
Point = dict[AxisName, int]


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """Sizes to serve: those listed, or all within ranges."""

    axes: tuple[Axis, ...] = ()
    listed: tuple[Point, ...] = ()
    """Empty for ranges."""

    def served(self, own: Point) -> tuple[Point, ...]:
        """Every size of a list; of ranges their corners."""
        return tuple({**own, **point} for point in self.listed or corners(self.axes))

    def probed(self, own: Point) -> tuple[Point, ...]:
        """Where to look how sizes follow: the own size first, what is served, each axis on its own, and a step of each
        range.
        """
        alone: list[Point] = []
        for axis in self.axes:
            values = {point[axis.name] for point in self.served(own)}
            if not self.listed and axis.minimum + axis.step <= axis.maximum:
                values.add(axis.minimum + axis.step)
            alone += [{**own, axis.name: value} for value in sorted(values)]
        found: list[Point] = []
        for point in (own, *alone, *self.served(own)):
            if point not in found:
                found.append(point)
        return tuple(found)

    def without(self, dropped: set[AxisName], own: Point) -> Wanted:
        """With some axes at the own size only."""
        if not self.listed:
            return Wanted(axes=tuple(axis for axis in self.axes if axis.name not in dropped))
        left = [point for point in self.listed if all(point[name] == own[name] for name in dropped & set(point))]
        listed = tuple({name: value for name, value in point.items() if name not in dropped} for point in left)
        return Wanted(axes=tuple(span_axes(listed)), listed=listed) if len(listed) > 1 else Wanted()


def wanted_from_options(own: Point, *, sizes: str | None, frame_counts: str | None, text_lengths: str | None) -> Wanted:
    """Parse what the options ask for; the own size is always included.

    >>> own = {"height": 512, "width": 512}
    >>> wanted_from_options(own, sizes="768x512", frame_counts=None, text_lengths=None).listed
    ({'height': 512, 'width': 512}, {'height': 768, 'width': 512})
    >>> [height, _] = wanted_from_options(own, sizes="256x256:1024x1024:64", frame_counts=None, text_lengths=None).axes
    >>> height.minimum, height.maximum, height.step
    (256, 1024, 64)

    Args:
        own: the size that is compiled, on the axes that the pipeline has.
        sizes: `--sizes`, heights and widths in pixels.
        frame_counts: `--frame-counts`.
        text_lengths: `--text-lengths`, in tokens.

    Raises:
        UsageError: text that is neither a list nor a range, or an axis that the pipeline does not have.
    """
    options: list[tuple[str, str | None, tuple[AxisName, ...], str]] = [
        ("--sizes", sizes, ("height", "width"), FORMS.format("512x512", "768x768", 64)),
        ("--frame-counts", frame_counts, ("num_frames",), FORMS.format("17", "33", 4)),
        ("--text-lengths", text_lengths, ("max_sequence_length",), FORMS.format("128", "512", 64)),
    ]
    given = [(option, text, names, forms) for option, text, names, forms in options if text is not None]
    for option, _, names, _ in given:
        if missing := [name for name in names if name not in own]:
            raise UsageError(f"{option} is given, but this pipeline takes no {missing[0]}: leave it out")
    ranges = [each for each in given if ":" in str(each[1])]
    if ranges and len(ranges) < len(given):
        raise UsageError(
            f"{ranges[0][0]} is a range and {next(each[0] for each in given if each not in ranges)} a list: expected "
            "all to be one or the other, because a list is served as listed"
        )
    if ranges:
        return Wanted(axes=tuple(axis for each in given for axis in _range(own, *each)))
    lists = [_list(own, *each) for each in given]
    listed = tuple(_merge(parts) for parts in itertools.product(*lists)) if lists else ()
    return Wanted(axes=tuple(span_axes(listed)), listed=listed)


def asked_sizes(
    *, sizes: str | None, frame_counts: str | None, text_lengths: str | None
) -> Iterator[tuple[str, Point]]:
    """(option, size) of everything that is listed, and of both ends of ranges, whatever the pipeline is; text that is
    neither is left to `wanted_from_options`.

    >>> list(asked_sizes(sizes="256x256:512x768:64", frame_counts=None, text_lengths="77"))[1:]
    [('--sizes', {'height': 512, 'width': 768}), ('--text-lengths', {'max_sequence_length': 77})]
    """
    options: tuple[tuple[str, str | None, tuple[AxisName, ...]], ...] = (
        ("--sizes", sizes, ("height", "width")),
        ("--frame-counts", frame_counts, ("num_frames",)),
        ("--text-lengths", text_lengths, ("max_sequence_length",)),
    )
    for option, text, names in options:
        parts = [] if text is None else text.split(":")[:2] if ":" in text else text.split(",")
        for part in parts:
            with contextlib.suppress(UsageError):
                yield option, _values(part, option, str(text), names, "")


def _list(own: Point, option: str, text: str, names: tuple[AxisName, ...], forms: str) -> list[Point]:
    found = [_values(part, option, text, names, forms) for part in text.split(",")]
    mine = {name: own[name] for name in names}
    return [mine, *(point for position, point in enumerate(found) if point != mine and point not in found[:position])]


def _range(own: Point, option: str, text: str, names: tuple[AxisName, ...], forms: str) -> Iterator[Axis]:
    low, high, step = (*text.split(":"), "")[:3] if text.count(":") == 2 else ("", "", "")
    if not step.isdecimal() or not int(step):
        raise UsageError(f"{option} is {text!r}: expected {forms}")
    first, last = _values(low, option, text, names, forms), _values(high, option, text, names, forms)
    for name in names:
        if last[name] < first[name] or (last[name] - first[name]) % int(step):
            raise UsageError(
                f"{option} is {text!r}: expected steps of {step} that lead from {first[name]} to {last[name]}"
            )
        axis = Axis(name=name, minimum=first[name], maximum=last[name], step=int(step))
        if own[name] not in axis:
            raise UsageError(
                f"{option} is {text!r}, and {name} is {own[name]}: expected the size that is compiled within it"
            )
        yield axis


def _values(part: str, option: str, text: str, names: tuple[AxisName, ...], forms: str) -> Point:
    numbers = part.strip().split("x")
    if len(numbers) != len(names) or not all(number.isdecimal() and int(number) for number in numbers):
        raise UsageError(f"{option} is {text!r}: expected {forms}")
    return dict(zip(names, map(int, numbers), strict=True))


def _merge(parts: tuple[Point, ...]) -> Point:
    """One size of parts on different axes."""
    merged: Point = {}
    for part in parts:
        merged |= part
    return merged


def span_axes(listed: tuple[Point, ...]) -> Iterator[Axis]:
    """The ranges that listed sizes span, with the largest step that reaches them all.

    >>> [axis] = span_axes(({"num_frames": 17}, {"num_frames": 33}, {"num_frames": 25}))
    >>> axis.minimum, axis.maximum, axis.step
    (17, 33, 8)
    """
    for name in listed[0] if listed else ():
        values = sorted({point[name] for point in listed})
        step = math.gcd(*(value - values[0] for value in values)) or 1
        yield Axis(name=name, minimum=values[0], maximum=values[-1], step=step)
