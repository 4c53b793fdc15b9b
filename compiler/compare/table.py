"""A comparison as files: JSON, and tables in Markdown; `picture` draws it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from otcache.schemas.whole_files import write_whole

from .cells import AHEAD_DB, DEFAULT, FURTHER, WORST_DB, AtScale, Claim, Comparison, Robustness
from .picture import draw_comparison

OUTSIDE = "†"
"""Marks what is outside the published range."""


def write_comparison(comparison: Comparison, folder: Path) -> None:
    """Write comparison.json (last: its presence means that all is there), comparison.md and comparison.png."""
    folder.mkdir(parents=True, exist_ok=True)
    draw_comparison(comparison, folder / "comparison.png")
    write_whole(folder / "comparison.md", markdown(comparison))
    write_whole(folder / "comparison.json", json.dumps(comparison.json(), indent=1) + "\n")


def markdown(comparison: Comparison) -> str:
    """Everything that was measured, as Markdown tables."""
    parts = [
        f"PSNR in dB (SSIM) to the full {comparison.num_inference_steps} steps of `{comparison.model}` "
        f"({comparison.pipeline}, guidance {comparison.guidance_scale:g}), mean over {comparison.prompts} held-out "
        f"prompts and seeds; {comparison.calibration_prompts} others were calibrated on.",
        fidelity_table(comparison),
        *published_parts(comparison),
        *lpips_parts(comparison),
        "Against the best other method at each budget:",
        verdict_table(comparison),
    ]
    if any(cell.blocks_mean is not None for cell in comparison.cells):
        parts += [
            "What a picture costs: full runs of the blocks, of which some methods compute a few at every step, and "
            "seconds of sampling one picture:",
            cost_table(comparison),
        ]
    if comparison.claims:
        parts += [
            "Schedules of several ways, each with the same closed-loop fit, on the held-out prompts:",
            claim_table(comparison),
            claim_words(comparison.claims),
        ]
    if comparison.robustness:
        parts += robustness_tables(comparison.robustness)
    parts += [
        f"Calibration took {sum(comparison.costs.values()):.1f} full runs per prompt"
        + (f"; LeMiCa's graph alone {comparison.lemica_full_runs:.0f}." if comparison.lemica_full_runs else ".")
    ]
    parts += spent_parts(comparison)
    if comparison.skipped:
        reasons: dict[tuple[str, str], list[str]] = {}
        for skipped in comparison.skipped:
            reasons.setdefault((skipped.method, skipped.reason), []).append(str(skipped.budget))
        parts.append(
            "Not measured: " + "; ".join(f"{m} at {', '.join(b)} ({r})" for (m, r), b in reasons.items()) + "."
        )
    return "\n\n".join(parts) + "\n"


def fidelity_table(comparison: Comparison) -> str:
    """A row per method; adaptive ones with their mean evaluations where these differ from the budget."""
    lines = [
        "| method | " + " | ".join(f"B = {budget}" for budget in comparison.budgets) + " |",
        "|---|" + "---:|" * len(comparison.budgets),
    ]
    for method in dict.fromkeys(cell.method for cell in comparison.cells):
        row = [f"**{method}**" if method == DEFAULT else method]
        for budget in comparison.budgets:
            cell = comparison.cell(method, budget)
            if cell is None:
                row.append("–")
                continue
            text = f"{cell.psnr_db.mean:.1f}"
            text = f"**{text}**" if cell.psnr_db.mean == comparison.best_psnr_db(budget) else text
            text += OUTSIDE if comparison.outside_published(method, budget) else ""
            nfe = "" if abs(cell.nfe_mean - budget) < 0.05 else f", {cell.nfe_mean:.1f} evaluations"
            row.append(f"{text} ({cell.ssim.mean:.3f}{nfe})")
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def published_parts(comparison: Comparison) -> list[str]:
    """What the mark on cells and verdicts says, with the ranges it goes by; nothing where no cell has it."""
    outside = [
        method
        for method in comparison.published
        if any(comparison.outside_published(method, cell.budget) for cell in comparison.cells if cell.method == method)
    ]
    if not outside:
        return []
    ranges = [
        f"{method} {evaluations}" + (f" of {steps}" if steps else "")
        for method in outside
        for evaluations, steps in [comparison.published[method]]
    ]
    return [
        f"{OUTSIDE} outside the published range: fewer evaluations than the method's paper or release shows, which is "
        f"at least {', '.join(ranges)}."
    ]


def spent_parts(comparison: Comparison) -> list[str]:
    """What measuring all this took, where that was counted."""
    counted = [cell for cell in comparison.cells if cell.spent is not None]
    spent = {"the methods' cells": [cell.spent for cell in counted if cell.spent is not None]}
    spent |= {name: [each] for name, each in comparison.sections.items()}
    words = [
        f"{name} {sum(each.seconds for each in found) / 3600:.2f} hours and "
        f"{sum(each.evaluations for each in found):,.0f} evaluations"
        for name, found in spent.items()
        if found
    ]
    if not words:
        return []
    left = len(comparison.cells) - len(counted)
    threads = comparison.threads or 1
    return [
        f"What this comparison cost, on {threads} thread{'s' if threads > 1 else ''}, evaluations of one sample each: "
        + "; ".join(words)
        + (f" ({left} of {len(comparison.cells)} cells were measured before that was counted)" if left else "")
        + ". The compile itself is not among it."
    ]


def lpips_parts(comparison: Comparison) -> list[str]:
    """LPIPS with a line above it, a row per method; nothing where it was not measured."""
    measured = [cell for cell in comparison.cells if cell.lpips is not None]
    if not measured:
        return []
    lines = [
        "| method | " + " | ".join(f"B = {budget}" for budget in comparison.budgets) + " |",
        "|---|" + "---:|" * len(comparison.budgets),
    ]
    lowest = {
        budget: min((c.lpips for c in measured if c.budget == budget and c.lpips is not None), default=None)
        for budget in comparison.budgets
    }
    for method in dict.fromkeys(cell.method for cell in measured):
        row = [f"**{method}**" if method == DEFAULT else method]
        for budget in comparison.budgets:
            cell = comparison.cell(method, budget)
            value = None if cell is None else cell.lpips
            text = "–" if value is None else f"{value:.4f}"
            row.append(f"**{text}**" if value is not None and value == lowest[budget] else text)
        lines.append("| " + " | ".join(row) + " |")
    return ["LPIPS to the full run, lower is closer, mean over the same prompts:", "\n".join(lines)]


def cost_table(comparison: Comparison) -> str:
    """A row per method: blocks that it runs, in full runs of all of them, and seconds a picture."""
    lines = [
        "| method | " + " | ".join(f"B = {budget}" for budget in comparison.budgets) + " |",
        "|---|" + "---:|" * len(comparison.budgets),
    ]
    for method in dict.fromkeys(cell.method for cell in comparison.cells):
        cells = [comparison.cell(method, budget) for budget in comparison.budgets]
        row = [f"**{method}**" if method == DEFAULT else method]
        row += ["–" if c is None or c.blocks_mean is None else f"{c.blocks_mean:.1f}, {c.seconds:.2f} s" for c in cells]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def verdict_table(comparison: Comparison) -> str:
    """Whether the default is ahead, budget by budget; at equal blocks as well, where these were counted."""
    columns = ["budget", DEFAULT, "best other", "ahead by", "SSIM ahead by", "worst prompt"]
    columns += [f"best other at {FURTHER:g}·B", "must", "aim", f"worst within {WORST_DB:g} dB"]
    rules = ["---:", "---:", "---", "---:", "---:", "---:", "---", "---", "---", "---"]
    counted = any(verdict.blocks_peer is not None for verdict in comparison.verdicts)
    if counted:
        columns, rules = [*columns, "at equal blocks"], [*rules, "---"]
    lines = ["| " + " | ".join(columns) + " |", "|" + "|".join(rules) + "|"]
    for v in comparison.verdicts:
        mark = OUTSIDE if comparison.outside_published(v.best_peer, v.budget) else ""
        row = [f"{v.budget}", f"{v.psnr_db:.1f}", f"{v.best_peer} {v.best_peer_psnr_db:.1f}{mark}"]
        row += [f"{v.ahead_db:+.1f} dB"]
        row += [f"{v.ssim_ahead:+.4f}", f"{v.worst_prompt_db:+.1f} dB", _gap(v.further_ahead_db, v.further_peer)]
        row += [_yes(v.must), _yes(v.aim), _yes(v.worst_within)]
        row += [_gap(v.blocks_ahead_db, v.blocks_peer)] if counted else []
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def _gap(ahead_db: float | None, peer: str | None) -> str:
    return "–" if ahead_db is None else f"{ahead_db:+.1f} dB to {peer}"


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def robustness_tables(found: Robustness) -> list[str]:
    """Guidance and calibration prompts, each with a line above it."""
    parts = []
    if found.at_scales:
        low, high = found.guidance_range
        parts.append(
            f"One program of {found.budget} evaluations, calibrated across guidance {low:g} to {high:g}, against the "
            "best peers calibrated at the scale itself:"
        )
        rows = ["| guidance | " + DEFAULT + " | best other | ahead by | worst prompt |", "|---:|---:|---|---:|---:|"]
        rows += [
            f"| {row.guidance_scale:g} | {row.psnr_db.mean:.1f} ({row.ssim.mean:.3f}) | {row.best_peer} "
            f"{row.best_peer_psnr_db.mean:.1f} ({row.best_peer_ssim.mean:.3f}) | {row.ahead_db:+.1f} dB | "
            f"{row.psnr_db.worst - row.best_peer_psnr_db.worst:+.1f} dB |"
            for row in found.at_scales
        ]
        parts.append("\n".join(rows))
        parts.append(scale_words(found.at_scales))
    parts.append(f"The same held-out prompts at {found.budget} evaluations, by the number of calibration prompts:")
    rows = ["| calibration prompts | PSNR | SSIM | worst prompt |", "|---:|---:|---:|---:|"]
    rows += [
        f"| {row.calibration_prompts} | {row.psnr_db.mean:.1f} dB | {row.ssim.mean:.4f} | {row.psnr_db.worst:.1f} dB |"
        for row in found.calibrated
    ]
    return [*parts, "\n".join(rows)]


def claim_table(comparison: Comparison) -> str:
    """Interpolated, graph and searched schedules: PSNR, and the distance of their policies."""
    ways = list(dict.fromkeys(claim.way for claim in comparison.claims))
    lines = ["| budget | " + " | ".join(ways) + " |", "|---:|" + "---:|" * len(ways)]
    for budget in dict.fromkeys(claim.budget for claim in comparison.claims):
        found = {claim.way: claim for claim in comparison.claims if claim.budget == budget}
        row = [
            f"{found[way].psnr_db:.1f} (W₂ {found[way].w2_to_interpolated:.3f})" if way in found else "–"
            for way in ways
        ]
        lines.append(f"| {budget} | " + " | ".join(row) + " |")
    return "\n".join(lines)


def claim_words(claims: Sequence[Claim]) -> str:
    """What came out of the paper's claim: how every schedule without a search of its own does against every search."""
    ways = list(dict.fromkeys(claim.way for claim in claims))
    searches = [way for way in ways if way.startswith("search")]
    lines = []
    for way in (way for way in ways if way not in searches):
        gaps = {search: psnr_gaps(claims, way, search) for search in searches}
        kept = [search for search, found in gaps.items() if _average(found) >= -AHEAD_DB]
        matched = "every search" if kept == searches else f"the {' and the '.join(kept)} only" if kept else "no search"
        against = [f"{_average(found):+.1f} dB to the {search} ({_listed(found)})" for search, found in gaps.items()]
        lines.append(f"* {way}: matches {matched}. {'; '.join(against)}.")
    rule = f"What is on average no more than {AHEAD_DB:g} dB behind a search matches it:"
    return "\n".join([rule, "", *lines])


def psnr_gaps(claims: Sequence[Claim], way: str, search: str) -> dict[int, float]:
    """PSNR of one way less that of another, in dB, at every budget that has both."""
    found = {(claim.way, claim.budget): claim.psnr_db for claim in claims}
    budgets = dict.fromkeys(claim.budget for claim in claims)
    return {b: found[way, b] - found[search, b] for b in budgets if (way, b) in found and (search, b) in found}


def _average(gaps: Mapping[int, float]) -> float:
    return sum(gaps.values()) / len(gaps)


def _listed(gaps: Mapping[int, float]) -> str:
    return ", ".join(f"{gap:+.1f} at {budget}" for budget, gap in gaps.items())


def scale_words(rows: Sequence[AtScale]) -> str:
    """Whether the advantage holds at every guidance scale."""
    missed = [f"{row.guidance_scale:g}" for row in rows if not row.ahead]
    if missed:
        return f"The advantage does not hold at guidance {' and '.join(missed)}."
    least = min(row.ahead_db for row in rows)
    return f"The advantage holds at every one of them: {least:+.1f} dB at least, with an SSIM that is not lower."
