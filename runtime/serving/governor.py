"""Which budget to serve under load: lower while requests pile up, higher again when the pile is gone.

A pure function of the queue's history: `Governor` is told when requests arrive and leave, has no clock of its own, and
gives the same budgets for the same history, however often it is asked.

    load ≥ high        one budget lower at once, and another one after every `hold_s` that the load stays there
    load ≤ low         one budget higher after every `raise_after_s` that the load stays there
    in between         nothing changes

with the load being the requests that wait or run. The gap between `low` and `high` and the slow way back keep the
budget from flapping: it is raised at most once in `raise_after_s` and lowered at most once in `hold_s`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from otcache.schemas.errors import UsageError
from otcache.schemas.messages import one_line


class Governor:
    """The highest budget that the load allows. Times are seconds on any clock; one that goes back counts as no time."""

    def __init__(
        self,
        budgets: Sequence[str],
        *,
        lowest: int | str | None = None,
        high: int = 8,
        low: int = 1,
        hold_s: float = 1.0,
        raise_after_s: float = 10.0,
    ) -> None:
        """budgets: in increasing order, as `Sampler.budgets`. lowest: never go below it; None takes the first.

        Raises UsageError.
        """
        self._budgets = tuple(budgets)
        if not self._budgets or len(set(self._budgets)) != len(self._budgets):
            raise UsageError(f"budgets are {one_line(self._budgets)}: expected at least one, and none twice")
        self._floor = 0 if lowest is None else self._index(lowest)
        if not 0 <= low < high:
            raise UsageError(f"low and high are {low} and {high}: expected 0 or more requests, and low below high")
        if not (0 < hold_s <= raise_after_s < math.inf):
            raise UsageError(
                f"hold_s and raise_after_s are {hold_s} and {raise_after_s}: expected more than 0 s, and hold_s at most "
                "raise_after_s"
            )
        self._high, self._low, self._hold_s, self._raise_after_s = high, low, hold_s, raise_after_s
        self._level = len(self._budgets) - 1
        self._load = 0
        self._now = self._changed = -math.inf
        self._since = -math.inf
        """When the load entered the zone (low, between, high) that it is in."""

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

    def budget(self, time_s: float, wanted: int | str | None = None) -> str:
        """The budget to serve now: `wanted`, or the highest, unless the load allows less. Raises UsageError."""
        self._advance(time_s)
        level = self._level
        if wanted is not None:
            level = min(level, self._index(wanted))
        return self._budgets[level]

    def _index(self, budget: int | str) -> int:
        if str(budget) not in self._budgets:
            raise UsageError(f"budget is {one_line(budget, 40)}: expected one of {', '.join(self._budgets)}")
        return self._budgets.index(str(budget))

    def _zone(self) -> int:
        return -1 if self._load <= self._low else int(self._load >= self._high)

    def _set_load(self, load: int, time_s: float) -> None:
        self._advance(time_s)
        before = self._zone()
        self._load = load
        if self._zone() != before:
            self._since = self._now

    def _advance(self, time_s: float) -> None:
        """Make the changes that were due until now; between two events the load stands still, so they are exact."""
        self._now = max(self._now, time_s)
        zone = self._zone()
        while zone == 1 and self._level > self._floor:
            due = max(self._since, self._changed + self._hold_s)
            if due > self._now:
                return
            self._level, self._changed = self._level - 1, due
        while zone == -1 and self._level < len(self._budgets) - 1:
            due = max(self._since, self._changed) + self._raise_after_s
            if due > self._now:
                return
            self._level, self._changed = self._level + 1, due
