"""`otc report`. Imports click only, so that help works where the compiler's packages are missing."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import click

NEEDED = ("matplotlib", "jinja2", "ot", "filelock")


@click.command("report", short_help="Draw an artifact's report again.")
@click.argument("artifact", type=click.Path(path_type=Path, file_okay=False))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def report_command(artifact: Path, as_json: bool) -> None:
    """Draw report.html of ARTIFACT again, with the latencies that were measured since it was compiled.

    \b
    Examples:
      otc bench artifacts/shapes --save
      otc report artifacts/shapes
      otc report artifacts/shapes --json

    Nothing is computed anew. The report is an attachment: the artifact's digest and signature stay valid.
    """
    from otcache.schemas.errors import HostError

    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise HostError(
            f"otc report needs packages that are not installed ({', '.join(missing)}): run pip install "
            "'otcache[compiler]'"
        )
    from ..report.redraw import redraw

    page, latencies = redraw(artifact)
    if as_json:
        click.echo(json.dumps({"report": str(page), "latencies": latencies}))
        return
    click.echo(f"report: {page} (latency of {len(latencies)} budgets)")
