"""Tables whose words stay whole however narrow the terminal is."""

from __future__ import annotations

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table


def print_whole(console: Console, table: Table, narrow: str | None = None) -> None:
    """Print a table as wide as it needs; or `narrow` (markup) where the terminal has less.

    What is wider is left to the terminal: rich would cut words.
    """
    own = console.width
    needed = Measurement.get(console, console.options.update(max_width=1 << 16), table).maximum
    if needed > own and narrow is not None:
        console.print(narrow, soft_wrap=True)
        return
    console.width = max(needed, own)
    try:
        console.print(table)
    finally:
        console.width = own
