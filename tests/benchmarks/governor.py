"""The governor under arrival patterns: which budget it serves over time, and how long requests wait.

    python tests/benchmarks/governor.py [--plot governor.png]

Time is simulated (`tests/support/queue_simulation.py`): one server, whose requests take 0.4 s at budget 4 to 4.8 s at
`full`. Prints JSON, a line for each pattern.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

from otcache.runtime import Governor

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from queue_simulation import BUDGETS, SERVICE_S, Served, changes, poisson, ramp, share, simulate

END_S = 1800.0
BURST = [0.05 * index for index in range(40)]


def patterns() -> dict[str, list[Served]]:
    """What was served under each pattern."""
    least, most = 0.1 / SERVICE_S["full"], 0.9 / SERVICE_S["4"]

    def rate_hz(time_s: float) -> float:
        return least + (most - least) * min(time_s, END_S - time_s) / (END_S / 2)

    found = {
        "burst of 40, then 2 clients": simulate(Governor(BUDGETS), BURST, clients=2, from_s=10, until_s=END_S),
        "ramp up and down": simulate(Governor(BUDGETS), ramp(rate_hz, END_S)),
    }
    for part in (0.5, 0.9):
        for budget in BUDGETS:
            arrivals = poisson(part / SERVICE_S[budget], END_S)
            found[f"{part:g} of what {budget} bears"] = simulate(Governor(BUDGETS), arrivals)
    return found


def summary(served: list[Served]) -> dict[str, object]:
    minutes = (served[-1].time_s - served[0].time_s) / 60
    waits = sorted(one.wait_s for one in served)
    return {
        "requests": len(served),
        "changes_a_minute": round(changes(served) / minutes, 2),
        "share": {budget: round(share(served, [budget]), 2) for budget in BUDGETS},
        "wait_s": {"p50": round(statistics.median(waits), 1), "p99": round(waits[int(0.99 * len(waits))], 1)},
    }


def plot(found: dict[str, list[Served]], path: Path) -> None:
    """Budgets over time, a panel for each pattern, with the load behind."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = 2
    rows = -(-len(found) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(11, 1.7 * rows), sharex=True, layout="constrained")
    for axis, (name, served) in zip(axes.flat, found.items(), strict=True):
        times = [one.time_s / 60 for one in served]
        load = axis.twinx()
        load.fill_between(times, [one.load for one in served], step="post", color="#d8d8d8", linewidth=0)
        load.set_ylim(0, 40)
        load.set_yticks([8], ["high"])
        axis.set_zorder(load.get_zorder() + 1)
        axis.patch.set_visible(False)
        axis.step(times, [BUDGETS.index(one.budget) for one in served], where="post", color="#1f5fa8", linewidth=1.4)
        axis.set_yticks(range(len(BUDGETS)), BUDGETS)
        axis.set_ylim(-0.3, len(BUDGETS) - 0.7)
        axis.set_title(name, fontsize=9, loc="left")
    for axis in axes[-1]:
        axis.set_xlabel("minutes")
    figure.suptitle("Budget that is served (blue) and requests that wait or run (grey)", fontsize=10)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plot", type=Path, help="write the budgets over time to this picture")
    options = parser.parse_args()
    found = patterns()
    for name, served in found.items():
        print(json.dumps({"pattern": name, **summary(served)}))
    if options.plot:
        plot(found, options.plot)


if __name__ == "__main__":
    main()
