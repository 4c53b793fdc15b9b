"""Write the results page from what `otc compare` measured: `python -m otcache.artifacts.comparisons [FOLDER …]`.

A FOLDER that `otc compare` wrote is kept under its name (`artifacts/results/NAME.json`) before the page is written from
all that are kept; without one the page is written anew. A model has one picture, of the comparison with the most
budgets; others of the same model, at budgets of their own, are tables below it.
"""

from __future__ import annotations

import itertools
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from otcache.compiler.compare.cells import AHEAD_DB, DEFAULT, FURTHER, Comparison
from otcache.compiler.compare.picture import draw_comparison
from otcache.compiler.compare.table import fidelity_table, markdown, published_parts, verdict_table

HERE = Path(__file__).parent
BEFORE = "before"
"""Folder of the comparisons that an audit found peers handicapped in, one a model, beside those that are kept."""
CHANGED_DB = 0.05
"""What a peer's PSNR must have changed by to be told: what the tables show."""
MARKS = ("<!-- comparisons: written by otcache.artifacts.comparisons -->", "<!-- end of comparisons -->")
EFFORT_MARKS = ("<!-- effort: written by otcache.artifacts.comparisons -->", "<!-- end of effort -->")
MODEL_MARKS = ("<!-- models: written by otcache.artifacts.comparisons -->", "<!-- end of models -->")


def read_comparisons(artifacts: Path = HERE) -> list[Comparison]:
    """Every comparison in `artifacts/results`, by the model's name, and of one model the one with the most budgets
    first.
    """
    paths = (artifacts / "results").glob("*.json")
    found = [Comparison.from_json(json.loads(path.read_text(encoding="utf-8"))) for path in paths]
    return sorted(found, key=lambda comparison: (model_name(comparison), -len(comparison.budgets), comparison.budgets))


def read_before(artifacts: Path = HERE) -> dict[str, Comparison]:
    """The comparisons in `artifacts/results/before`, by the model's name."""
    paths = sorted((artifacts / "results" / BEFORE).glob("*.json"))
    found = [Comparison.from_json(json.loads(path.read_text(encoding="utf-8"))) for path in paths]
    return {model_name(each): each for each in found}


def model_name(comparison: Comparison) -> str:
    """The model's name without its folder."""
    return Path(comparison.model).name


def comparison_sections(comparisons: Sequence[Comparison], before: Mapping[str, Comparison] | None = None) -> str:
    """The comparisons in Markdown, in the order of `read_comparisons`, with a picture of each model; empty without
    any.

    before: by the model's name, what its peers came to before they were mended.
    """
    parts = [f"Where otcache is not ahead:\n\n{behind_list(comparisons)}"] if comparisons else []
    for name, group in itertools.groupby(comparisons, key=model_name):
        first, *others = group
        picture = f"![{name}: fidelity against model evaluations](../pictures/{picture_name(name)})"
        parts.append(f"## {name}\n\n{picture}\n\n{markdown(first).strip()}")
        if before and name in before:
            parts += mended_parts(before[name], first)
        for other in others:
            budgets = ",".join(map(str, other.budgets)) + ("" if other.claims else " --no-claim")
            parts.append(
                f"Compiled and compared apart, for information (`otc compare {name} --budgets {budgets} -o FOLDER`):"
                + "\n\n".join(["", fidelity_table(other), *published_parts(other), verdict_table(other)])
            )
    return "\n\n".join(parts)


def mended_parts(before: Comparison, now: Comparison) -> list[str]:
    """A table of the peers whose PSNR is another than before, with a line above it; nothing where none is.

    Budgets are those that both have.
    """
    budgets = [budget for budget in now.budgets if budget in before.budgets]
    lines = ["| method | " + " | ".join(f"B = {b}" for b in budgets) + " |", "|---|" + "---:|" * len(budgets)]
    methods = dict.fromkeys(cell.method for cell in now.cells if cell.method != DEFAULT)
    mended = []
    for method in methods:
        pairs = [(before.cell(method, budget), now.cell(method, budget)) for budget in budgets]
        known = [(old.psnr_db.mean, new.psnr_db.mean) if old and new else None for old, new in pairs]
        if not any(each and abs(each[1] - each[0]) >= CHANGED_DB for each in known):
            continue
        cells = ["–" if each is None else f"{each[0]:.1f} → {each[1]:.1f} ({each[1] - each[0]:+.1f})" for each in known]
        mended.append("| " + " | ".join([method, *cells]) + " |")
    if not mended:
        return []
    added = [method for method in methods if not any(cell.method == method for cell in before.cells)]
    return [
        "Peers before and after they were given what their authors give them, PSNR in dB at the budgets of both "
        "comparisons, the first one kept in `before`" + (f"; new since are {', '.join(added)}" if added else "") + ":",
        "\n".join([*lines, *mended]),
    ]


def behind_list(comparisons: Sequence[Comparison]) -> str:
    """What no table's first glance shows: where the lead is under `AHEAD_DB`, and where others that may spend more are
    better.
    """
    level, further = [], []
    for comparison in comparisons:
        for verdict in comparison.verdicts:
            where = f"`{model_name(comparison)}` at {verdict.budget}"
            if not verdict.must:
                level.append(f"{where} ({verdict.ahead_db:+.1f} dB to {verdict.best_peer})")
            if verdict.further_ahead_db is not None and verdict.further_ahead_db < 0:
                further.append(f"{where} ({verdict.further_ahead_db:+.1f} dB to {verdict.further_peer})")
    return (
        f"* by {AHEAD_DB:g} dB at the same evaluations: {', '.join(level) or 'nowhere'};\n"
        f"* of methods that spend {FURTHER:g} times as many: {', '.join(further) or 'nowhere'}."
    )


def models_table(artifacts: Path = HERE) -> str:
    """How well pictures of each bundled model follow their captions, from its `check.json`."""
    checks = {
        path.parent.name: json.loads(path.read_text(encoding="utf-8"))
        for path in sorted((artifacts / "models").glob("*/check.json"))
    }
    columns = list(dict.fromkeys(name for check in checks.values() for name in check))
    lines = ["| model | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
    for model, check in checks.items():
        cells = [f"{100 * check[name]:.0f} %" if name in check else "–" for name in columns]
        lines.append(f"| `{model}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def effort_sections(artifacts: Path = HERE) -> str:
    """What each effort spends and comes to, of the models that `tests/benchmarks/effort.py` has measured."""
    parts = []
    for path in sorted((artifacts / "results" / "effort").glob("*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        efforts = found["efforts"]
        budgets = list(next(iter(efforts.values()))["budgets"])
        lines = [
            "| `--effort` | prompts | full runs each | evaluations | " + " | ".join(f"B = {b}" for b in budgets) + " |",
            "|---|" + "---:|" * (3 + len(budgets)),
        ]
        for name, each in efforts.items():
            cells = [f"{value['psnr_db']:.1f} ({value['ssim']:.4f})" for value in each["budgets"].values()]
            lines.append(
                f"| `{name}` | {each['calibration_prompts']} | {each['full_runs']:.1f} | {each['evaluations']} | "
                + " | ".join(cells)
                + " |"
            )
        picture = f"![{path.stem}: fidelity against evaluations spent](effort/{path.stem}.png)"
        about = f"PSNR in dB (SSIM) on {found['held_out']} held-out prompts of `{found['model']}`:"
        parts.append("\n\n".join([picture, about, "\n".join(lines)]))
    return "\n\n".join(parts)


def picture_name(model: str) -> str:
    """Of a model's comparison, in `artifacts/pictures`."""
    return f"{model}-comparison.png"


def replace_section(page: str, section: str, marks: tuple[str, str]) -> str:
    """The page with what stands between two marks replaced. Raises ValueError when they are missing."""
    before, begin, rest = page.partition(marks[0])
    _, end, after = rest.partition(marks[1])
    if not begin or not end:
        raise ValueError(f"the page has no section between {marks[0]!r} and {marks[1]!r}: add both lines to it")
    return f"{before}{begin}\n{section}\n{end}{after}"


def keep_comparison(folder: Path, artifacts: Path = HERE) -> None:
    """Copy a comparison. Raises ValueError for a folder without one."""
    source = folder / "comparison.json"
    if not source.is_file():
        raise ValueError(f"{folder} has no comparison.json: expected a folder that `otc compare` wrote")
    shutil.copyfile(source, artifacts / "results" / f"{folder.name}.json")


def draw_pictures(artifacts: Path = HERE) -> None:
    """Draw every model's first comparison for the page."""
    for name, group in itertools.groupby(read_comparisons(artifacts), key=model_name):
        draw_comparison(next(group), artifacts / "pictures" / picture_name(name))


def write_page(artifacts: Path = HERE) -> None:
    """Write the sections of `artifacts/results/README.md` from all comparisons that are kept."""
    page = artifacts / "results" / "README.md"
    text = replace_section(
        page.read_text(encoding="utf-8"),
        comparison_sections(read_comparisons(artifacts), read_before(artifacts)),
        MARKS,
    )
    text = replace_section(text, effort_sections(artifacts), EFFORT_MARKS)
    page.write_text(replace_section(text, models_table(artifacts), MODEL_MARKS), encoding="utf-8")


def main() -> None:
    if any(argument.startswith("-") for argument in sys.argv[1:]):
        raise SystemExit("usage: python -m otcache.artifacts.comparisons [FOLDER …]")
    try:
        for folder in map(Path, sys.argv[1:]):
            keep_comparison(folder)
        draw_pictures()
        write_page()
    except ValueError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
