"""Where every value of a program lies on the device: one arena, offsets that are a pure function of the manifest
and the request's size, which is that of the manifest that is given (`otcache.schemas.sized`).

Consumes a `Listing`, produces an `AddressPlan`. Values that live from one step into another (latents, outputs,
residuals, conditioning) get slots that stay: caches are kept in place, and latents go back and forth between two. What
lives within a step is packed beside them, at the same offsets in every step of a kind, so that few addresses change
from step to step; only where that takes more than `WORTH_STABILITY` allows, it is packed into slots as well that are
free at that moment.

No two values overlap in memory while both are needed; a launch needs what it reads and what it writes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from otcache.schemas.manifest import Manifest
from otcache.schemas.program import Program

from .backend import DTYPES
from .launches import Listing, Value, list_launches

ALIGNMENT = 256
"""Bytes; TensorRT reads and writes at such addresses."""
MOVES = 8
"""Orders that are tried after each greedy one."""
WORTH_STABILITY = 1.05
"""How much more than the lower bound a plan may take whose steps are alike."""
ITEM_BYTES = {name: np.dtype(dtype).itemsize for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Place:
    """A value in the arena. `first` and `last` are the launches between which, both included, it is there."""

    offset: int
    size_bytes: int
    """A multiple of ALIGNMENT."""
    first: int
    last: int


@dataclass(frozen=True)
class AddressPlan:
    """Offsets of all values of a program in one arena."""

    listing: Listing
    places: dict[Value, Place]
    size_bytes: int
    lower_bound_bytes: int
    """What the values that are needed at once take at least: no plan is smaller."""


def plan_addresses(manifest: Manifest, program: Program, samples: int) -> AddressPlan:
    """The plan of a program for a number of samples at once, at the size that the manifest is for."""
    listing = list_launches(manifest, program)
    lives = _lifetimes(listing)
    sizes = {value: size_of(manifest, listing, value, samples) for value in listing.tensors}
    steps = [launch.step for launch in listing.launches]
    carried = [v for v, (first, last) in lives.items() if steps[first] != _step(steps, last)]
    slots = _carried_slots(carried, lives, sizes)
    held = {value: Place(slots[value], sizes[value], *lives[value]) for value in carried}
    bound = _lower_bound([Place(0, sizes[value], *lives[value]) for value in lives], len(steps))
    plans = []
    for stable in (True, False):
        places = {**held, **_local_places(held, lives, sizes, steps, stable=stable)}
        end = max(place.offset + place.size_bytes for place in places.values())
        plans.append(AddressPlan(listing, places, end, bound))
        if end <= WORTH_STABILITY * bound:
            break
    return min(plans, key=lambda plan: plan.size_bytes)


def _local_places(
    held: dict[Value, Place],
    lives: dict[Value, tuple[int, int]],
    sizes: dict[Value, int],
    steps: Sequence[int],
    *,
    stable: bool,
) -> dict[Value, Place]:
    """Places of all values that live within a step.

    stable: slots count as taken for ever, so that all steps are alike.
    """
    local: dict[int, list[Value]] = {}
    for value, (first, _) in lives.items():
        if value not in held:
            local.setdefault(steps[first], []).append(value)
    taken_for_ever = [Place(place.offset, place.size_bytes, 0, len(steps)) for place in held.values()]
    begins = {step: steps.index(step) for step in local}
    known: dict[object, list[int]] = {}
    found: dict[Value, Place] = {}
    for step, values in local.items():
        begin, end = begins[step], begins.get(step + 1, len(steps)) - 1
        around = frozenset(
            taken_for_ever
            if stable
            else (
                Place(place.offset, place.size_bytes, max(place.first, begin) - begin, min(place.last, end) - begin)
                for place in held.values()
                if place.first <= end and place.last >= begin
            )
        )
        wanted = tuple((sizes[value], lives[value][0] - begin, lives[value][1] - begin) for value in values)
        if (around, wanted) not in known:
            known[around, wanted] = _pack(wanted, tuple(around))
        for value, offset in zip(values, known[around, wanted], strict=True):
            found[value] = Place(offset, sizes[value], *lives[value])
    return found


def size_of(manifest: Manifest, listing: Listing, value: Value, samples: int) -> int:
    """Bytes of a value, rounded up to ALIGNMENT."""
    tensor = listing.tensors[value]
    rows = samples if listing.counts_samples(value) else samples * manifest.guidance.branches
    size = ITEM_BYTES[tensor.dtype]
    for extent in tensor.shape:
        size *= rows if isinstance(extent, str) else extent
    return align(size)


def align(size_bytes: int) -> int:
    return -(-size_bytes // ALIGNMENT) * ALIGNMENT


def _step(steps: Sequence[int], launch: int) -> int:
    """Step of a launch; what is read after the last one is in a step of its own."""
    return steps[launch] if launch < len(steps) else len(steps)


def _lifetimes(listing: Listing) -> dict[Value, tuple[int, int]]:
    """First and last launch of every value; the final latents are read after the last one."""
    first = {value: 0 for value in listing.brought}
    last = dict(first)
    for index, launch in enumerate(listing.launches):
        for value in launch.writes.values():
            first[value] = last[value] = index
        for value in launch.reads.values():
            if not listing.is_constant(value):
                last[value] = index
    last[listing.final] = len(listing.launches)
    return {value: (first[value], last[value]) for value in first}


def _carried_slots(
    values: Iterable[Value], lives: dict[Value, tuple[int, int]], sizes: dict[Value, int]
) -> dict[Value, int]:
    """Offset of every value that outlives a step: the first slot of its size that is free, else a new one."""
    free_after: dict[int, list[list[int]]] = {}
    """By size: offset and last launch of every slot."""
    end = 0
    found: dict[Value, int] = {}
    for value in sorted(values, key=lambda value: lives[value][0]):
        first, last = lives[value]
        of_size = free_after.setdefault(sizes[value], [])
        slot = next((slot for slot in of_size if slot[1] < first), None)
        if slot is None:
            slot = [end, last]
            of_size.append(slot)
            end += sizes[value]
        slot[1] = last
        found[value] = slot[0]
    return found


def _pack(wanted: Sequence[tuple[int, int, int]], around: Sequence[Place]) -> list[int]:
    """Offsets of (size, first, last) around places that are taken: the lowest end that was found.

    Four greedy orders, and of each some more, where what ends highest is placed first the next time ("squeaky wheel",
    Joslin and Clements 1999), until nothing could end lower.
    """
    keys: tuple[Callable[[tuple[int, int, int]], tuple[int, ...]], ...] = (
        lambda want: (-want[0], want[1]),
        lambda want: (-want[0], -want[2]),
        lambda want: (want[1], -want[0]),
        lambda want: (-want[2], -want[0]),
    )
    orders = [sorted(range(len(wanted)), key=[key(want) for want in wanted].__getitem__) for key in keys]
    places = [*around, *(Place(0, *want) for want in wanted)]
    bound = _lower_bound(places, max(place.last for place in places))
    best: list[int] = []
    lowest = -1
    for order in orders:
        for _ in range(MOVES + 1):
            offsets = _pack_in_order(wanted, around, order)
            ends = [offset + size for offset, (size, _, _) in zip(offsets, wanted, strict=True)]
            if lowest < 0 or max(ends) < lowest:
                best, lowest = offsets, max(ends)
            if lowest <= bound:
                return best
            order = _with_first(order, ends.index(max(ends)))
    return best


def _with_first(order: Sequence[int], index: int) -> list[int]:
    """The order with one moved to its front."""
    return [index, *(other for other in order if other != index)]


def _pack_in_order(wanted: Sequence[tuple[int, int, int]], around: Sequence[Place], order: Sequence[int]) -> list[int]:
    taken = list(around)
    offsets = [0] * len(wanted)
    for index in order:
        size, first, last = wanted[index]
        offset = 0
        for place in sorted(taken, key=lambda place: place.offset):
            if place.first <= last and first <= place.last:
                if place.offset >= offset + size:
                    break
                offset = max(offset, place.offset + place.size_bytes)
        offsets[index] = offset
        taken.append(Place(offset, size, first, last))
    return offsets


def _lower_bound(places: Iterable[Place], launches: int) -> int:
    change = [0] * (launches + 2)
    for place in places:
        change[place.first] += place.size_bytes
        change[place.last + 1] -= place.size_bytes
    most = now = 0
    for difference in change:
        now += difference
        most = max(most, now)
    return most
