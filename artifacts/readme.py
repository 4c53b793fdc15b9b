"""Write the README's tables: `python -m otcache.artifacts.readme README.md`.

Results are those of the comparisons that are kept, what a compile needs is what `otc compile shapes --dry-run` counts.
`--pictures ARTIFACT` also copies pictures of an artifact's report beside this module, where the pages show them.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from otcache.artifacts.comparisons import HERE, model_name, read_comparisons, replace_section
from otcache.compiler.compare.cells import Cell, Comparison, peers_at
from otcache.schemas.manifest import MANIFEST_NAME, Manifest

MARKS = ("<!-- results: written by otcache.artifacts.readme -->", "<!-- end of results -->")
NEEDS_MARKS = ("<!-- needs: written by otcache.artifacts.readme -->", "<!-- end of needs -->")
BUDGETS = (4, 8, 16)
"""Evaluations that the README shows."""
FIGURES = {
    "pictures.png": ("pictures.png",),
    "schedules.png": ("schedules.png", "quantiles.png"),
}
"""Pictures of the pages, and those of the report that they are made of."""


STEPS, PROMPTS = 50, 64
"""Of a plain compile: steps of the full sampler, and prompts that are calibrated on or held out."""


@dataclass(frozen=True, kw_only=True)
class RealModel:
    """A model as it is published, with what follows from its shapes; nothing here was measured."""

    name: str
    parameters: float
    latents: int
    """Elements of one sample's latents."""
    evaluation_s: float
    """About what one evaluation (both branches of guidance) takes on an H100 in bfloat16, from its FLOPs."""


REAL_MODELS = (
    RealModel(name="FLUX.1, 1024²", parameters=11.9e9, latents=4096 * 64, evaluation_s=0.2),
    RealModel(name="Qwen-Image, 1328²", parameters=20.4e9, latents=6889 * 64, evaluation_s=1),
    RealModel(name="HunyuanVideo, 720p, 129 frames", parameters=12.8e9, latents=16 * 33 * 90 * 160, evaluation_s=30),
)


def results_table(comparisons: Sequence[Comparison], budgets: Sequence[int] = BUDGETS) -> str:
    """A row for each model and budget: otcache against the best PSNR and the best SSIM of all other methods."""
    lines = [
        "| model | evaluations | **otcache** | best PSNR of all others | best SSIM of all others |",
        "|---|---:|---:|---|---|",
    ]
    for comparison in comparisons:
        for budget in budgets:
            own = comparison.cell("otcache", budget)
            if own is None:
                continue
            peers = peers_at(comparison.cells, budget)
            psnr = max(peers, key=lambda cell: cell.psnr_db.mean)
            ssim = max(peers, key=lambda cell: cell.ssim.mean)
            lines.append(
                f"| `{model_name(comparison)}` | {budget} of {comparison.num_inference_steps} | **{_fidelity(own)}** | "
                f"{psnr.psnr_db.mean:.1f} dB, {psnr.method} | {ssim.ssim.mean:.4f}, {ssim.method} |"
            )
    return "\n".join(lines)


def _fidelity(cell: Cell) -> str:
    return f"{cell.psnr_db.mean:.1f} dB, {cell.ssim.mean:.4f}"


def count_evaluations(model: str = "shapes") -> int:
    """What a plain compile makes at most, by its dry run with an empty workspace: one sample each."""
    with tempfile.TemporaryDirectory() as folder:
        line = [sys.executable, "-m", "otcache.runtime.cli.main", "compile", model, "--dry-run", "--json"]
        done = subprocess.run(
            [*line, "-o", str(Path(folder) / "artifact")],
            env={**os.environ, "OTC_CACHE": folder},
            check=True,
            capture_output=True,
            text=True,
        )
    return int(json.loads(done.stdout)["evaluations"])


def needs_section(evaluations: int) -> str:
    """What a compile takes of real models, in Markdown."""
    rows = {
        "weights in bfloat16": [f"{_rounded(2 * model.parameters / 1e9)} GB" for model in REAL_MODELS],
        "one evaluation on an H100, about": [f"{model.evaluation_s:g} s" for model in REAL_MODELS],
        "a compile's evaluations, at most": [
            f"{_rounded(evaluations * model.evaluation_s / 3600)} hours" for model in REAL_MODELS
        ],
        "disk for the latents of its full runs": [
            f"{_rounded(4 * (STEPS + 2) * model.latents * PROMPTS / 1e9)} GB" for model in REAL_MODELS
        ],
    }
    return "\n".join(
        [
            f"A compile at 4, 8 and 16 of {STEPS} steps with 32 + 32 prompts makes at most {evaluations:,} evaluations",
            "of one sample (`otc compile shapes --dry-run`; of any model as many). The dry run times one on your host",
            "and says hours and disk. For scale, computed from the models' published shapes, not measured:",
            "",
            "| | " + " | ".join(model.name for model in REAL_MODELS) + " |",
            "|---|" + "---:|" * len(REAL_MODELS),
            *(f"| {name} | " + " | ".join(cells) + " |" for name, cells in rows.items()),
        ]
    )


def _rounded(value: float) -> str:
    """To two digits: `186.2` → `190`."""
    return f"{float(f'{value:.2g}'):g}"


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("readme", type=Path)
    parser.add_argument("--pictures", type=Path, metavar="ARTIFACT")
    options = parser.parse_args()
    text = options.readme.read_text(encoding="utf-8")
    text = replace_section(text, results_table(read_comparisons()), MARKS)
    text = replace_section(text, needs_section(count_evaluations()), NEEDS_MARKS)
    options.readme.write_text(text, encoding="utf-8")
    if options.pictures:
        manifest = Manifest.model_validate_json((options.pictures / MANIFEST_NAME).read_bytes())
        copy_pictures(options.pictures / "report", manifest.model.name, HERE / "pictures")
        samples = HERE / "models" / manifest.model.name / "samples.png"
        shutil.copyfile(samples, HERE / "pictures" / f"{manifest.model.name}-samples.png")


if __name__ == "__main__":
    main()
