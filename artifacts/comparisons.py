"""Write what `otc compare` measured into the README: `python -m otcache.artifacts.comparisons artifacts/compare/shapes
README.md`.

Keeps the comparison under its folder's name (`artifacts/results/NAME.json`) and writes the section from all that are
kept. A model has one picture, of the comparison with the most budgets; others of the same model, at budgets of their
own, are tables below it.
"""

from __future__ import annotations

import itertools
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from otcache.artifacts.readme import PICTURES, rewrite
from otcache.compiler.compare.cells import Comparison
from otcache.compiler.compare.table import fidelity_table, markdown, verdict_table

MARKS = ("<!-- comparisons: written by otcache.artifacts.comparisons -->", "<!-- end of comparisons -->")
RESULTS = Path(__file__).parent / "results"
LEAD = (
    "Against caching libraries, other caches and other schedules, with their own code where it exists (`otc compare MODEL`; this "
    "part is written by `python -m otcache.artifacts.comparisons artifacts/compare/MODEL README.md`):"
)


def kept() -> list[Comparison]:
    """Every comparison in `RESULTS`, by the model's name, and of one model the one with the most budgets first."""
    found = [Comparison.from_json(json.loads(path.read_text(encoding="utf-8"))) for path in RESULTS.glob("*.json")]
    return sorted(found, key=lambda comparison: (name_of(comparison), -len(comparison.budgets), comparison.budgets))


def name_of(comparison: Comparison) -> str:
    """The model's, without its folder."""
    return Path(comparison.model).name


def section(comparisons: Sequence[Comparison]) -> str:
    """The comparisons in Markdown, in the order of `kept`, with a picture of each model; empty while there is none."""
    parts = [LEAD] if comparisons else []
    for name, group in itertools.groupby(comparisons, key=name_of):
        first, *others = group
        parts.append(
            f"### {name}\n\n![{name}: fidelity against model evaluations]({picture_of(first)})\n\n{markdown(first).strip()}"
        )
        for other in others:
            budgets = ",".join(map(str, other.budgets)) + ("" if other.claims else " --no-claim")
            parts.append(
                f"Compiled and compared apart, for information (`otc compare {name} --budgets {budgets} -o FOLDER`):\n\n"
                f"{fidelity_table(other)}\n\n{verdict_table(other)}"
            )
    return "\n\n".join(parts)


def picture_of(comparison: Comparison) -> Path:
    """From the README's folder."""
    return Path("artifacts/pictures") / f"{name_of(comparison)}-comparison.png"


def main() -> None:
    if len(sys.argv) != 3:
        raise SystemExit("usage: python -m otcache.artifacts.comparisons COMPARISON README")
    folder, readme = Path(sys.argv[1]), Path(sys.argv[2])
    if not (folder / "comparison.json").is_file():
        raise SystemExit(f"{folder} has no comparison.json: expected a folder that `otc compare` wrote")
    comparison = Comparison.from_json(json.loads((folder / "comparison.json").read_text(encoding="utf-8")))
    RESULTS.mkdir(exist_ok=True)
    shutil.copyfile(folder / "comparison.json", RESULTS / f"{folder.name}.json")
    comparisons = kept()
    if comparison == next(each for each in comparisons if name_of(each) == name_of(comparison)):
        shutil.copyfile(folder / "comparison.png", PICTURES / picture_of(comparison).name)
    readme.write_text(rewrite(readme.read_text(encoding="utf-8"), section(comparisons), MARKS), encoding="utf-8")


if __name__ == "__main__":
    main()
