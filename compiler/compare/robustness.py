"""Does the advantage hold elsewhere? Other guidance scales, and fewer or more calibration prompts, each with compiles
of its own.

Consumes a prepared comparison and its cells at one budget; produces a `Robustness`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..passes.compile import search_schedules
from ..passes.prepare import Prepared, prepare
from ..schedules.search import Found
from .cells import DEFAULT, AtScale, Calibrated, Cell, Robustness, peers_at
from .measure import bench_of, default_method, measure_cell
from .method import Method

BUDGET = 8
GUIDANCE_RANGE = (2.0, 6.0)
SCALES = (2.0, 4.0, 6.0)
"""Of the range, where its one program meets peers."""
CALIBRATION_PROMPTS = (4, 8, 16, 64)
BEST_PEERS = 3
"""So many peers, the best at the options' own guidance, are measured at every scale."""


def robustness(prepared: Prepared, cells: Sequence[Cell], peers: Sequence[Method]) -> Robustness:
    """Measure both, the first for guided models only. Raises OTCacheError.

    Args:
        prepared: the comparison's own.
        cells: what it measured; they say which of the peers are the best.
    """
    best = sorted(peers_at(cells, BUDGET), key=lambda cell: -cell.psnr_db.mean)[:BEST_PEERS]
    rivals = [next(peer for peer in peers if peer.name == cell.method) for cell in best]
    guided = prepared.session.interface.guided and rivals
    rows = [_calibrated(prepared, count) for count in CALIBRATION_PROMPTS]
    return Robustness(
        budget=BUDGET,
        guidance_range=GUIDANCE_RANGE,
        at_scales=_at_scales(prepared, rivals) if guided else (),
        calibrated=tuple(
            {row.calibration_prompts: row for row in rows}.values()
        ),  # fewer prompts than that may be there
    )


def _with(prepared: Prepared, **choices: Any) -> Prepared:
    """The same model, prepared with other options."""
    session = prepared.session
    return prepare(replace(session.options, budgets=(BUDGET,), **choices), session.reporter, like=prepared)


def _at_scales(prepared: Prepared, rivals: Sequence[Method]) -> tuple[AtScale, ...]:
    found = search_schedules(_with(prepared, guidance_scale=GUIDANCE_RANGE))
    return tuple(_at_scale(_with(prepared, guidance_scale=(scale, scale)), found, rivals) for scale in SCALES)


def _at_scale(prepared: Prepared, found: Found, rivals: Sequence[Method]) -> AtScale:
    """The range's program against peers that are calibrated for this scale, where they calibrate at all."""
    scale = prepared.session.options.nominal_scale
    bench, own = bench_of(prepared, found), default_method(found)
    with prepared.session.reporter.on("guidance", f"{scale:g}: {DEFAULT} and the {len(rivals)} best peers") as advance:
        methods, measured = (own, *rivals), []
        for method in methods:
            measured.append(measure_cell(bench, method, BUDGET))
            advance(len(measured), len(methods))
    cell, *others = measured
    assert isinstance(cell, Cell)  # a program that is there runs at any scale
    best = max((other for other in others if isinstance(other, Cell)), key=lambda other: other.psnr_db.mean)
    return AtScale(
        guidance_scale=scale,
        psnr_db=cell.psnr_db,
        ssim=cell.ssim,
        best_peer=best.method,
        best_peer_psnr_db=best.psnr_db,
        best_peer_ssim=best.ssim,
    )


def _calibrated(prepared: Prepared, count: int) -> Calibrated:
    """A compile of its own with so many prompts, at most as many as there are."""
    own = _with(prepared, calibration_prompts=count)
    found = search_schedules(own)
    cell = measure_cell(bench_of(own), default_method(found), BUDGET)
    assert isinstance(cell, Cell)
    return Calibrated(
        calibration_prompts=len(own.prompts), psnr_db=cell.psnr_db, ssim=cell.ssim, full_runs=sum(found.costs.values())
    )
