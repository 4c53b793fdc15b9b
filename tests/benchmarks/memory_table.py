"""Write what `calibration_memory.py -o` has kept as the table of a page.

python tests/benchmarks/memory_table.py compiler/README.md
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from otcache.artifacts.comparisons import replace_section

RESULTS = Path(__file__).parent / "results"
MARKS = ("<!-- memory: written by tests/benchmarks/memory_table.py -->", "<!-- end of memory -->")
ROWS = {
    "prompts": "calibration prompts",
    "steps": "steps",
    "flux": "calibration prompts",
    "hunyuan": "calibration prompts",
}
"""Runs of the benchmark, and what its compiles differ in or are named after."""


def memory_table() -> str:
    """A row for each kept run, in Markdown: sizes, peaks of `RssAnon`, and the bound."""
    lines = ["| `calibration_memory.py …` | pixels × frames | compiles | peak | bound |", "|---|---|---|---:|---|"]
    for what, unit in ROWS.items():
        kept = json.loads((RESULTS / f"calibration-memory-{what}.json").read_text(encoding="utf-8"))
        height, width, frames = kept["height_width_frames"]
        peaks = [each["peak_bytes"] / 1e9 for each in kept["compiles"].values()]
        bound = f"{kept['limit_bytes'] / 1e9:g} GB" if "limit_bytes" in kept else f"{kept['limit']:.0%} apart"
        apart = f" ({kept['apart']:.1%} apart)" if "apart" in kept else ""
        lines.append(
            f"| `{what}` | {height} × {width} × {frames} | {', '.join(kept['compiles'])} {unit} | "
            f"{', '.join(f'{peak:.2f}' for peak in peaks)} GB{apart} | {bound} |"
        )
    return "\n".join(lines)


def main() -> None:
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        raise SystemExit("usage: python tests/benchmarks/memory_table.py PAGE")
    page = Path(sys.argv[1])
    page.write_text(replace_section(page.read_text(encoding="utf-8"), memory_table(), MARKS), encoding="utf-8")


if __name__ == "__main__":
    main()
