"""Which schedulers of diffusers are lowered, as `tests/compiler/programs/test_schedulers.py` measured it.

`python -m otcache.compiler.programs.schedulers compiler/programs/README.md` writes the table of a page anew.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path

NAME = "schedulers.json"
STEPS = (7, 10)
"""Numbers of steps that are asked for: an odd and an even one."""
BEGIN, END = "<!-- schedulers: begin -->", "<!-- schedulers: end -->"


@dataclass(frozen=True, kw_only=True)
class Row:
    """What was measured of one scheduler class."""

    scheduler: str
    works: bool
    reason: str = ""
    """Why it does not, or which of its configurations do not."""
    needs: str = ""
    """Options without which it is not deterministic or not linear: of the configuration, or of the step."""
    configurations: int = 0
    """How many were saved, loaded and lowered."""
    evaluations: tuple[int, ...] = ()
    """Of the model, when `STEPS` are asked for, in the first configuration."""
    error: float = 0.0
    """Largest relative distance of the lowered program's latents from diffusers' own loop."""
    drop_in_error: float = 0.0
    """The same of `OTCacheScheduler` in that loop."""


def rows() -> list[Row]:
    """The table that is shipped."""
    values = json.loads(resources.files("otcache.compiler.programs").joinpath(NAME).read_text(encoding="utf-8"))
    return [Row(**{**value, "evaluations": tuple(value["evaluations"])}) for value in values]


def write_rows(measured: Sequence[Row], path: Path) -> None:
    """Write the table, those that work first, by name; errors with one significant digit."""
    values = [
        {key: float(f"{value:.0e}") if isinstance(value, float) else value for key, value in asdict(row).items()}
        for row in sorted(measured, key=lambda row: (not row.works, row.scheduler))
    ]
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def working_schedulers() -> tuple[str, ...]:
    """Class names of those that work; others do if they are linear and deterministic."""
    return tuple(row.scheduler for row in rows() if row.works)


def table_from_rows(measured: Sequence[Row]) -> str:
    """Two Markdown tables: what works, and what does not."""
    asked = " and ".join(map(str, STEPS))
    lines = [
        f"| scheduler | evaluations of {asked} steps | configurations | program | drop-in | needs | but not |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in measured:
        if row.works:
            counts = ", ".join(map(str, row.evaluations))
            lines.append(
                f"| {row.scheduler} | {counts} | {row.configurations} | {row.error:.0e} | {row.drop_in_error:.0e} | "
                f"{row.needs} | {row.reason} |"
            )
    lines += ["", "| scheduler that is refused | why |", "|---|---|"]
    lines += [f"| {row.scheduler} | {row.reason} |" for row in measured if not row.works]
    return "\n".join(lines)


def page_with_table(page: str, measured: Sequence[Row]) -> str:
    """The page with the table between its two marks."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n{table_from_rows(measured)}\n{END}{rest.split(END)[1]}"


def main() -> None:
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        raise SystemExit("usage: python -m otcache.compiler.programs.schedulers PAGE")
    path = Path(sys.argv[1])
    path.write_text(page_with_table(path.read_text(encoding="utf-8"), rows()), encoding="utf-8")


if __name__ == "__main__":
    main()
