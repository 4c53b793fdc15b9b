"""Write what `otc compare` measured into the README: `python -m otcache.artifacts.comparisons artifacts/compare/shapes README.md`.

Keeps the comparison (`artifacts/results/NAME.json`) and its picture, and writes the section from all that are kept.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from otcache.compiler.compare_report import markdown
from otcache.compiler.comparison import Comparison

from .readme import PICTURES, rewrite

MARKS = ("<!-- comparisons: written by otcache.artifacts.comparisons -->", "<!-- end of comparisons -->")
RESULTS = Path(__file__).parent / "results"
LEAD = (
    "Against caching libraries, other caches and other schedules, with their own code where it exists (`otc compare MODEL`; this "
    "part is written by `python -m otcache.artifacts.comparisons artifacts/compare/MODEL README.md`):"
)


def kept() -> list[Comparison]:
    """Every comparison in `RESULTS`, by the model's name."""
    return [
        Comparison.from_json(json.loads(path.read_text(encoding="utf-8"))) for path in sorted(RESULTS.glob("*.json"))
    ]


def section(comparisons: Sequence[Comparison]) -> str:
    """The comparisons in Markdown, each with its picture; empty while there is none."""
    parts = [LEAD] if comparisons else []
    for comparison in comparisons:
        name = Path(comparison.model).name
        picture = f"![{name}: fidelity against model evaluations](artifacts/pictures/{name}-comparison.png)"
        parts.append(f"### {name}\n\n{picture}\n\n{markdown(comparison).strip()}")
    return "\n\n".join(parts)


def main() -> None:
    if len(sys.argv) != 3:
        raise SystemExit("usage: python -m otcache.artifacts.comparisons COMPARISON README")
    folder, readme = Path(sys.argv[1]), Path(sys.argv[2])
    comparison = Comparison.from_json(json.loads((folder / "comparison.json").read_text(encoding="utf-8")))
    name = Path(comparison.model).name
    RESULTS.mkdir(exist_ok=True)
    shutil.copyfile(folder / "comparison.json", RESULTS / f"{name}.json")
    shutil.copyfile(folder / "comparison.png", PICTURES / f"{name}-comparison.png")
    readme.write_text(rewrite(readme.read_text(encoding="utf-8"), section(kept()), MARKS), encoding="utf-8")


if __name__ == "__main__":
    main()
