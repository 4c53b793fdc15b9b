"""`otc inspect`: what an artifact holds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from otcache.schemas.manifest import FULL, BudgetProgram, Manifest, TensorInfo
from otcache.schemas.segments import Granularity
from otcache.schemas.targets import TIERS, tiers_of

from ..loop.backend import MOST_SAMPLES
from ..messages import one_line, readable_size
from .engine_tables import engine_summaries, engines_table, memory_summary, memory_tables
from .options import artifact_argument, granularity_option, json_option, size_options
from .options import print_json as _print_json
from .whole_tables import print_whole


@click.command(
    epilog="""\b
Examples:
  otc inspect artifacts/shapes
  otc inspect artifacts/shapes --json | jq .budgets
  otc inspect artifacts/shapes --memory --images 4 --granularity trunk
  otc inspect artifacts/mine --memory --height 768 --width 512
"""
)
@artifact_argument
@click.option(
    "--memory", is_flag=True, help="Show the device memory of each budget at a size, and every address, instead."
)
@click.option(
    "-n", "--images", type=click.IntRange(1, MOST_SAMPLES), default=1, show_default=True, help="At once, for --memory."
)
@size_options
@granularity_option
@json_option
def inspect(
    artifact: Path,
    memory: bool,
    images: int,
    size: dict[str, int | None],
    granularity: Granularity,
    as_json: bool,
) -> None:
    """Show what ARTIFACT holds: model, stages, engines, budgets, quality and every schedule."""
    from ..artifact.reader import Artifact
    from ..serving.request_size import Sizes

    whole = Artifact.open(artifact)
    manifest = whole.manifest
    if memory:
        sized = Sizes(whole).at(size).manifest
        if as_json:
            _print_json(memory_summary(sized, images, granularity))
        else:
            _print_tables(memory_tables(sized, images, granularity))
    elif as_json:
        _print_json(summary(manifest))
    else:
        _print_manifest(manifest)


def timeline(schedule: tuple[int, ...], total: int, width: int = 64) -> str:
    """A schedule on a line of at most `width` characters: the height of a block is the share of computed steps."""
    cells = min(total, width)
    blocks = "·▁▂▃▄▅▆▇█"
    computed, sizes = [0] * cells, [0] * cells
    for index in range(total):
        cell = index * cells // total
        sizes[cell] += 1
        computed[cell] += index in schedule
    return "".join(blocks[-(-8 * some // size)] for some, size in zip(computed, sizes, strict=True))


def summary(manifest: Manifest) -> dict[str, Any]:
    """What `otc inspect --json` prints."""

    sizes = {entry.path: entry.size_bytes for entry in manifest.files}
    stages = [{**stage.model_dump(mode="json"), "size_bytes": sizes[stage.onnx]} for stage in manifest.stages]
    budgets = [_budget_summary(entry) for name in manifest.budgets if (entry := manifest.program(name))]
    parts = (
        "schema_version",
        "digest",
        "producer",
        "model",
        "sampler",
        "conditions",
        "guidance",
        "reference",
        "anchor",
        "shapes",
        "costs",
        "measurements",
    )
    dumped = manifest.model_dump(mode="json", include=set(parts))
    files = {"count": len(manifest.files), "size_bytes": sum(sizes.values())}
    engines = engine_summaries(manifest)
    return {
        **{part: dumped[part] for part in parts},
        "engines": engines,
        "stages": stages,
        "budgets": budgets,
        "tiers": _tiers_summary(manifest),
        "files": files,
    }


def _budget_summary(entry: BudgetProgram) -> dict[str, Any]:
    dumped = entry.model_dump(mode="json", exclude={"program"})
    program = entry.program
    return {
        "budget": entry.budget,
        "payload": program.payload,
        "nfe": program.nfe,
        "steps": len(program.steps),
        "schedule": list(program.schedule),
        **{key: dumped[key] for key in ("quality", "candidates", "baselines")},
    }


def _tiers_summary(manifest: Manifest) -> dict[str, Any]:
    """Of every tier what it asks for, the budget that is served, and that one's figures; empty without figures."""
    if all(entry.quality is None for entry in manifest.programs):
        return {}
    return {
        name: {
            "target": TIERS[name],
            "budget": FULL if entry is None else entry.budget,
            "quality": entry.quality.model_dump(mode="json") if entry and entry.quality else None,
        }
        for name, entry in tiers_of(manifest.programs).items()
    }


def _tiers_table(manifest: Manifest) -> Table:
    """What `otc run --quality` serves by name."""
    table = Table(title="Tiers", title_justify="left", box=None)
    for heading in ("tier", "asks for", "budget", "PSNR dB", "worst", "SSIM"):
        table.add_column(heading, justify="left" if heading in ("tier", "asks for") else "right")
    for name, entry in tiers_of(manifest.programs).items():
        table.add_row(name, TIERS[name], FULL if entry is None else entry.budget, *_figures(entry))
    return table


def _print_tables(tables: Sequence[Any]) -> None:
    console = Console(highlight=False)
    for table in tables:
        print_whole(console, table)


def _print_manifest(manifest: Manifest) -> None:
    from .engine_tables import size_lines

    console = Console(highlight=False)
    model, sampler, conditions, guidance = manifest.model, manifest.sampler, manifest.conditions, manifest.guidance
    scale = f"{guidance.kind} {guidance.scale:g} (served {guidance.minimum:g} to {guidance.maximum:g})"
    for name, value in (
        ("model", f"{model.name} ({model.pipeline}, {model.transformer})"),
        ("sampler", f"{sampler.scheduler}, {sampler.num_inference_steps} steps"),
        ("guidance", scale if guidance.kind != "none" else "none"),
        ("pictures", f"{conditions.width} × {conditions.height}, {conditions.dtype}"),
        *(("sizes", text) for text in size_lines(manifest)),
        ("calibrated", f"{conditions.calibration_prompts} prompts for {conditions.objective}, seed {conditions.seed}"),
        ("digest", manifest.digest),
    ):
        console.print(f"{name:<10}  {_safe(value)}", soft_wrap=True)  # a digest is copied as one
    print_whole(console, _stages_table(manifest), _stages_list(manifest))
    if manifest.engines:
        print_whole(console, engines_table(manifest))
    budgets = Table(title="Budgets", title_justify="left", box=None)
    for heading in ("budget", "payload", "PSNR dB", "worst", "SSIM", "schedule"):
        budgets.add_column(heading, no_wrap=True, justify="left" if heading in ("payload", "schedule") else "right")
    width = max(8, console.width - 46)
    for name in manifest.budgets:
        if entry := manifest.program(name):
            budgets.add_row(*_budget_row(entry, sampler.num_inference_steps, width))
    print_whole(console, budgets)
    if _tiers_summary(manifest):
        print_whole(console, _tiers_table(manifest))


def _stages_table(manifest: Manifest) -> Table:
    """A row for each stage, which breaks between a tensor's name and its shape alone."""
    sizes = {entry.path: entry.size_bytes for entry in manifest.files}
    stages = Table(title="Stages", title_justify="left", box=None)
    for heading in ("stage", "kind", "reads", "writes", "size", "error"):
        figure = heading in ("size", "error")
        stages.add_column(heading, justify="right" if figure else "left", no_wrap=figure)
    for stage in manifest.stages:
        reads, writes = ("\n".join(_safe(_tensor(t)) for t in side) for side in (stage.inputs, stage.outputs))
        error = f"{stage.max_relative_error:.1e}"
        stages.add_row(_safe(stage.name), stage.kind, reads, writes, readable_size(sizes[stage.onnx]), error)
    return stages


def _stages_list(manifest: Manifest) -> str:
    """The same below one another, for narrow terminals."""
    sizes = {entry.path: entry.size_bytes for entry in manifest.files}
    lines = ["Stages"]
    for stage in manifest.stages:
        size, error = readable_size(sizes[stage.onnx]), f"{stage.max_relative_error:.1e}"
        lines.append(f" {_safe(stage.name)}  {stage.kind}, {size}, error {error}")
        for word, side in (("reads", stage.inputs), ("writes", stage.outputs)):
            lines += [f"  {word:<6}  {_safe(_tensor(tensor))}" for tensor in side]
    return "\n".join(lines)


def _safe(value: object) -> str:
    return escape(one_line(value))


def _tensor(tensor: TensorInfo) -> str:
    """`hidden batch×64×128`; the type is named unless it is float32."""
    dtype = "" if tensor.dtype == "float32" else f" {tensor.dtype}"
    return f"{tensor.name}{dtype} {'×'.join(map(str, tensor.shape)) or 'scalar'}"


def _budget_row(entry: BudgetProgram, total: int, width: int) -> tuple[str, ...]:
    line = timeline(entry.program.schedule, total, min(width, 100))
    return (entry.budget, entry.program.payload, *_figures(entry), line)


def _figures(entry: BudgetProgram | None) -> tuple[str, str, str]:
    """Mean and worst PSNR in dB, and SSIM, of held-out prompts."""
    if entry is None or entry.quality is None:
        return ("–", "–", "–")
    psnr, ssim = entry.quality.psnr_db, entry.quality.ssim
    return (f"{psnr.mean:.1f}", f"{psnr.worst:.1f}", f"{ssim.mean:.3f}")
