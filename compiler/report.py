"""What people look at: the same prompts at every budget, schedules on the timeline, fidelity against peers.

Consumes the manifest's fields and pictures; writes PNG files and one HTML page that needs nothing else.
"""

from __future__ import annotations

import base64
import html
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from otcache.schemas.manifest import FULL

from .policy import policy_from_schedule, wasserstein_distance

matplotlib.use("Agg")
from matplotlib import pyplot as plt

ATTACHMENTS = frozenset({"report", "report.html"})
"""First parts of the paths that this module writes."""
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999")
"""Okabe and Ito's palette, which colour-blind readers can tell apart."""
MARKERS = "osD^vP*X"


def write_report(folder: Path, fields: dict[str, Any], pictures: dict[str, np.ndarray]) -> None:
    """Write `report.html` and `report/*.png` into an artifact's folder.

    pictures: of each budget and `full`, uint8 (n, height, width, 3), the same prompts and seeds.
    """
    target = folder / "report"
    target.mkdir(exist_ok=True)
    budgets = sorted((name for name in pictures if name != FULL), key=int)
    picture_grid({name: pictures[name] for name in [FULL, *reversed(budgets)]}).save(target / "pictures.png")
    _draw_schedules(fields, target / "schedules.png")
    _draw_quality(fields, target / "quality.png")
    (folder / "report.html").write_text(_page(fields, target), encoding="utf-8")


def picture_grid(columns: dict[str, np.ndarray], *, cell: int = 144, gap: int = 6, head: int = 26) -> Image.Image:
    """One labelled column per entry, one row per picture, enlarged to `cell` pixels where they are smaller."""
    rows = len(next(iter(columns.values())))
    width = gap + len(columns) * (cell + gap)
    sheet = Image.new("RGB", (width, head + gap + rows * (cell + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=15)
    for position, (name, pictures) in enumerate(columns.items()):
        left = gap + position * (cell + gap)
        label = "all steps" if name == FULL else f"{name} evaluations"
        draw.text((left + cell / 2, head / 2 + 3), label, fill="#222222", font=font, anchor="mm")
        for row, picture in enumerate(pictures):
            image = Image.fromarray(picture).resize((cell, cell), Image.Resampling.BICUBIC)
            sheet.paste(image, (left, head + gap + row * (cell + gap)))
    return sheet


def _draw_schedules(fields: dict[str, Any], path: Path) -> None:
    total = fields["sampler"]["num_inference_steps"]
    entries = [entry for entry in fields["programs"] if entry["budget"] != FULL]
    rows: list[tuple[str, list[int]]] = [("reference", fields["reference"]["schedule"])]
    rows += [
        (f"budget {e['budget']}", [s["step_index"] for s in e["program"]["steps"] if s["compute"]])
        for e in sorted(entries, key=lambda entry: -int(entry["budget"]))
    ]
    rows.append(("anchor", fields["anchor"]["schedule"]))
    figure, (line, curve) = plt.subplots(1, 2, figsize=(11, 3.6), width_ratios=(1.7, 1), layout="constrained")
    for row, (name, schedule) in enumerate(rows):
        colour = COLOURS[row % len(COLOURS)]
        line.axhline(-row, color="#dddddd", lw=1, zorder=0)
        line.plot(schedule, [-row] * len(schedule), MARKERS[row % len(MARKERS)], color=colour, ms=7)
        policy = policy_from_schedule(schedule, total)
        levels = np.linspace(0, 1, 201)
        curve.plot(levels, policy.quantile(levels), color=colour, lw=1.8, label=name, ls="-" if row % 2 == 0 else "--")
    line.set_yticks([-row for row in range(len(rows))], [name for name, _ in rows])
    line.set_xlim(-1, total)
    line.set_xlabel("step of the full sampler")
    line.set_title("steps at which the blocks are computed")
    curve.set_xlabel("share of the budget")
    curve.set_ylabel("position on the timeline")
    curve.set_title("policies as quantile functions")
    curve.legend(fontsize=8, frameon=False)
    for axis in (line, curve):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_quality(fields: dict[str, Any], path: Path) -> None:
    entries = sorted((e for e in fields["programs"] if e.get("quality")), key=lambda entry: int(entry["budget"]))
    budgets = [int(entry["budget"]) for entry in entries]
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
    for axis, metric, label in (
        (axes[0], "psnr_db", "PSNR to the full run (dB)"),
        (axes[1], "ssim", "SSIM to the full run"),
    ):
        mean = np.array([entry["quality"][metric]["mean"] for entry in entries])
        std = np.array([entry["quality"][metric]["std"] for entry in entries])
        axis.fill_between(budgets, mean - std, mean + std, color=COLOURS[0], alpha=0.15, lw=0)
        axis.plot(budgets, mean, "o-", color=COLOURS[0], lw=2.5, label="otcache", zorder=5)
        names = list(dict.fromkeys(peer["name"] for entry in entries for peer in entry["baselines"]))
        for index, name in enumerate(names, start=1):
            found = [
                (int(e["budget"]), p["quality"][metric]["mean"])
                for e in entries
                for p in e["baselines"]
                if p["name"] == name
            ]
            axis.plot(
                *zip(*found, strict=True),
                MARKERS[index % len(MARKERS)] + "--",
                color=COLOURS[index % len(COLOURS)],
                lw=1.2,
                ms=5,
                label=name,
            )
        axis.set_xlabel("model evaluations")
        axis.set_ylabel(label)
        axis.set_xticks(budgets)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#eeeeee")
    axes[0].legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _distances(fields: dict[str, Any]) -> str:
    """How far each policy is from the reference's, through POT."""
    total = fields["sampler"]["num_inference_steps"]
    reference = policy_from_schedule(fields["reference"]["schedule"], total)
    schedules = {
        f"budget {entry['budget']}": [step["step_index"] for step in entry["program"]["steps"] if step["compute"]]
        for entry in sorted((e for e in fields["programs"] if e["budget"] != FULL), key=lambda e: -int(e["budget"]))
    }
    schedules["anchor"] = fields["anchor"]["schedule"]
    return ", ".join(
        f"{name} {wasserstein_distance(reference, policy_from_schedule(schedule, total)):.3f}"
        for name, schedule in schedules.items()
    )


def _page(fields: dict[str, Any], folder: Path) -> str:
    def picture(name: str, text: str) -> str:
        data = base64.b64encode((folder / name).read_bytes()).decode()
        return f'<img src="data:image/png;base64,{data}" alt="{html.escape(text)}">'

    total = fields["sampler"]["num_inference_steps"]
    entries = sorted((e for e in fields["programs"] if e.get("quality")), key=lambda entry: int(entry["budget"]))
    names = list(dict.fromkeys(peer["name"] for entry in entries for peer in entry["baselines"]))
    head = "".join(f"<th>{html.escape(name)}</th>" for name in ("budget", "otcache", "worst", "SSIM", *names))
    body = ""
    for entry in entries:
        peers = {peer["name"]: peer["quality"]["psnr_db"]["mean"] for peer in entry["baselines"]}
        quality = entry["quality"]
        cells = [
            entry["budget"],
            f"<b>{quality['psnr_db']['mean']:.1f}</b>",
            f"{quality['psnr_db']['worst']:.1f}",
            f"{quality['ssim']['mean']:.3f}",
        ]
        cells += [f"{peers[name]:.1f}" if name in peers else "–" for name in names]
        body += "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
    candidates = ""
    for entry in entries:
        for candidate in entry["candidates"]:
            weight = "" if candidate["weight"] is None else f"{candidate['weight']:.2f}"
            mark = "✓" if candidate["chosen"] else ""
            candidates += (
                f"<tr><td>{entry['budget']}</td><td>{mark}</td><td class=l>{html.escape(candidate['name'])}</td><td>{candidate['payload']}</td>"
                f"<td>{weight}</td><td>{candidate['psnr_db']:.2f}</td><td>{candidate['ssim']:.4f}</td>"
                f"<td class=l>{' '.join(map(str, candidate['schedule']))}</td></tr>"
            )
    costs = "".join(
        f"<tr><td class=l>{html.escape(c['name'])}</td><td>{c['full_runs']:.2f}</td></tr>" for c in fields["costs"]
    )
    spent = sum(cost["full_runs"] for cost in fields["costs"])
    model, conditions = fields["model"], fields["conditions"]
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>otcache: {html.escape(model["name"])}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 62rem; padding: 1rem; color: #222; background: #fff }}
img {{ max-width: 100%; height: auto }} h1 {{ font-size: 1.5rem }} h2 {{ font-size: 1.15rem; margin-top: 2rem }}
.scroll {{ overflow-x: auto }} table {{ border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums }}
th, td {{ padding: .2rem .6rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap }} .l {{ text-align: left }}
@media print {{ h2 {{ break-after: avoid }} .scroll {{ overflow: visible }} }}
</style></head><body>
<h1>{html.escape(model["name"])}: {total} steps in {", ".join(entry["budget"] for entry in entries)}</h1>
<p>{html.escape(model["pipeline"])}, {html.escape(fields["sampler"]["scheduler"])}, guidance {fields["guidance"]["minimum"]:g}{"" if fields["guidance"]["minimum"] == fields["guidance"]["maximum"] else f" to {fields['guidance']['maximum']:g}"},
{conditions["width"]} × {conditions["height"]} pixels. Calibrated on {conditions["calibration_prompts"]} prompts, measured on {conditions["evaluation_prompts"]} others with other seeds.</p>
<h2>The same prompts and seeds at every budget</h2>
{picture("pictures.png", "held-out prompts: all steps beside every budget")}
<h2>Fidelity to the full run, against peers at the same number of evaluations</h2>
{picture("quality.png", "PSNR and SSIM against budget")}
<div class="scroll"><table><tr>{head}</tr>{body}</table></div><p>PSNR in dB, mean over held-out prompts; <i>worst</i> is the worst prompt of otcache.</p>
<h2>Schedules</h2>
{picture("schedules.png", "schedules on the timeline and their quantile functions")}
<p>W<sub>2</sub> from the reference policy, as a share of the timeline: {_distances(fields)}.</p>
<h2>Candidates, on the calibration set</h2>
<div class="scroll"><table><tr><th>budget</th><th></th><th class=l>candidate</th><th>payload</th><th>weight</th><th>PSNR</th><th>SSIM</th><th class=l>schedule</th></tr>{candidates}</table></div>
<h2>What compiling cost</h2>
<div class="scroll"><table><tr><th class=l>pass</th><th>full runs per prompt</th></tr>{costs}<tr><td class=l><b>all</b></td><td><b>{spent:.2f}</b></td></tr></table></div>
</body></html>
"""
