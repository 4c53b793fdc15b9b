"""Schedules from a smaller size, coefficients from the served one: `--search-size`.

An evaluation of a small picture costs a fraction. So all searches run at the small size on all prompts, and what they
chose is fitted at the served size on few. Their full runs are there then, so that the graph of the served size is
known as well: its own schedules are fitted beside, and the better ones kept.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace

from otcache.schemas.errors import UsageError

from ..options import CompileOptions
from ..schedules.search import Found, refit
from ..workspace.progress import Reporter
from .prepare import Prepared, prepare

FIT_PROMPTS = 8
"""Calibration prompts at the served size, at most: the fewest with which slopes and means are fitted."""

GRAPHS = 2
"""Schedules of the served size's graph that are fitted for each budget."""


def options_at_served_size(options: CompileOptions) -> CompileOptions:
    """Options of the served size, where few prompts are calibrated on."""
    if options.search_size is None:
        return options
    return replace(options, calibration_prompts=min(options.calibration_prompts, FIT_PROMPTS))


def search_small(
    prepared: Prepared,
    options: CompileOptions,
    reporter: Reporter,
    held: contextlib.ExitStack,
    search: Callable[[Prepared], Found],
) -> Found:
    """Search at the small size, and fit at the served one.

    Args:
        prepared: the model at the served size, with few calibration prompts.
        options: what the user chose; `search_size` is given.
        reporter: told of every pass.
        held: keeps other compiles out of the small size's workspace until it is closed.
        search: the searches, of a prepared model.

    Returns what was found, with costs of the small size named after it, in full runs at that size for each prompt
    there.
    """
    assert options.search_size is not None
    height, width = options.search_size
    call = prepared.session.call
    if (height, width) == (call.height, call.width):
        raise UsageError(
            f"--search-size is {height}x{width}, the size that is compiled: leave it out, or give a smaller one"
        )
    model = prepared.session.model
    small = prepare(
        replace(
            options,
            height=height,
            width=width,
            sizes=None,
            frame_counts=None,
            text_lengths=None,
            search_size=None,
            engines="none" if options.payload == "output" else options.engines,
        ),
        reporter,
        held,
        model,
        crew=prepared.session.crew,
    )
    found = search(small)
    ledger = prepared.calibration.ledger
    before = ledger.charged
    with reporter.on("fit", f"schedules at {call.height}x{call.width}") as advance:
        here = refit(found, prepared.calibration, graphs=GRAPHS)
        advance.facts["evaluations"] = ledger.charged - before
    per_run = prepared.table.num_inference_steps * prepared.calibration.count
    costs = {f"{name} at {height}x{width}": value for name, value in {"capture": 1.0, **found.costs}.items()}
    return replace(here, costs={**costs, "fit": (ledger.charged - before) / per_run})
