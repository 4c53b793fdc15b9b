"""`otc compare`. Imports click only, so that help works where the compiler's packages are missing."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .compile import check_packages, complete_models
from .options import call_options, device_options, search_options
from .stopped import stopped_error

if TYPE_CHECKING:
    from ..compare.cells import Comparison


@click.command("compare", short_help="Measure otcache against caching libraries and few-step solvers.")
@click.argument("model", shell_complete=complete_models)
@click.option("--budgets", default="4,8,10,16", show_default=True, help="Model evaluations to compare at.")
@click.option("--against", help="Methods, separated by commas; a wrong one lists them.  [default: all]")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder.  [default: artifacts/compare/NAME]")
@call_options
@search_options
@device_options
@click.option(
    "--claim/--no-claim", default=True, show_default=True, help="Also test interpolation against searches per budget."
)
@click.option(
    "--robustness/--no-robustness",
    default=True,
    show_default=True,
    help="Also measure other guidance scales and numbers of calibration prompts, at 8 evaluations.",
)
@click.option("--force", is_flag=True, help="Replace an existing comparison.")
@click.option("--json", "as_json", is_flag=True, help="Print the comparison as JSON, events on stderr.")
def compare_command(**choices: Any) -> None:
    """Measure every method's fidelity to MODEL's full runs, on the same prompts and seeds.

    \b
    Examples:
      otc compare shapes
      otc compare shapes --budgets 8 --against euler,unipc,teacache --no-claim
      otc compare ./my-pipeline --budgets 6,10 --prompts prompts.txt --json > comparison.json

    Writes comparison.json, comparison.md and comparison.png. An interrupted comparison goes on where it stopped.
    """
    from ..workspace.interrupts import Interrupted, interruptible

    try:
        with interruptible():
            _compare(**choices)
    except Interrupted as stop:
        raise stopped_error("otc compare", stop) from None


def _compare(
    as_json: bool,
    budgets: str,
    guidance_scale: str,
    micro_batch: str,
    against: str | None,
    claim: bool,
    robustness: bool,
    **choices: Any,
) -> None:
    check_packages("otc compare")
    from otcache.schemas.errors import UsageError
    from otcache.schemas.places import check_creatable, unwritable

    from ..options import CompileOptions, parse_budgets, parse_guidance, parse_micro_batch
    from ..workspace.progress import reporter_for
    from ..workspace.quiet import asks_for_lines, quiet

    output: Path = choices.pop("output") or Path("artifacts/compare") / Path(choices["model"]).name
    if (output / "comparison.json").exists() and not choices["force"]:
        raise UsageError(f"-o is {output}: it holds a comparison already: choose another, or replace it with --force")
    check_creatable(output / "comparison.json", "-o")
    options = CompileOptions(
        budgets=parse_budgets(budgets),
        guidance_scale=parse_guidance(guidance_scale),
        micro_batch=parse_micro_batch(micro_batch),
        **{name: value for name, value in choices.items() if value is not None},
    )
    quiet()
    from ..compare.compare import compare
    from ..compare.table import write_comparison

    start = time.monotonic()
    reporter = reporter_for(as_json=as_json, verbose=asks_for_lines())
    try:
        names = [name.strip() for name in against.split(",")] if against else None
        comparison = compare(options, names, reporter, claim=claim, robust=robustness)
    finally:
        reporter.close()
    try:
        write_comparison(comparison, output)
    except OSError as error:
        raise unwritable(output, "-o", error) from None
    if as_json:
        click.echo(json.dumps(comparison.json()))
        return
    _print(comparison)
    click.echo(f"compared in {time.monotonic() - start:.0f} s; {output / 'comparison.md'}, {output / 'comparison.png'}")


def _print(comparison: Comparison) -> None:
    """PSNR of every method at every budget, the best of each in bold."""
    from rich.console import Console
    from rich.table import Table

    lpips = " / LPIPS" if any(cell.lpips is not None for cell in comparison.cells) else ""
    table = Table(
        title=f"PSNR (dB) / SSIM{lpips} to the full {comparison.num_inference_steps} steps of {comparison.model}, "
        f"{comparison.prompts} held-out prompts"
    )
    table.add_column("method")
    for budget in comparison.budgets:
        table.add_column(f"B = {budget}", justify="right")
    for method in dict.fromkeys(cell.method for cell in comparison.cells):
        row = [method]
        for budget in comparison.budgets:
            cell = comparison.cell(method, budget)
            outside = "†" if comparison.outside_published(method, budget) else ""
            text = f"{cell.psnr_db.mean:.1f}{outside} / {cell.ssim.mean:.3f}" if cell else "–"
            text += f" / {cell.lpips:.4f}" if cell and cell.lpips is not None else ""
            row.append(
                f"[bold]{text}[/bold]" if cell and cell.psnr_db.mean == comparison.best_psnr_db(budget) else text
            )
        table.add_row(*row)
    console = Console()
    Console(width=None if console.is_terminal else 120).print(table)
    from ..compare.table import published_parts

    for line in published_parts(comparison):
        click.echo(line)
    for verdict in comparison.verdicts:
        click.echo(
            f"B = {verdict.budget}: {verdict.ahead_db:+.1f} dB to {verdict.best_peer}, SSIM {verdict.ssim_ahead:+.4f}; "
            f"must {'reached' if verdict.must else 'not reached'}, aim {'reached' if verdict.aim else 'not reached'}"
        )
