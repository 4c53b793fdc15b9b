"""How a pipeline calls its transformer: the value that `probe` finds out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .arguments import PLAIN, Adjusted, Listed, Output
from .size_tables import Table


@dataclass(frozen=True, kw_only=True)
class Text:
    """Tensors whose second axis is as long as the longest prompt of a call: padded to `length`, which a mask hides."""

    names: tuple[str, ...]
    mask: str
    length: int

    def padded(self, call: dict[str, Any], name: str) -> Tensor:
        """One argument of a recorded call; a mask that the pipeline left out is made of ones."""
        value = call[name]
        if value is None:
            value = torch.ones(call[self.names[0]].shape[:2], dtype=torch.int64)
        if name not in (*self.names, self.mask):
            return value
        return nn.functional.pad(value, (*[0, 0] * (value.ndim - 2), 0, self.length - value.shape[1]))


@dataclass(frozen=True, kw_only=True)
class Interface:
    """How a pipeline calls its transformer."""

    latents_input: str
    timestep_input: str
    timestep_scale: float
    conditioning: tuple[str, ...]
    """Tensor arguments that belong to a request, with the samples along their first axis."""
    constants: dict[str, Any]
    """Arguments that are the same for every prompt, step and seed, as `wiring` takes them."""
    tables: Mapping[str, Table] = field(default_factory=dict)
    """What parts of the model make of the size alone; empty where that was not asked."""
    text: Text | None = None
    """Of a pipeline that pads prompts to the longest one of a call."""
    output: Output = PLAIN
    guided: bool
    """Two branches, negative and positive, combined as (1 − s) · negative + s · positive."""
    keep_norm: bool = False
    """The combination is then multiplied so that its vectors along the last axis are as long as the positive's."""
    stacked: bool
    """The branches come in one call along the batch axis, rather than in two calls."""
    positive_first: bool
    noise_shape: tuple[int, ...]
    """One sample's noise, as the pipeline draws it."""
    noise_split: tuple[int, ...]
    noise_permutation: tuple[int, ...]
    latents_shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    """In which the pipeline passes latents to the model."""
    step_options: Mapping[str, float] = field(default_factory=dict)
    """Numbers that the pipeline's call passes to `scheduler.step` beside the tensors, such as `eta`."""

    @property
    def held(self) -> dict[str, Any]:
        """What may become an input of the stages beside latents, time and conditioning."""
        kept = {name: value for name, value in self.constants.items() if not isinstance(value, Adjusted)}
        return kept | {name: table.value for name, table in self.tables.items()}

    @property
    def listed(self) -> dict[str, Listed]:
        """Arguments that list one tensor a sample."""
        return {name: value for name, value in self.constants.items() if isinstance(value, Listed)}

    @property
    def branches(self) -> int:
        return 2 if self.guided else 1

    @property
    def guidance_kind(self) -> Literal["none", "cfg", "cfg_norm"]:
        """As the manifest names it."""
        if not self.guided:
            return "none"
        return "cfg_norm" if self.keep_norm else "cfg"
