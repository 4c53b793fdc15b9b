"""Write what the benchmarks beside this file have kept (`-o`) as the tables of a page.

python tests/benchmarks/tables.py compiler/README.md
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from otcache.artifacts.comparisons import replace_section

RESULTS = Path(__file__).parent / "results"
MEMORY = {
    "prompts": "calibration prompts",
    "steps": "steps",
    "flux": "calibration prompts",
    "hunyuan": "calibration prompts",
}
"""Runs of `calibration_memory.py`, and what their compiles differ in or are named after."""


def kept(name: str) -> dict[str, Any]:
    """A benchmark's figures."""
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def table(head: str, rule: str, rows: Iterable[str]) -> str:
    """In Markdown."""
    return "\n".join([head, rule, *rows])


def memory_table() -> str:
    """A row for each kept run: sizes, peaks of `RssAnon`, and the bound."""
    rows = []
    for what, unit in MEMORY.items():
        found = kept(f"calibration-memory-{what}")
        height, width, frames = found["height_width_frames"]
        peaks = [each["peak_bytes"] / 1e9 for each in found["compiles"].values()]
        bound = f"{found['limit_bytes'] / 1e9:g} GB" if "limit_bytes" in found else f"{found['limit']:.0%} apart"
        apart = f" ({found['apart']:.1%} apart)" if "apart" in found else ""
        rows.append(
            f"| `{what}` | {height} × {width} × {frames} | {', '.join(found['compiles'])} {unit} | "
            f"{', '.join(f'{peak:.2f}' for peak in peaks)} GB{apart} | {bound} |"
        )
    return table(
        "| `calibration_memory.py …` | pixels × frames | compiles | peak | bound |", "|---|---|---|---:|---|", rows
    )


def effort_table() -> str:
    """A row for each effort: prompts, and full runs for each of them at most."""
    rows = [
        f"| `{name}` | {each['calibration_prompts']} | {each['auto']['after']:.1f} | {each['output']['after']:.1f} | "
        f"{each['output']['before']:.1f} |"
        for name, each in kept("shared-evaluations")["full_runs_at_most"].items()
    ]
    head = "| `--effort` | calibration prompts | full runs each, at most | … `--payload output` | … nothing shared |"
    return table(head, "|---|---:|---:|---:|---:|", rows)


def walks_table() -> str:
    """A row for each compile: its walks, and the evaluations a prompt that they took."""
    rows = [
        f"| `{name}` | {each['walks']} | {each['before']} | {each['after']} | {each['saved']:.0%} |"
        for name, each in kept("shared-evaluations")["walks"].items()
    ]
    head = "| compile of | programs walked | evaluations a prompt, each on its own | shared | saved |"
    return table(head, "|---|---:|---:|---:|---:|", rows)


def positions_table() -> str:
    """A row for each model: how far a quarter of the positions leads from all."""
    rows = []
    for name, each in kept("residual-positions")["models"].items():
        budgets = each["budgets"].values()
        same = sum(budget["same_schedules"] for budget in budgets)
        changes = [budget["psnr_db"]["quarter"] - budget["psnr_db"]["all"] for budget in budgets]
        rows.append(
            f"| `{name}` | {each['weighed']} of {each['positions']} | {each['gram_relative_difference']:.1%} | "
            f"{max(budget['coefficients_relative_difference'] for budget in budgets):.1%} | "
            f"{same} of {sum(len(budget['schedules']) for budget in budgets)} | "
            f"{max(budget['most_steps_apart'] for budget in budgets)} | {min(changes):+.1f} … {max(changes):+.1f} dB |"
        )
    head = (
        "| | positions | inner products differ by | coefficients, at most | schedules that stay | steps apart | PSNR |"
    )
    return table(head, "|---|---:|---:|---:|---:|---:|---:|", rows)


def search_size_table() -> str:
    """A row for each way to compile: fidelity at each budget, and the floating-point operations of the searches."""
    found = kept("search-size")
    budgets = list(next(iter(found["ways"].values()))["budgets"])
    most = max(each["flops"] for each in found["ways"].values())
    rows = [
        f"| `{found['model']}`, {name} | "
        + " | ".join(f"{value['psnr_db']:.1f} dB ({value['ssim']:.4f})" for value in each["budgets"].values())
        + f" | {each['flops'] / 1e12:.2f} · 10¹² ({each['flops'] / most:.0%}) |"
        for name, each in found["ways"].items()
    ]
    head = "| schedules from | " + " | ".join(f"B = {budget}" for budget in budgets) + " | operations of the searches |"
    return table(head, "|---|" + "---:|" * (len(budgets) + 1), rows)


TABLES: dict[str, Callable[[], str]] = {
    "memory": memory_table,
    "effort": effort_table,
    "walks": walks_table,
    "positions": positions_table,
    "search size": search_size_table,
}
"""By the name in a page's marks."""


def marks(name: str) -> tuple[str, str]:
    """The lines around a table."""
    return f"<!-- {name}: written by tests/benchmarks/tables.py -->", f"<!-- end of {name} -->"


def write_tables(text: str) -> str:
    """A page's text with its tables as the kept figures are now; it has the marks of each that it shows."""
    for name, made in TABLES.items():
        if marks(name)[0] in text:
            text = replace_section(text, made(), marks(name))
    return text


def main() -> None:
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        raise SystemExit("usage: python tests/benchmarks/tables.py PAGE")
    page = Path(sys.argv[1])
    page.write_text(write_tables(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
