"""A queue in front of servers, with a governor: arrivals in, what was served out. Time is simulated."""

from __future__ import annotations

import heapq
import random
from collections.abc import Iterable, Mapping
from itertools import count, pairwise
from typing import NamedTuple

BUDGETS = ("4", "8", "16", "full")
SERVICE_S = {"4": 0.4, "8": 0.8, "16": 1.6, "full": 4.8}
"""Seconds of a request at each budget: of a model that draws in 100 ms a step."""


class Served(NamedTuple):
    time_s: float
    """When it was begun."""
    budget: str
    load: int
    """Requests that waited or ran then, this one included."""
    wait_s: float


def simulate(
    governor,
    arrivals: Iterable[float] = (),
    *,
    clients: int = 0,
    from_s: float = 0.0,
    until_s: float = 0.0,
    service_s: Mapping[str, float] = SERVICE_S,
    workers: int = 1,
) -> list[Served]:
    """Every request that was served, in order.

    arrivals: times of requests that come whatever happens. clients: as many who ask again as soon as they have been
    served, between `from_s` and `until_s`.
    """
    number = count()
    events = [(time, next(number), "arrives", False) for time in arrivals]
    events += [(from_s, next(number), "arrives", True) for _ in range(clients)]
    heapq.heapify(events)
    waiting: list[tuple[float, bool]] = []
    running, served = 0, []
    while events:
        now, _, what, again = heapq.heappop(events)
        if what == "arrives":
            governor.arrived(now)
            waiting.append((now, again))
        else:
            governor.left(now)
            running -= 1
            if again and now < until_s:
                heapq.heappush(events, (now, next(number), "arrives", True))
        while waiting and running < workers:
            came, again = waiting.pop(0)
            budget = governor.budget(now)
            running += 1
            served.append(Served(now, budget, governor.load, now - came))
            heapq.heappush(events, (now + service_s[budget], next(number), "leaves", again))
    return served


def poisson(rate_hz: float, until_s: float, seed: int = 0) -> list[float]:
    """Arrivals that know nothing of one another."""
    return ramp(lambda _: rate_hz, until_s, seed)


def ramp(rate_hz, until_s: float, seed: int = 0) -> list[float]:
    """The same at a rate that changes: a function of time."""
    draw, now, times = random.Random(seed), 0.0, []
    while (now := now + draw.expovariate(rate_hz(now))) < until_s:
        times.append(now)
    return times


def changes(served: list[Served]) -> int:
    """How often the budget was another one than that before."""
    return sum(before.budget != after.budget for before, after in pairwise(served))


def share(served: list[Served], budgets: Iterable[str]) -> float:
    """Of the requests, those that were served at one of the budgets."""
    wanted = set(budgets)
    return sum(one.budget in wanted for one in served) / len(served)
