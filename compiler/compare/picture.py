"""A comparison as a picture: fidelity against evaluations, every method by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from otcache.schemas.whole_files import whole_file

from .cells import DEFAULT, FURTHER, Comparison

BEST = 6
"""Rivals that are drawn with markers: those that are ahead of the others at any budget."""
OWN_COLOUR = "#0072B2"
MARKERS = "s^vDPX"
PERFECT = 1e-6
"""1 − SSIM of pictures that are the same to all that float32 tells."""
SSIM_TICKS = (0.0, 0.5, 0.8, 0.9, 0.97, 0.99, 0.997, 0.999, 0.9997, 0.9999)


def draw_comparison(comparison: Comparison, path: Path) -> None:
    """Write PSNR, and SSIM on a logarithmic scale of 1 − SSIM, against mean evaluations, as a PNG of 140 dpi."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rivals = ranked_rivals(comparison)
    figure, axes = pyplot.subplots(1, 2, figsize=(12, 5), layout="constrained")
    for axis, metric in zip(axes, ("psnr_db", "ssim"), strict=True):
        for rank, method in reversed(list(enumerate(rivals))):
            style = {"color": pyplot.get_cmap("tab20")((rank + 2) % 20), "zorder": 2, "linewidth": 0.8, "alpha": 0.7}
            if rank < BEST:
                style |= {"marker": MARKERS[rank], "zorder": 3, "linewidth": 1.5, "alpha": 1.0}
            axis.plot(*_points(comparison, method, metric), label=method, **style)
        own = {"color": OWN_COLOUR, "marker": "o", "linewidth": 2.6, "zorder": 5}
        axis.plot(*_points(comparison, DEFAULT, metric), label=DEFAULT, **own)
        _budget_axis(axis, comparison)
    axes[0].set_ylabel("PSNR (dB) to the full run")
    _ssim_axis(axes[1])
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles[::-1], names[::-1], fontsize=8, loc="outside right center", frameon=False)
    figure.suptitle(f"{Path(comparison.model).name}: {comparison.prompts} held-out prompts", fontsize=11)
    with whole_file(path) as part:
        figure.savefig(part, dpi=140, format="png")
    pyplot.close(figure)


def ranked_rivals(comparison: Comparison) -> list[str]:
    """All methods but the default: by their best rank in PSNR at any of the budgets, and among equals by how often."""
    methods = dict.fromkeys(cell.method for cell in comparison.cells if cell.method != DEFAULT)
    ranks: dict[str, list[int]] = {method: [] for method in methods}
    for budget in comparison.budgets:
        cells = [cell for cell in comparison.cells if cell.budget == budget and cell.method != DEFAULT]
        for rank, cell in enumerate(sorted(cells, key=lambda cell: -cell.psnr_db.mean)):
            ranks[cell.method].append(rank)
    return sorted(methods, key=lambda method: sorted(ranks[method]) or [len(methods)])


def _points(comparison: Comparison, method: str, metric: str) -> tuple[list[float], list[float]]:
    """Mean evaluations, and PSNR or 1 − SSIM."""
    cells = sorted((cell for cell in comparison.cells if cell.method == method), key=lambda cell: cell.nfe_mean)
    values = [getattr(cell, metric).mean for cell in cells]
    return [cell.nfe_mean for cell in cells], (
        values if metric == "psnr_db" else [max(PERFECT, 1.0 - value) for value in values]
    )


def _budget_axis(axis: Any, comparison: Comparison) -> None:
    """Ticks where methods were compared."""
    axis.set_xticks(comparison.budgets)
    axis.set_xlim(min(comparison.budgets) * 0.75, max(comparison.budgets) * FURTHER + 0.5)
    axis.set_xlabel(f"model evaluations (of {comparison.num_inference_steps})")
    axis.grid(alpha=0.25)


def _ssim_axis(axis: Any) -> None:
    """1 − SSIM on a logarithmic scale, the best on top, with the names of SSIM itself."""
    axis.set_yscale("log")
    lowest, highest = axis.get_ylim()
    axis.set_ylim(min(1.0, highest), lowest)
    shown = [value for value in SSIM_TICKS if lowest <= 1 - value <= highest]
    axis.set_yticks([1 - value for value in shown], [f"{value:g}" for value in shown])
    axis.set_yticks([], minor=True)
    axis.set_ylabel("SSIM to the full run")
