"""The report's figures: `Report` → PNG files.

They are narrow enough to be read on a phone, in colours that all readers can tell apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

from .data import NAMED_PEERS, BudgetReport, Report

PALETTE = ("#0072b2", "#e66600", "#339980", "#80334d", "#b30000", "#000000")
"""Contrast to white of 3 or more each; CIEDE2000 of 19 or more between any two, to protanopes and deuteranopes as well.

Found by a search over saturated colours around Okabe and Ito's blue; `tests/compiler/report/test_page.py` measures it.
"""
OWN, REFERENCE, ANCHOR = PALETTE[0], PALETTE[5], PALETTE[3]
OTHERS = "#aaaaaa"
REST = "other peers"
BUDGETS = ((PALETTE[0], "o"), (PALETTE[1], "s"), (PALETTE[2], "^"), (PALETTE[4], "D"))
"""Colour and marker of budgets, the lowest first; further ones take other markers."""
FURTHER_MARKERS = ("v", "P", "X", "<", ">", "*")
PEER_LINES = ("--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), "--")
PEERS = tuple(zip(PALETTE[1:], ("s", "^", "D", "v", "P"), PEER_LINES, strict=True))
"""Colour, marker and line style."""
LINES = ("-", "--", "-.", ":")
WIDTH_IN, DPI = 5.0, 200
"""1000 pixels wide: sharp in print, and text of 11 points is 11 pixels high on a phone that is 360 wide."""
STYLE = {
    "font.size": 11,
    "font.family": "DejaVu Sans",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#666666",
    "axes.labelcolor": "#222222",
    "text.color": "#222222",
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "legend.frameon": False,
    "legend.fontsize": 10,
    "axes.grid": False,
    "lines.markersize": 6,
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "axes.unicode_minus": True,
}
SSIM_CAP = 1e-6
"""An SSIM this close to 1 is drawn here."""
ERROR_FLOOR = 1e-8
LEVELS = np.linspace(0, 1, 201)
PATH_WEIGHTS = (0.25, 0.5, 0.75)

Draw = Callable[[Report], Figure]


def draw(report: Report, folder: Path) -> None:
    """Write all figures as PNG files, the same bytes for the same report."""
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **STYLE}):  # type: ignore[dict-item]
        for name, function in FIGURES.items():
            function(report).savefig(folder / name, dpi=DPI, metadata={"Software": None})


def budget_style(position: int) -> tuple[str, str, Any]:
    """Colour, marker and line style of the budget at a position, counted from the lowest; no two are the same.

    >>> budget_style(0), budget_style(4)
    (('#0072b2', 'o', '-'), ('#0072b2', 'v', '--'))
    """
    colour, marker = BUDGETS[position % len(BUDGETS)]
    lap = position // len(BUDGETS)
    if lap:
        marker = FURTHER_MARKERS[(position - len(BUDGETS)) % len(FURTHER_MARKERS)]
    return colour, marker, LINES[(position + lap) % len(LINES)]


def _figure(height_in: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH_IN, height_in), layout="constrained")
    return figure, figure.add_subplot()


def _legend(figure: Figure, axis: Axes, columns: int = 2) -> None:
    handles, labels = axis.get_legend_handles_labels()
    # Ours first, the grey ones last.
    places = sorted(range(len(labels)), key=lambda p: (not labels[p].startswith("otcache"), labels[p] == REST))
    handles, labels = [handles[place] for place in places], [labels[place] for place in places]
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, handlelength=2.6, columnspacing=1.4)


def schedules(report: Report) -> Figure:
    """Every schedule on the axis of noise levels, the reference above, the anchor below, budgets between."""
    rows: list[tuple[str, tuple[int, ...], str, str]] = [
        (f"reference ({len(report.reference.schedule)})", report.reference.schedule, REFERENCE, "o")
    ]
    for position, entry in reversed(list(enumerate(report.budgets))):
        colour, marker, _ = budget_style(position)
        rows.append((f"budget {entry.budget}", entry.schedule, colour, marker))
    rows.append((f"anchor ({len(report.anchor.schedule)})", report.anchor.schedule, ANCHOR, "D"))
    figure, axis = _figure(1.7 + 0.38 * len(rows))
    axis.plot(report.timeline.values[:-1], [1] * report.total, "|", color="#888888", markersize=9)
    for row, (_, schedule, colour, marker) in enumerate(rows):
        axis.axhline(-row, color="#e2e2e2", linewidth=1, zorder=0)
        axis.plot(report.timeline.at(schedule), [-row] * len(schedule), marker, color=colour, linestyle="none")
    names = [f"all {report.total} steps", *(name for name, *_ in rows)]
    axis.set_yticks(range(1, -len(rows), -1), names)
    axis.set_ylim(-len(rows) + 0.4, 1.6)
    axis.tick_params(axis="y", length=0)
    axis.spines["left"].set_visible(False)
    _timeline_axis(axis, report, "x")
    return figure


def _timeline_axis(axis: Axes, report: Report, which: str) -> None:
    """Noise level from the start to the end, the start first."""
    timeline = report.timeline
    label = f"{timeline.name} (start → end of sampling)"
    start, end = timeline.limits
    if which == "x":
        axis.set_xscale("log" if timeline.is_log else "linear")
        axis.set_xlim(_beyond(start, end, timeline.is_log), _beyond(end, start, timeline.is_log))
        axis.set_xlabel(label)
    else:
        axis.set_yscale("log" if timeline.is_log else "linear")
        axis.set_ylim(start, end)
        axis.set_ylabel(label)


def _beyond(value: float, other: float, log: bool) -> float:
    """A place a little outside of an axis from `other` to `value`, so that markers at the limits are whole.

    >>> round(_beyond(1.0, 0.0, log=False), 2), round(_beyond(10.0, 1.0, log=True), 2)
    (1.03, 10.72)
    """
    return float(value * (value / other) ** 0.03) if log else value + 0.03 * (value - other)


def quantiles(report: Report) -> Figure:
    """Reference, anchor and the path between them as quantile functions; what is served at each budget as markers."""
    figure, axis = _figure(4.0 + 0.12 * (3 + len(report.budgets)))

    def curve(weight: float, **style: Any) -> None:
        axis.plot(LEVELS, report.timeline.at(report.path(weight).quantile(LEVELS) * report.total), **style)

    for weight in PATH_WEIGHTS:
        label = f"path at {', '.join(f'{w:g}' for w in PATH_WEIGHTS)}" if weight == PATH_WEIGHTS[0] else None
        curve(weight, color=OTHERS, linewidth=1.1, label=label, zorder=1)
    curve(0.0, color=REFERENCE, linewidth=2.2, label="reference (0)")
    curve(1.0, color=ANCHOR, linewidth=2.2, linestyle="--", label="anchor (1)")
    for position, entry in enumerate(report.budgets):
        colour, marker, _ = budget_style(position)
        steps = np.asarray(entry.schedule)
        levels = np.arange(len(steps)) / len(steps)
        axis.plot(
            levels,
            report.timeline.at(steps),
            marker,
            color=colour,
            markersize=7,
            markeredgecolor="white",
            markeredgewidth=0.6,
            linestyle="none",
            label=f"budget {entry.budget}",
            zorder=4,
            clip_on=False,
        )
    axis.set_xlim(-0.02, 1.02)
    axis.set_xlabel("share of the budget spent")
    axis.grid(color="#eeeeee")
    _timeline_axis(axis, report, "y")
    _legend(figure, axis)
    return figure


def psnr(report: Report) -> Figure:
    """PSNR against evaluations: mean and spread over prompts, and the peers' means."""
    figure, axis = _fidelity(report, "psnr_db", lambda values: values)
    axis.set_ylabel("PSNR to the full run (dB)")
    return figure


def ssim(report: Report) -> Figure:
    """SSIM against evaluations, on an axis on which each step towards 1 takes as much room as the one before."""
    figure, axis = _fidelity(report, "ssim", lambda values: np.maximum(1 - np.asarray(values), SSIM_CAP))
    axis.set_ylabel("SSIM to the full run")
    axis.set_yscale("log")
    axis.invert_yaxis()
    low, high = sorted(axis.get_ylim())
    parts = (1.0, 0.5, 0.2) if high / low < 500 else (1.0,)
    ticks = [t for power in range(-6, 1) for part in parts if low <= (t := part * 10**power) <= high]
    axis.yaxis.set_major_locator(FixedLocator(ticks))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{1 - value:.6f}".rstrip("0").rstrip(".")))
    axis.yaxis.set_minor_locator(NullLocator())
    return figure


def _fidelity(report: Report, metric: str, scale: Callable[[Any], Any]) -> tuple[Figure, Axes]:
    figure, axis = _figure(4.4)
    budgets = [entry.budget for entry in report.budgets]
    values = [getattr(entry, metric) for entry in report.budgets]
    for name in report.peers[NAMED_PEERS:]:
        label = REST if name == report.peers[NAMED_PEERS] else None
        _peer(axis, report, name, metric, scale, color=OTHERS, linewidth=0.9, marker=".", label=label, zorder=1)
    low, high = (scale(np.array([np.quantile(each, q) for each in values])) for q in (0.1, 0.9))
    mean = scale(np.array([getattr(entry.quality, metric).mean for entry in report.budgets]))
    axis.plot(budgets, mean, "o-", color=OWN, linewidth=2.6, markersize=8, label="otcache, mean", zorder=5)
    axis.fill_between(budgets, low, high, color=OWN, alpha=0.16, linewidth=0, label="otcache, 10–90 %")
    if len(budgets) == 1:
        axis.vlines(budgets, low, high, color=OWN, linewidth=6, alpha=0.2)
    for (colour, marker, line), name in zip(PEERS, report.peers, strict=False):
        _peer(axis, report, name, metric, scale, color=colour, marker=marker, linestyle=line, linewidth=1.5, label=name)
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(FixedLocator(budgets))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_xlabel(f"model evaluations (of {report.total})")
    axis.grid(axis="y", color="#eeeeee")
    _legend(figure, axis)
    return figure, axis


def _peer(axis: Axes, report: Report, name: str, metric: str, scale: Callable[[Any], Any], **style: Any) -> None:
    found = [
        (entry.budget, getattr(peer.quality, metric).mean)
        for entry in report.budgets
        for peer in entry.peers
        if peer.name == name
    ]
    axis.plot([budget for budget, _ in found], scale(np.array([value for _, value in found])), **style)


def cost(report: Report) -> Figure:
    """Seconds a picture where they were measured; else the model evaluations, which are no measurement."""
    rows: list[tuple[str, float | None, int]] = [(f"all {report.total} steps", report.full_latency_s, report.total)]
    rows += [(f"budget {entry.budget}", entry.latency_s, entry.program.nfe) for entry in reversed(report.budgets)]
    if report.has_latency:
        values = [latency or 0.0 for _, latency, _ in rows]
        texts = [_seconds(latency, report.full_latency_s) for _, latency, _ in rows]
        label = "seconds a picture, measured"
    else:
        values = [100 * nfe / report.total for *_, nfe in rows]
        texts = [f"{nfe} of {report.total}" for *_, nfe in rows]
        label = "model evaluations, % of the full run"
    colours = ["#888888", *(budget_style(position)[0] for position in reversed(range(len(report.budgets))))]
    return _bars([name for name, *_ in rows], values, texts, colours, label)


def _seconds(latency: float | None, full: float | None) -> str:
    if latency is None:
        return "not measured"
    text = f"{latency:.3g} s"
    return text if full is None or full == latency else f"{text} ({full / latency:.1f}× as fast)"


def _bars(names: list[str], values: list[float], texts: list[str], colours: list[str], label: str) -> Figure:
    figure, axis = _figure(1.0 + 0.42 * len(names))
    places = range(0, -len(names), -1)
    axis.barh(places, values, color=colours, height=0.62)
    largest = max([*values, 1e-9])
    for place, value, text in zip(places, values, texts, strict=True):
        inside = value > 0.6 * largest
        axis.text(
            value + (-0.015 if inside else 0.015) * largest,
            place,
            text,
            va="center",
            ha="right" if inside else "left",
            color="white" if inside else "#222222",
            fontsize=10,
        )
    axis.set_yticks(places, names)
    axis.tick_params(axis="y", length=0)
    axis.set_xlim(0, largest * 1.02)
    axis.set_xlabel(label)
    return figure


def trajectory(report: Report) -> Figure:
    """Relative error of the latents at each computed step and at the end: mean and worst over prompts."""
    figure, axis = _figure(4.2)
    for position, entry in enumerate(report.budgets):
        colour, marker, line = budget_style(position)
        mean, worst = entry.errors.mean(axis=1), entry.errors.max(axis=1)
        kept = mean > ERROR_FLOOR
        places = np.asarray(entry.positions)[kept]
        axis.fill_between(places, mean[kept], worst[kept], color=colour, alpha=0.12, linewidth=0)
        style = {"marker": marker, "color": colour, "linestyle": line, "linewidth": 1.8}
        axis.plot(places, mean[kept], **style, label=f"budget {entry.budget}")
    axis.set_yscale("log")
    _plain_decades(axis)
    axis.set_xlim(-0.02 * report.total, 1.03 * report.total)
    axis.set_xlabel(f"step of the full run ({report.total}: the end)")
    axis.set_ylabel("relative error of the latents")
    axis.grid(axis="y", color="#eeeeee")
    _legend(figure, axis, columns=min(3, max(1, len(report.budgets))))
    return figure


def _plain_decades(axis: Axes) -> None:
    """Ticks at 1, 2 and 5 of each decade, or at 1 of many, as plain numbers."""
    low, high = sorted(axis.get_ylim())
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [part * 10.0**power for power in decades for part in ((1, 2, 5) if len(decades) < 4 else (1,))]
    axis.yaxis.set_major_locator(FixedLocator([tick for tick in ticks if low <= tick <= high]))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_locator(NullLocator())


def calibration(report: Report) -> Figure:
    """Full runs per calibration prompt that each pass took."""
    values = [each.full_runs for each in report.costs]
    texts = [f"{value:.2f}" for value in values]
    names = [each.name for each in report.costs]
    return _bars(names, values, texts, ["#5a6b7b"] * len(values), "full runs per calibration prompt")


FIGURES: dict[str, Draw] = {
    "psnr.png": psnr,
    "ssim.png": ssim,
    "cost.png": cost,
    "schedules.png": schedules,
    "quantiles.png": quantiles,
    "trajectory.png": trajectory,
    "calibration.png": calibration,
}
"""Files of the report's folder."""


def label_of(entry: BudgetReport) -> str:
    return f"{entry.budget} evaluation{'' if entry.budget == 1 else 's'}"
