"""Which budget to serve under load: lower while requests pile up, higher again as soon as the queue bears it.

A pure function of the queue's history: `Governor` is told when requests arrive and leave, has no clock of its own, and
gives the same budgets for the same history, however often it is asked. With the load being the requests that wait or
run:

    load ≥ high   one budget lower at once, and another one after every `hold_s`, once a request has left since
    load < high   one budget higher after `raise_after_s` · 2^failures below `high`, once `high` · 2^failures requests
                  have left since the budget was changed
    load ≤ low    one budget higher after every 4 · `raise_after_s`, whatever has failed

A budget fails when the load reaches `high` while it is served. So the governor always tries again (it cannot stick at a
low budget under a load that a higher one would bear), and tries ever more seldom what does not hold (it does not flap).
Failures of a budget are forgotten when it has held until the next one was tried, or for as long as anything is waited.
Counting requests beside seconds makes that so for models of every speed. `python tests/benchmarks/governor.py` plays
arrival patterns through it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from otcache.schemas.errors import UsageError
from otcache.schemas.messages import one_line

MOST_FAILURES = 4
"""Beyond so many in a row patience grows no more: 16 times `raise_after_s`."""
IDLE = 4
"""Times `raise_after_s` that the queue is idle before a budget is raised that has failed."""


class Governor:
    """The highest budget that the load allows. Times are seconds on any clock; one that goes back counts as no time.

    >>> governor = Governor(["4", "8", "full"], high=2)
    >>> governor.arrived(0.0)
    >>> governor.budget(0.0)
    'full'
    >>> governor.arrived(0.5)
    >>> governor.budget(0.5), governor.budget(0.5, wanted="full", minimum="full")
    ('8', 'full')
    """

    def __init__(
        self,
        budgets: Sequence[str],
        *,
        lowest: int | str | None = None,
        high: int = 8,
        low: int = 0,
        hold_s: float = 1.0,
        raise_after_s: float = 10.0,
    ) -> None:
        """Nothing has arrived yet, and the highest budget is served. Raises UsageError.

        Args:
            budgets: in increasing order, as `Sampler.budgets`.
            lowest: the floor: never go below it; None takes the first.
            high: requests that wait or run, from which on the budget is lowered.
            low: requests up to which the queue counts as idle.
            hold_s: seconds between two lowerings.
            raise_after_s: seconds below `high` before the budget is raised, for one that has not failed.
        """
        self._budgets = tuple(budgets)
        if not self._budgets or len(set(self._budgets)) != len(self._budgets):
            raise UsageError(f"budgets are {one_line(self._budgets)}: expected at least one, and none twice")
        self._floor = 0 if lowest is None else self._index(lowest)
        if not 0 <= low < high:
            raise UsageError(f"low and high are {low} and {high}: expected 0 or more requests, and low below high")
        if not (0 < hold_s <= raise_after_s < math.inf):
            raise UsageError(
                f"hold_s and raise_after_s are {hold_s} and {raise_after_s}: expected more than 0 s, and hold_s at "
                "most raise_after_s"
            )
        self._high, self._low, self._hold_s, self._raise_after_s = high, low, hold_s, raise_after_s
        self._level = len(self._budgets) - 1
        self._failures = [0] * len(self._budgets)
        self._load = 0
        self._now = self._changed = -math.inf
        self._served = 0
        """Requests that have left since the budget was changed."""
        self._crossed = self._idled = -math.inf
        """When the load last came to the side of `high`, and of `low`, on which it is."""

    @classmethod
    def of_queue(
        cls, budgets: Sequence[str], *, capacity: int, workers: int = 1, lowest: int | str | None = None
    ) -> Governor:
        """One that begins to lower when half of a queue of so many requests is full, in front of so many workers."""
        return cls(budgets, lowest=lowest, high=workers + max(1, capacity // 2))

    @property
    def budgets(self) -> tuple[str, ...]:
        return self._budgets

    @property
    def load(self) -> int:
        """Requests that have arrived and not left."""
        return self._load

    def arrived(self, time_s: float) -> None:
        """A request has been accepted."""
        self._set_load(self._load + 1, time_s)

    def left(self, time_s: float) -> None:
        """A request has ended: served, failed, cancelled or expired."""
        if not self._load:
            raise UsageError("a request has left: expected one that had arrived before")
        self._set_load(self._load - 1, time_s)
        self._served += 1

    def budget(self, time_s: float, wanted: int | str | None = None, minimum: int | str | None = None) -> str:
        """The budget to serve now: `wanted`, or the highest, unless the load allows less.

        minimum: of the request, below which it is not lowered; None leaves that to the governor's own floor. Raises
        UsageError for a budget that there is not.
        """
        self._advance(time_s)
        highest = len(self._budgets) - 1 if wanted is None else self._index(wanted)
        floor = 0 if minimum is None else self._index(minimum)
        return self._budgets[min(highest, max(floor, self._level))]

    def _index(self, budget: int | str) -> int:
        if str(budget) not in self._budgets:
            raise UsageError(f"budget is {one_line(budget, 40)}: expected one of {', '.join(self._budgets)}")
        return self._budgets.index(str(budget))

    def _set_load(self, load: int, time_s: float) -> None:
        self._advance(time_s)
        before, self._load = self._load, load
        if (before >= self._high) != (load >= self._high):
            self._crossed = self._now
        if (before <= self._low) != (load <= self._low):
            self._idled = self._now

    def _advance(self, time_s: float) -> None:
        """Make the changes that were due until now; between two events the load stands still, so they are exact."""
        self._now = max(self._now, time_s)
        if self._load >= self._high:
            self._lower()
        else:
            self._raise()

    def _lower(self) -> None:
        while self._level > self._floor and (self._served or self._changed == -math.inf):
            due = max(self._crossed, self._changed + self._hold_s)
            if due > self._now:
                return
            most = 2**MOST_FAILURES
            proven = due - self._changed >= self._raise_after_s * most and self._served >= self._high * most
            failures = 0 if proven else self._failures[self._level]
            self._failures[self._level] = min(failures + 1, MOST_FAILURES)
            self._change(self._level - 1, due)

    def _raise(self) -> None:
        while self._level < len(self._budgets) - 1:
            times = 2 ** self._failures[self._level + 1]
            below = max(self._crossed, self._changed)
            due = below + self._raise_after_s * times if self._served >= self._high * times else math.inf
            if self._load <= self._low:
                due = min(due, max(below, self._idled) + self._raise_after_s * IDLE)
            if due > self._now:
                return
            self._failures[self._level] = 0
            self._change(self._level + 1, due)

    def _change(self, level: int, time_s: float) -> None:
        self._level, self._changed, self._served = level, time_s, 0
