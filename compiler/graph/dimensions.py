"""What varies between calls of a model beside the batch, and what a model does not let vary."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from otcache.schemas.errors import ModelError


@dataclass(frozen=True, kw_only=True)
class SizeCheck:
    """A call of the model at one size and the same call of its stages, which have to agree."""

    inputs: Mapping[str, Tensor]
    """Of the stages, constants of the size among them."""
    constants: Mapping[str, Any]
    """The model's own arguments that are no inputs of it (`wiring`)."""


@dataclass(frozen=True, kw_only=True)
class Varying:
    """What varies beside the batch."""

    dimensions: Mapping[str, frozenset[int]]
    """Of inputs by name: those whose size differs from one request to another."""
    unbatched: frozenset[str] = frozenset()
    """Inputs without a batch: constants of the size."""
    checks: tuple[SizeCheck, ...] = ()
    """The sizes at which the stages have to give what the model gives."""


FIXED = Varying(dimensions={})


class SpecialisedError(ModelError):
    """A model turns dimensions into Python numbers, so that its graph holds for one size of them alone."""

    def __init__(self, subject: str, fixed: Mapping[tuple[str, int], int]) -> None:
        self.fixed = frozenset(fixed)
        """The dimensions that stay fixed, as pairs of an input's name and a dimension's index."""
        self.listed = ", ".join(
            f"dimension {dimension} of {name} ({size})" for (name, dimension), size in fixed.items()
        )
        """The same with sizes, for messages."""
        super().__init__(
            f"{subject} fixes {self.listed}: expected sizes that stay symbolic; look for code that turns them into "
            "Python numbers"
        )
