"""Measurements on the calibration set that are made once: kept in the workspace one by one, and charged once per
compile.

A compile charges an attempt where it first asks for it, whether it is computed or found. What a compile costs therefore
depends on its options alone, not on where an earlier one was interrupted or which budgets it had.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .workspace import Workspace

NAME = "attempt"
"""Of attempts in the workspace."""


class Attempts:
    """JSON values by what they were made from, with the model evaluations that each took."""

    def __init__(self, workspace: Workspace | None = None, key: Any = None) -> None:
        self.workspace, self.key = workspace, key
        self.charged = 0
        """Sample evaluations of all attempts asked for so far."""

    def get(self, key: Any, counter: list[int], compute: Callable[[], Any]) -> Any:
        """The value kept for `key` (JSON), or `compute()`. To be asked once per key; `counter` counts evaluations."""

        def measured() -> dict[str, Any]:
            before = counter[0]
            value = compute()
            return {"value": value, "evaluations": counter[0] - before}

        kept = self.workspace.json(NAME, [self.key, key], measured) if self.workspace else measured()
        self.charged += int(kept["evaluations"])
        return kept["value"]
