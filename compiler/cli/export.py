"""`otc export`: engines for an artifact that holds programs alone. Imports click only, as `compile` does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import click

from ..options import DTypeName
from .compile import check_packages, complete_models
from .options import quiet_option
from .stopped import stopped_error


@click.command("export", short_help="Add engines to an artifact of programs alone.")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.argument("model", shell_complete=complete_models)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Artifact folder.  [default: in place]")
@click.option(
    "--dtype",
    type=click.Choice(get_args(DTypeName)),
    default="float32",
    show_default=True,
    help="Of the transformer's engines; bfloat16 is served on GPUs only.",
)
@click.option("--threads", type=int, help="CPU threads.  [default: torch's]")
@click.option("--lora", type=click.Path(path_type=Path), help="Folder of the LoRA that the artifact was compiled with.")
@click.option("--revision", help="Branch, tag or commit of a hub model.  [default: its main branch]")
@click.option("--variant", help="Weights of MODEL where it stores several, such as fp16.  [default: the plain ones]")
@click.option("--trust-remote-code", is_flag=True, help="Run Python that comes with MODEL; refused without this.")
@click.option("--force", is_flag=True, help="Export again what has engines, or replace what is at -o.")
@click.option("-v", "--verbose", is_flag=True, help="A line per pass on stderr; also with OTC_LOG=info.")
@quiet_option
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON, events on stderr.")
def export_command(as_json: bool, verbose: bool, quiet: bool, **choices: Any) -> None:
    """Export engines of MODEL into ARTIFACT, which was compiled from it with --engines none.

    \b
    Examples:
      otc compile ./my-pipeline --device cuda --precision bfloat16 --engines none -o artifacts/mine
      otc export artifacts/mine ./my-pipeline --dtype bfloat16

    Nothing is calibrated again. MODEL has to have the weights that the artifact was compiled from.
    """
    check_packages("otc export")
    from ..passes.add_engines import ExportOptions, export_engines
    from ..workspace.interrupts import Interrupted, interruptible
    from ..workspace.progress import reporter_for
    from ..workspace.quiet import asks_for_lines
    from ..workspace.quiet import quiet as quiet_libraries

    quiet_libraries()
    reporter = reporter_for(as_json=as_json, verbose=verbose or asks_for_lines(), quiet=quiet)
    try:
        with interruptible():
            folder, manifest = export_engines(ExportOptions(**choices), reporter)
    except Interrupted as stop:
        raise stopped_error("otc export", stop) from None
    finally:
        reporter.close()
    if as_json:
        stages = [stage.name for stage in manifest.stages]
        click.echo(json.dumps({"artifact": str(folder), "digest": manifest.digest, "stages": stages}))
        return
    click.echo(f"exported {len(manifest.stages)} stages: {folder}")
