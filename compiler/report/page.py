"""What people look at: pictures at every budget, schedules, fidelity, cost, errors along the way, the worst prompts.

Consumes the manifest's fields, `evidence` and pictures; writes `report/` (PNG files and `evidence.json`) and one page,
`report.html`, that needs nothing else: no network, no script. The same input gives the same bytes.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image

from . import figures
from .data import BudgetReport, Report, report_from_manifest
from .evidence import Evidence, Shown, read_evidence, write_evidence
from .sheets import AMPLIFICATION, Sheet, colour_bar, difference_map

FOLDER, PAGE = "report", "report.html"
ATTACHMENTS = frozenset({FOLDER, PAGE})
"""First parts of the paths that this module writes."""
PICTURES, WORST = "pictures.png", "worst.png"
TEMPLATE = "report_template.html"
OWN_PEERS = "the best of a compile’s own peers"
RANKED_BY = {
    "ssim": "mean SSIM, and by mean PSNR among those whose SSIM is 0.999 or more",
    "psnr": "mean PSNR",
    "lpips": "mean LPIPS",
}
"""What candidates are ordered by, of each objective (`calibration.trials`)."""
SAME_DB = 99.995
"""From here on, PSNR says that pictures are the same (`metrics.PSNR_CAP`)."""


def write_report(folder: Path, fields: dict[str, Any], evidence: Evidence, shown: Shown) -> None:
    """Write `report.html` and `report/` into an artifact's folder.

    Args:
        folder: the artifact.
        fields: the manifest's JSON value; files, attachments and digest may be missing.
        evidence: what the report is drawn from beside it.
        shown: the pictures that it shows.
    """
    target = folder / FOLDER
    target.mkdir(exist_ok=True)
    write_evidence(target, evidence)
    _draw_pictures(evidence, shown).save(target / PICTURES)
    _draw_worst(evidence, shown).save(target / WORST)
    draw_report(folder, fields)


def draw_report(folder: Path, fields: dict[str, Any]) -> None:
    """Draw figures and page from the evidence and the sheets in the artifact's folder. Raises ArtifactError.

    Args:
        folder: the artifact, whose `report/` has evidence and sheets.
        fields: as for `write_report`.
    """
    target = folder / FOLDER
    report = report_from_manifest(fields, read_evidence(target))
    figures.draw(report, target)
    (folder / PAGE).write_text(page(report, target), encoding="utf-8")


def pictures_sheet(evidence: Evidence) -> Sheet:
    """The full run and every budget, the highest first, then the difference maps of those, then the best peers where
    their pictures were made; a row for each prompt.
    """
    count = len(evidence.budgets)
    peers = (count,) if evidence.peers else ()
    return Sheet(cell=evidence.cell, groups=(1 + count, count, *peers), rows=evidence.shown)


def worst_sheet(evidence: Evidence) -> Sheet:
    """Full run, budget and difference; rows are the worst prompts of each budget, the lowest first."""
    return Sheet(cell=evidence.cell, groups=(3,), rows=sum(len(entry.worst) for entry in evidence.budgets), margin=150)


def _draw_pictures(evidence: Evidence, shown: Shown) -> Image.Image:
    budgets = sorted(shown.budgets, reverse=True)
    maps = [
        [difference_map(picture, full) for picture, full in zip(shown.budgets[b], shown.full, strict=True)]
        for b in budgets
    ]
    labels = ["all steps", *(f"{budget} evaluations" for budget in budgets)]
    names = {each.budget: each.name for each in evidence.peers}
    return pictures_sheet(evidence).draw(
        [
            list(shown.full),
            *(list(shown.budgets[budget]) for budget in budgets),
            *maps,
            *(list(shown.peers[budget]) for budget in budgets if names),
        ],
        [*labels, *labels[1:], *(f"{names[budget]}, {budget}" for budget in budgets if names)],
        ["the same prompts and seeds", f"difference ×{AMPLIFICATION}", *([OWN_PEERS] if names else [])],
    )


def _draw_worst(evidence: Evidence, shown: Shown) -> Image.Image:
    columns: list[list[Any]] = [[], [], []]
    rows = []
    for entry in sorted(evidence.budgets, key=lambda entry: entry.budget):
        for index, full, own in zip(entry.worst, *shown.worst[entry.budget], strict=True):
            for column, picture in zip(columns, (full, own, difference_map(own, full)), strict=True):
                column.append(picture)
            rows.append(f"{entry.budget} evaluations\n{_decibels(entry.psnr_db[index])}")
    return worst_sheet(evidence).draw(
        columns, ["all steps", "budget", f"difference ×{AMPLIFICATION}"], ["held-out prompts of the lowest PSNR"], rows
    )


def page(report: Report, folder: Path) -> str:
    """The page, with the pictures of `folder` inside."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters.update(decibels=_decibels, sigma=lambda value: f"{value:.3g}")
    with Image.open(folder / PICTURES) as sheet, Image.open(folder / WORST) as worst:
        return environment.get_template(TEMPLATE).render(
            report=report,
            alternatives=alternatives(report),
            figure={name: _inline((folder / name).read_bytes()) for name in figures.FIGURES},
            bar=_inline(_png(colour_bar())),
            amplification=AMPLIFICATION,
            prompts=_prompts(report, sheet),
            worst=_worst(report, worst),
            size=report.evidence.cell,
            steps=_steps,
            latency_source=latency_source(report),
            ranked_by=RANKED_BY[report.conditions.objective],
            label=figures.label_of,
            peer=lambda entry, name: next((peer for peer in entry.peers if peer.name == name), None),
            spent=sum(each.full_runs for each in report.costs),
            evaluations=sum(each.evaluations for each in report.costs),
        )


def latency_source(report: Report) -> str:
    """Where the latencies come from, or why there are none."""
    again = "otc bench ARTIFACT --save, and then otc report ARTIFACT, put those of the host that serves here."
    bench = report.bench
    if bench is not None and bench.missing is None:
        versions = ", ".join(f"{name} {version}" for name, version in bench.versions.items())
        return (
            f"Latencies: median of {bench.requests} request{'s' * (bench.requests != 1)} at each budget, on the host "
            f"that compiled ({bench.host}), by “{bench.command}” with {versions}. {again}"
        )
    if report.has_latency:
        return "Latencies are those of the host that ran otc bench --save."
    reason = f" (“{bench.command}”: {bench.missing})" if bench is not None else ""
    return f"No latency was measured for this report{reason}: {again}"


def _inline(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _prompts(report: Report, image: Image.Image) -> list[dict[str, Any]]:
    """Of each shown prompt: its text, and its pictures as data URIs."""
    sheet = pictures_sheet(report.evidence)
    columns = list(reversed(report.budgets))

    def peer(row: int, column: int) -> dict[str, Any] | None:
        found = columns[column].shown_peer
        if found is None:
            return None
        picture = _inline(_png(sheet.cut(image, row, 1 + 2 * len(columns) + column)))
        return {"name": found.name, "psnr_db": found.psnr_db[row], "picture": picture}

    return [
        {
            "prompt": report.evidence.prompts[row],
            "seed": report.evidence.seeds[row],
            "full": _inline(_png(sheet.cut(image, row, 0))),
            "budgets": [
                {
                    "entry": entry,
                    "psnr_db": float(entry.psnr_db[row]),
                    "picture": _inline(_png(sheet.cut(image, row, 1 + column))),
                    "difference": _inline(_png(sheet.cut(image, row, 1 + len(columns) + column))),
                    "peer": peer(row, column),
                }
                for column, entry in enumerate(columns)
            ],
        }
        for row in range(report.evidence.shown)
    ]


def _worst(report: Report, image: Image.Image) -> list[dict[str, Any]]:
    """Of each budget, the highest first: its worst prompts with pictures as data URIs."""
    sheet = worst_sheet(report.evidence)
    found = []
    row = 0
    for entry in report.budgets:
        prompts = []
        for each in entry.worst:
            cells = [_inline(_png(sheet.cut(image, row, column))) for column in range(3)]
            prompts.append({"prompt": each, "full": cells[0], "picture": cells[1], "difference": cells[2]})
            row += 1
        found.append({"entry": entry, "prompts": prompts})
    return found[::-1]


def _decibels(value: float) -> str:
    return "the same" if value >= SAME_DB else f"{value:.1f} dB"


def _steps(report: Report, schedule: Sequence[int]) -> list[tuple[int, float]]:
    """Step indices with their values on the timeline."""
    return list(zip(schedule, report.timeline.values[list(schedule)].tolist(), strict=True))


def alternatives(report: Report) -> dict[str, str]:
    """What each figure shows, in words, for those who do not see it."""
    budgets = report.budgets

    def fidelity(metric: str, unit: str, digits: int) -> str:
        parts = [_at(entry, metric, digits) for entry in budgets]
        text = f"otcache: {', '.join(parts)}{unit}."
        peers = [entry for entry in budgets if entry.best_peer]
        if peers:
            text += (
                " Best peer: "
                + ", ".join(
                    f"{peer.name} {getattr(peer.quality, metric).mean:.{digits}f} at {entry.budget}"
                    for entry in peers
                    if (peer := entry.best_peer)
                )
                + unit
                + "."
            )
        return text

    def place(schedule: Sequence[int]) -> str:
        return ", ".join(f"{value:.3g}" for _, value in _steps(report, schedule))

    rows = [
        ("reference", report.reference.schedule),
        *((f"budget {e.budget}", e.schedule) for e in reversed(budgets)),
        ("anchor", report.anchor.schedule),
    ]
    name = report.timeline.name
    if report.has_latency:
        cost = "Measured seconds a picture: " + ", ".join(
            f"{entry.latency_s:.3g} at {entry.budget}" for entry in budgets if entry.latency_s is not None
        )
        cost += f", {report.full_latency_s:.3g} in the full run." if report.full_latency_s is not None else "."
    else:
        counts = (f"{entry.program.nfe} of {report.total} at budget {entry.budget}" for entry in budgets)
        cost = f"Model evaluations: {', '.join(counts)}."
    ends = ", ".join(f"{entry.errors[-1].mean():.2g} at {entry.budget}" for entry in budgets)
    placed_rows = "; ".join(f"{row}: {place(steps)}" for row, steps in rows)
    spent = ", ".join(f"{each.name} {each.full_runs:.2f}" for each in report.costs)
    return {
        "psnr.png": "PSNR to the full run against model evaluations. " + fidelity("psnr_db", " dB", 1),
        "ssim.png": "SSIM to the full run against model evaluations. " + fidelity("ssim", "", 3),
        "cost.png": cost,
        "schedules.png": f"Computed steps by {name}. {placed_rows}.",
        "quantiles.png": f"Quantile functions from share of the budget to {name}: reference, anchor, the path between "
        f"them, and the schedules of budgets {', '.join(str(entry.budget) for entry in budgets)}. Half of the budget "
        f"is spent at {name} {_half(report, 0.0)} by the reference and at {_half(report, 1.0)} by the anchor.",
        "trajectory.png": f"Relative error of the latents along the run, mean over prompts; at the end: {ends}.",
        "calibration.png": f"Full runs per calibration prompt by pass: {spent}.",
    }


def _at(entry: BudgetReport, metric: str, digits: int) -> str:
    return f"{getattr(entry.quality, metric).mean:.{digits}f} at {entry.budget}"


def _half(report: Report, weight: float) -> str:
    return f"{float(report.timeline.at(report.path(weight).quantile(0.5) * report.total)):.3g}"
