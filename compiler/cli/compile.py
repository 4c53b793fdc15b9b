"""`otc compile`. Imports click only, so that help works where the compiler's packages are missing."""

from __future__ import annotations

import importlib.util
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from .crew import crew_for
from .options import call_options, crew_options, device_options, quiet_option, search_options
from .stopped import stopped_error

if TYPE_CHECKING:
    from otcache.schemas.manifest import Manifest

NEEDED = (
    "torch",
    "diffusers",
    "transformers",
    "onnx",
    "onnxscript",
    "ot",
    "optuna",
    "skimage",
    "matplotlib",
    "jinja2",
    "filelock",
    "platformdirs",
)


def check_packages(command: str) -> None:
    """Raise HostError, which names the pip command, where the compiler's packages are missing."""
    from otcache.schemas.errors import HostError

    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise HostError(
            f"{command} needs packages that are not installed ({', '.join(missing)}): run pip install "
            "'otcache[compiler]'"
        )


def complete_models(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Bundled names and folders of pipelines, for the shell."""
    from ..models import find as models

    return [CompletionItem(name) for name in models.complete_models(incomplete)] or [
        CompletionItem(incomplete, type="dir")
    ]


@click.command("compile", short_help="Compile a diffusion pipeline into an artifact.")
@click.argument("model", shell_complete=complete_models)
@click.option("--budgets", help="Model evaluations to serve at.  [default: 4,8,16, or what --target comes to]")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Artifact folder.  [default: artifacts/NAME]")
@call_options
@click.option("--sizes", metavar="HxW,…|HxW:HxW:STEP", help="Sizes to serve as well: a list, or a range with its step.")
@click.option(
    "--search-size",
    metavar="HxW",
    help="Find schedules at this size, where an evaluation costs less, and fit coefficients at the compiled one.",
)
@click.option("--frame-counts", metavar="N,…|N:N:STEP", help="Numbers of frames to serve as well.")
@click.option("--text-lengths", metavar="N,…|N:N:STEP", help="Numbers of text tokens to serve as well.")
@click.option("--reference-budget", type=int, help="Steps of the reference schedule.  [default: 2/5 of all]")
@click.option("--anchor-budget", type=int, help="Steps of the anchor schedule.  [default: 1/12 of all]")
@search_options
@click.option(
    "--payload",
    type=click.Choice(["auto", "output", "residual"]),
    default="auto",
    show_default=True,
    help="What is cached. Programs of outputs are called banded where means are weighed apart, adaptive where "
    "coefficients follow each sample.",
)
@click.option(
    "--edge-costs",
    type=click.Choice(["statistics", "end-to-end"]),
    default="statistics",
    show_default=True,
    help="Edges of the residual payload's graph: free, or replayed as in LeMiCa.",
)
@device_options
@crew_options
@click.option("--threads", type=int, help="CPU threads; the last digits of results follow them.  [default: torch's]")
@click.option("--lora", type=click.Path(path_type=Path), help="Folder of a LoRA to fuse into the weights.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    default="float32",
    show_default=True,
    help="Of the transformer's engines; bfloat16 is served on GPUs only.",
)
@click.option("--revision", help="Branch, tag or commit of a hub model.  [default: its main branch]")
@click.option("--variant", help="Weights of MODEL where it stores several, such as fp16.  [default: the plain ones]")
@click.option("--trust-remote-code", is_flag=True, help="Run Python that comes with MODEL; refused without this.")
@click.option(
    "--backend",
    "backends",
    default="onnx",
    show_default=True,
    metavar="onnx[,tensorrt-rtx]",
    help="Engines: ONNX always, and plans of tensorrt or tensorrt-rtx as `otc build-engines` makes them.",
)
@click.option(
    "--engines",
    type=click.Choice(["onnx", "none"]),
    default="onnx",
    show_default=True,
    help="none: programs, quality and report alone, for hosts that keep torch; `otc export` adds engines later.",
)
@click.option(
    "--target",
    "targets",
    multiple=True,
    metavar="QUALITY|sm_NN[,…]",
    help="A quality such as psnr>=35 or 'worst ssim>=0.98': compile the smallest budget that reaches it on held-out "
    "prompts; may be given several times. Or compute capabilities to build plans for.",
)
@click.option(
    "--bench/--no-bench",
    default=True,
    show_default=True,
    help="Measure the artifact's latency on this host for a few seconds, for its report.",
)
@click.option("--force", is_flag=True, help="Replace an existing artifact.")
@click.option("--dry-run", is_flag=True, help="Say what it would take, and write nothing.")
@click.option("--measure", is_flag=True, help="With --dry-run: memory as well, and the hours of each --effort.")
@click.option("-v", "--verbose", is_flag=True, help="A line per pass on stderr; also with OTC_LOG=info.")
@quiet_option
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON, events on stderr.")
def compile_command(as_json: bool, dry_run: bool, measure: bool, verbose: bool, quiet: bool, **choices: Any) -> None:
    """Compile MODEL (a bundled name, a diffusers folder or a hub id) into an artifact.

    \b
    Examples:
      otc compile shapes --budgets 4,8,16
      otc compile ./my-pipeline --budgets 6,10 --prompts prompts.txt --guidance-scale 2:6 -o artifacts/mine
      otc compile ./my-pipeline --sizes 512x512,768x512 --text-lengths 128,512
      otc compile shapes --budgets 4,8,12,16 --force     # adds a budget to what the workspace knows
      otc compile shapes --effort quick --engines none   # programs alone, in minutes
      otc compile shapes --target "psnr>=35, worst psnr>=30"   # the smallest budget that reaches it
      otc compile ./flux --device cuda --precision bfloat16
      otc compile ./flux --device cuda --workers 8   # a GPU each, on this host or on --ray ADDRESS
      otc compile shapes --dry-run --measure
      otc compile shapes --backend onnx,tensorrt-rtx --target sm_89,sm_120

    An interrupted compile goes on where it stopped when it is started again with the same options: Ctrl-C ends it with
    exit code 130, SIGTERM with 143, and neither leaves half an artifact. What it goes on from is kept in OTC_CACHE.
    """
    from ..workspace.interrupts import Interrupted, interruptible

    try:
        with interruptible():
            _compile(as_json, dry_run, measure, {"verbose": verbose, "quiet": quiet}, **choices)
    except Interrupted as stop:
        raise stopped_error("otc compile", stop) from None


def _compile(
    as_json: bool,
    dry_run: bool,
    measure: bool,
    shown: dict[str, bool],
    budgets: str | None,
    targets: tuple[str, ...],
    guidance_scale: str,
    backends: str,
    micro_batch: str,
    search_size: str | None,
    workers: int | None,
    ray_address: str | None,
    **choices: Any,
) -> None:
    check_packages("otc compile")
    if dry_run and (workers or ray_address):
        raise click.UsageError("--dry-run starts no workers: leave --workers and --ray out")
    if measure and not dry_run:
        raise click.UsageError("--measure says what a compile would take: give it with --dry-run")
    from otcache.schemas.targets import is_target

    from ..export import plans as engines

    qualities = tuple(text for text in targets if is_target(text))
    plans = engines.parse_backends(backends), engines.parse_targets(text for text in targets if not is_target(text))
    engines.check(*plans)
    from ..options import (
        CompileOptions,
        budgets_or_default,
        parse_budgets,
        parse_guidance,
        parse_micro_batch,
        parse_search_size,
    )

    options = CompileOptions(
        budgets=budgets_or_default(None if budgets is None else parse_budgets(budgets), qualities),
        targets=qualities,
        guidance_scale=parse_guidance(guidance_scale),
        micro_batch=parse_micro_batch(micro_batch),
        search_size=parse_search_size(search_size),
        **{name: value for name, value in choices.items() if value is not None},
    )
    from ..workspace.quiet import asks_for_lines, quiet

    quiet()
    from otcache.schemas.manifest_file import read_manifest

    from ..passes.compile import compile_model
    from ..workspace.progress import reporter_for

    start = time.monotonic()
    reporter = reporter_for(as_json=as_json, verbose=shown["verbose"] or asks_for_lines(), quiet=shown["quiet"])
    try:
        if dry_run:
            from ..passes.dry_run import plan_compile

            plan = plan_compile(options, reporter, at_size=measure)
            reporter.close()
            click.echo(json.dumps(plan.to_json()) if as_json else plan.text())
            return
        with crew_for(options, reporter, workers, ray_address) as (crew, told):
            folder, manifest = compile_model(options, told, crew=crew)
        added = engines.build(folder, *plans, reporter)
        if added:
            manifest = read_manifest(folder).manifest
    finally:
        reporter.close()
    seconds = time.monotonic() - start
    if as_json:
        click.echo(json.dumps(_summary(folder, manifest, seconds, added)))
    else:
        _print_result(folder, manifest, seconds, added)


def _print_result(folder: Path, manifest: Manifest, seconds: float, added: list[str]) -> None:
    """Fidelity by budget, and where everything lies; `added`: folders of plans."""
    _print_table(manifest)
    click.echo(f"compiled in {seconds:.0f} s; report: {folder / 'report.html'}")
    for part in added:
        click.echo(f"plans: {folder / part}")
    click.echo(f"artifact: {folder}")


def _summary(folder: Path, manifest: Manifest, seconds: float, added: list[str]) -> dict[str, Any]:
    """What `--json` prints.

    Args:
        folder: the artifact.
        manifest: its manifest.
        seconds: that the compile took.
        added: folders of plans in the artifact.
    """
    return {
        "artifact": str(folder),
        "digest": manifest.digest,
        "seconds": round(seconds, 1),
        "engines": added,
        "budgets": {
            entry.budget: {
                "schedule": entry.program.schedule,
                "payload": entry.program.payload,
                "psnr_db": entry.quality.psnr_db.mean,
                "ssim": entry.quality.ssim.mean,
                "baselines": {peer.name: peer.quality.psnr_db.mean for peer in entry.baselines},
            }
            for entry in manifest.programs
            if entry.quality
        },
    }


def _print_table(manifest: Manifest) -> None:
    """Fidelity to the full run on held-out prompts, ours and the peers' at the same number of evaluations."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"PSNR (dB) to the full {manifest.sampler.num_inference_steps} steps, held-out prompts")
    table.add_column("budget", justify="right")
    table.add_column("otcache", justify="right", style="bold")
    entries = [(entry, entry.quality) for entry in manifest.programs if entry.quality]
    names = list(dict.fromkeys(peer.name for entry, _ in entries for peer in entry.baselines))
    for name in (*names, "SSIM", "payload"):
        table.add_column(name, justify="left" if name == "payload" else "right")
    for entry, quality in entries:
        peers = {peer.name: f"{peer.quality.psnr_db.mean:.1f}" for peer in entry.baselines}
        table.add_row(
            entry.budget,
            f"{quality.psnr_db.mean:.1f}",
            *(peers.get(name, "–") for name in names),
            f"{quality.ssim.mean:.3f}",
            entry.program.payload,
        )
    console = Console()
    Console(width=None if console.is_terminal else 120).print(table)
