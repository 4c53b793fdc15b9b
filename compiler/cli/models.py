"""`otc models`: the models that are supported. Imports neither torch nor diffusers."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from ..models.coverage import Row


@click.command("models", short_help="List the models that can be compiled.")
@click.option("--json", "as_json", is_flag=True, help="Print the table as JSON.")
def models_command(as_json: bool) -> None:
    """List the model classes that the coverage suite compiled and served, and those that it could not, with the reason.

    Other classes may work as well: the cut needs no code for a class, and `otc compile` checks its result.

    \b
    Examples:
      otc models
      otc models --json
    """
    from ..models.coverage import rows

    found = rows()
    if as_json:
        click.echo(json.dumps([asdict(row) for row in found]))
        return
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    table = Table(box=None)
    headings = ("payloads", "guidance", "from prompt", "to pixels", "symbolic", "full differs by")
    for heading in ("model", "pipeline", *headings, "note"):
        table.add_column(heading, overflow="fold")
    for row in found:
        decodes, error = _yes(row.decoder), f"{row.full_error:.0e}"
        cells = (", ".join(row.payloads), row.guidance, _yes(row.prompt), decodes, _symbolic(row), error)
        table.add_row(row.transformer, row.pipeline, *(cells if row.supported else ("–",) * len(headings)), _note(row))
    Console(width=None if console.is_terminal else 200, highlight=False).print(table)


def _yes(value: bool) -> str:
    return "yes" if value else "no"


SHORT = {"batch": "batch", "height": "height", "width": "width", "num_frames": "frames", "max_sequence_length": "text"}
"""Of axes, for the table."""


def _note(row: Row) -> str:
    return "; ".join(
        [row.reason] * bool(row.reason) + [f"{SHORT[axis]} stays: {why}" for axis, why in row.fixed.items()]
    )


def _symbolic(row: Row) -> str:
    return ", ".join(SHORT[name] for name in row.symbolic)
