"""`otc export-schedule`: an artifact's steps for other engines. Imports click only, as `cli` does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from .compile import check_packages


@click.command("export-schedule", short_help="Write an artifact's schedule for cache-dit, diffusers or sglang.")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option(
    "--for",
    "engine",
    type=click.Choice(["cache-dit", "diffusers", "sglang"]),
    required=True,
    help="A YAML file of cache-dit, a JSON file with arguments for diffusers, or sglang's environment variables.",
)
@click.option("--budget", metavar="N", help="Which schedule.  [default: the artifact's, where it has one alone]")
@click.option(
    "--calibrator",
    type=click.Choice(["reuse", "taylor-1", "taylor-2", "dmd", "foca"]),
    help="What the engine does at the other steps.  [default: what `otc compare` found best, or taylor-1]",
)
@click.option(
    "--comparison",
    type=click.Path(path_type=Path),
    help="Folder of `otc compare`, to say what is lost.  [default: artifacts/compare/NAME, if it is there]",
)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="File to write.  [default: stdout]")
@click.option("--force", is_flag=True, help="Overwrite an existing file.")
@click.option("--json", "as_json", is_flag=True, help="Print what was written as JSON; needs -o.")
def export_schedule_command(artifact: Path, output: Path | None, force: bool, as_json: bool, **choices: Any) -> None:
    """Write which steps ARTIFACT computes, in the form that another engine reads.

    The engine gets the steps, not the coefficients: what that loses is in the file, as `otc compare` measured it of
    this program, or as not measured.

    \b
    Examples:
      otc export-schedule artifacts/shapes --for cache-dit --budget 8 -o cache.yaml
      otc export-schedule artifacts/shapes --for sglang --budget 8 -o cache.sh
      otc export-schedule artifacts/shapes --for diffusers --budget 8
    """
    check_packages("otc export-schedule")
    from otcache.schemas.errors import UsageError
    from otcache.schemas.places import check_new_file, unwritable
    from otcache.schemas.whole_files import write_whole

    if as_json and output is None:
        raise UsageError("--json says what was written: give -o as well")
    if output is not None:
        check_new_file(output, "-o", force=force)
    made = _made(artifact, **choices)
    if output is None:
        click.echo(made.text, nl=False)
        return
    try:
        write_whole(output, made.text)
    except OSError as error:
        raise unwritable(output, "-o", error) from None
    if as_json:
        click.echo(json.dumps({"output": str(output), **made.json()}))
        return
    click.echo(f"{output}: {len(made.schedule)} of {made.num_inference_steps} steps, {made.calibrator}. {made.loss}")


def _made(artifact: Path, engine: Any, budget: str | None, calibrator: str | None, comparison: Path | None) -> Any:
    """What is written."""
    from otcache.schemas.manifest_file import read_manifest

    from ..compare.engine_schedules import export_schedule, read_comparison
    from ..workspace.quiet import quiet

    quiet()
    manifest = read_manifest(artifact).manifest
    folder = comparison or Path("artifacts/compare") / Path(manifest.model.name).name
    found = read_comparison(folder) if comparison or folder.is_dir() else None
    return export_schedule(manifest, engine, budget, calibrator, found)
