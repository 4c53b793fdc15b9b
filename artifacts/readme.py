"""Write the README's results from a compiled artifact: `python -m otcache.artifacts.readme artifacts/shapes README.md`.

Also puts the report's pictures beside this module, where the README shows them.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from PIL import Image

from otcache.schemas.manifest import FULL, MANIFEST_NAME, BudgetProgram, Manifest

BEGIN, END = "<!-- results: written by otcache.artifacts.readme -->", "<!-- end of results -->"
PICTURES = Path(__file__).parent / "pictures"
FIGURES = {
    "pictures.png": ("pictures.png",),
    "quality.png": ("psnr.png", "ssim.png"),
    "schedules.png": ("schedules.png", "quantiles.png"),
}
"""Pictures of the README, and those of the report that they are made of."""


def results(manifest: Manifest, check: dict[str, float]) -> str:
    """The results section in Markdown."""
    entries = [entry for name in manifest.budgets if name != FULL and (entry := manifest.program(name)) is not None]
    names = list(dict.fromkeys(peer.name for entry in entries for peer in entry.baselines))
    conditions, total = manifest.conditions, manifest.sampler.num_inference_steps
    lines = [
        f"PSNR in dB to the full {total} steps of `{manifest.model.name}` at guidance {manifest.guidance.scale:g}, mean over "
        f"{conditions.evaluation_prompts} held-out prompts and seeds ({conditions.calibration_prompts} others were calibrated on):",
        "",
        "| evaluations | **otcache** | " + " | ".join(names) + " | ahead by | SSIM (best peer) |",
        "|---:|---:|" + "---:|" * len(names) + "---:|---:|",
    ]
    lines += [_row(entry, names) for entry in entries]
    spent = sum(cost.full_runs for cost in manifest.costs)
    followed = ", ".join(f"{name} {100 * share:.0f} %" for name, share in check.items())
    lines += [
        "",
        f"Compiling took {spent:.1f} full runs per calibration prompt. The exported chain differs from torch by "
        f"{manifest.max_relative_error:.0e} of the largest output. The model's pictures follow their captions (measured on the "
        f"pixels of 64): {followed}.",
    ]
    return "\n".join(lines)


def _row(entry: BudgetProgram, names: list[str]) -> str:
    assert entry.quality is not None
    peers = {peer.name: peer.quality for peer in entry.baselines}
    best = max(quality.psnr_db.mean for quality in peers.values())
    ssim = max(quality.ssim.mean for quality in peers.values())
    own = entry.quality
    cells = [entry.budget, f"**{own.psnr_db.mean:.1f}**"]
    cells += [f"{peers[name].psnr_db.mean:.1f}" if name in peers else "–" for name in names]
    cells += [f"{own.psnr_db.mean - best:+.1f}", f"{own.ssim.mean:.4f} ({ssim:.4f})"]
    return "| " + " | ".join(cells) + " |"


def rewrite(readme: str, section: str, marks: tuple[str, str] = (BEGIN, END)) -> str:
    """The README with the section between two marks replaced. Raises ValueError when they are missing."""
    before, begin, rest = readme.partition(marks[0])
    _, end, after = rest.partition(marks[1])
    if not begin or not end:
        raise ValueError(f"the README has no section between {marks[0]!r} and {marks[1]!r}")
    return f"{before}{begin}\n{section}\n{end}{after}"


def main() -> None:
    if len(sys.argv) != 3:
        raise SystemExit("usage: python -m otcache.artifacts.readme ARTIFACT README")
    artifact, readme = Path(sys.argv[1]), Path(sys.argv[2])
    manifest = Manifest.model_validate_json((artifact / MANIFEST_NAME).read_bytes())
    model = Path(__file__).parent / "models" / manifest.model.name
    check = json.loads((model / "check.json").read_text())
    readme.write_text(rewrite(readme.read_text(encoding="utf-8"), results(manifest, check)), encoding="utf-8")
    copy_pictures(artifact / "report", manifest.model.name, PICTURES)
    shutil.copyfile(model / "samples.png", PICTURES / f"{manifest.model.name}-samples.png")


def copy_pictures(report: Path, model: str, target: Path) -> None:
    """From an artifact's report to `target`: figures that belong together beside each other."""
    target.mkdir(exist_ok=True)
    for name, parts in FIGURES.items():
        if len(parts) == 1:
            shutil.copyfile(report / parts[0], target / f"{model}-{name}")
            continue
        images = [Image.open(report / part).convert("RGB") for part in parts]
        whole = Image.new("RGB", (sum(i.width for i in images), max(i.height for i in images)), "white")
        left = 0
        for image in images:
            whole.paste(image, (left, 0))
            left += image.width
        whole.save(target / f"{model}-{name}")


if __name__ == "__main__":
    main()
