"""Measurements on the calibration set that are made once: kept in the workspace one by one, and charged once per
compile.

A compile charges a measurement where it first asks for it, whether it is computed or found. What a compile costs
therefore depends on its options alone, not on where an earlier one was interrupted or which budgets it had.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from .workspace import Workspace

NAME = "attempt"
"""Of measurements in the workspace."""


class Ledger:
    """JSON values by what they were made from, with the model evaluations that they are charged with, and took now."""

    def __init__(self, workspace: Workspace | None = None, key: Any = None) -> None:
        self.workspace, self.key = workspace, key
        self.charged = 0
        """Evaluations of one sample each: of everything that was asked for so far."""
        self.computed = 0
        """Those that were made."""
        self._paths: set[Any] = set()

    def get(self, key: Any, compute: Callable[[], tuple[Any, int]]) -> Any:
        """The value kept for `key` (JSON), or the first of `compute()`; its second are the evaluations that it took."""

        def measure() -> Any:
            value, evaluations = compute()
            self.add_computed(evaluations)
            return value

        return self.workspace.json(NAME, [self.key, key], measure) if self.workspace else measure()

    def charge(self, evaluations: int) -> None:
        """Charge what was asked for."""
        self.charged += evaluations

    def charge_paths(self, paths: Iterable[Any], evaluations: int) -> None:
        """Charge so many for each path (hashable) that was not charged before."""
        for path in paths:
            if path not in self._paths:
                self._paths.add(path)
                self.charge(evaluations)

    def add_computed(self, evaluations: int) -> None:
        """Count evaluations that were made."""
        self.computed += evaluations
