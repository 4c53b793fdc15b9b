"""How a command ends that a signal has stopped. Imports click only."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from ..workspace.interrupts import Interrupted


def stopped_error(command: str, stop: Interrupted) -> click.ClickException:
    """The error of `command`, with the exit code that shells report for the signal."""
    error = click.ClickException(
        f"{command} was stopped by {stop}: run the same command again to go on where it stopped"
    )
    error.exit_code = stop.exit_code  # type: ignore[misc]
    return error
