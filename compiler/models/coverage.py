"""Which models are supported, as the coverage suite (`tests/compiler/coverage`) measured it.

`otc models` prints it.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from importlib import resources
from pathlib import Path

NAME = "coverage.json"


@dataclass(frozen=True, kw_only=True)
class Row:
    """What the suite found for one transformer class, in a tiny random configuration through its real pipeline."""

    transformer: str
    pipeline: str
    supported: bool
    reason: str = ""
    """Why it is not supported, or what is left out."""
    guidance: str = ""
    """As the manifest names it: none (or embedded in the model), cfg, cfg_norm."""
    payloads: tuple[str, ...] = ()
    stages: int = 0
    prompt: bool = False
    """Served from the prompt on, without torch; else conditioning comes from `otc encode`."""
    decoder: bool = False
    """Decodes without torch; else the artifact makes latents."""
    symbolic: tuple[str, ...] = ()
    """What the exporter keeps symbolic: `batch`, and axes of a request as the manifest names them."""
    fixed: dict[str, str] = field(default_factory=dict)
    """Axes of the pipeline's call that it does not, with the reason."""
    stage_error: float = 0.0
    """Largest difference of an exported stage from torch, relative to the largest output."""
    full_error: float = 0.0
    """Of budget `full` in the runtime from the pipeline's own latents, relative; the larger of its own size and of
    another.
    """
    program_error: float = 0.0
    """Of a program of a smaller budget in the runtime from the same program in torch, relative."""


def rows() -> list[Row]:
    """The table that is shipped."""
    values = json.loads(resources.files("otcache.compiler.models").joinpath(NAME).read_text(encoding="utf-8"))
    return [
        Row(**{**value, "payloads": tuple(value["payloads"]), "symbolic": tuple(value["symbolic"])}) for value in values
    ]


def write_rows(found: list[Row], path: Path) -> None:
    """Write the table, sorted by name; errors with one significant digit."""
    values = [
        {key: float(f"{value:.0e}") if isinstance(value, float) else value for key, value in asdict(row).items()}
        for row in sorted(found, key=lambda row: (not row.supported, row.transformer, row.pipeline))
    ]
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
