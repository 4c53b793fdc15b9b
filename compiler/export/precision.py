"""A transformer in another dtype: what its stages compute in where `--dtype` asks for float16 or bfloat16.

Capture, searches and evaluation stay in float32, where the CPU is fast; what is exported is cut from a copy in the
dtype, so that every cast is where the model itself has it. Latents, conditioning and features are in the dtype at the
borders of stages, and nothing is cast between them. Time stays float32: half of it would round the step itself.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..graph.cut import cut
from ..graph.stages import Stages
from ..models.mapped_weights import give_back_all, in_file
from ..pipelines.interface import Interface
from ..sizes.served import Sizes, cut_at


@dataclass(frozen=True, kw_only=True)
class Served:
    """What is exported of a transformer."""

    stages: Stages
    example: dict[str, Tensor]
    elsewhere: tuple[dict[str, Tensor], ...]
    """Inputs at every size that is served, the own one first; none where there is one size."""
    dtype: torch.dtype
    kept: tuple[str, ...]
    """Inputs that are float32 in every dtype: the time, and constants of a size."""

    def inputs_of(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Inputs of the float32 model for these stages."""
        return inputs_in(inputs, self.dtype, kept=self.kept)


def stages_in(
    dtype: torch.dtype,
    transformer: nn.Module,
    interface: Interface,
    example: Mapping[str, Tensor],
    sizes: Sizes,
    scratch: Path,
) -> Served:
    """Cut the transformer in another dtype.

    Args:
        dtype: of the stages, float16 or bfloat16.
        transformer: in float32.
        interface: how the pipeline calls it.
        example: its inputs by name in float32, with the constants of the size, which stay so.
        sizes: what is served beside the own size.
        scratch: see `in_dtype`.

    Raises:
        ModelError: as `cut`.
    """
    kept = (interface.timestep_input, *sizes.constants)
    inputs, made = inputs_in(example, dtype, kept=kept), in_dtype(transformer, dtype, scratch)
    elsewhere = [inputs_in(each, dtype, kept=kept) for each in sizes.inputs()]
    if elsewhere:
        stages = cut_at(made, sizes, elsewhere)
    else:
        stages = cut(made, inputs, constants=interface.constants, output=interface.output)
    return Served(stages=stages, example=inputs, elsewhere=tuple(elsewhere), dtype=dtype, kept=kept)


def in_dtype(transformer: nn.Module, dtype: torch.dtype, scratch: Path) -> nn.Module:
    """Copy a transformer with the weights that diffusers' `from_pretrained(torch_dtype=…)` loads.

    Its class keeps some in float32 (`_keep_in_fp32_modules`). Weights are cast one by one, the memory of each is given
    back, and those that are kept are shared with the original: no second copy is ever in memory.

    Args:
        transformer: in float32.
        dtype: of the copy.
        scratch: folder on a disk, for a file with the copy's weights (`mapped_weights.in_file`).
    """
    kept = set(getattr(transformer, "_keep_in_fp32_modules", None) or ())
    made: dict[int, Tensor] = {}
    wanted: dict[int, Tensor] = {}  # a weight may have two names
    for name, value in transformer.state_dict(keep_vars=True).items():
        shared = not value.is_floating_point() or not kept.isdisjoint(name.split("."))
        (made if shared else wanted)[id(value)] = value

    def cast() -> Iterator[Tensor]:
        for value in wanted.values():
            yield value.detach().to(dtype)
            give_back_all([value])

    for value, found in zip(wanted.values(), in_file(cast(), scratch), strict=True):
        made[id(value)] = nn.Parameter(found, value.requires_grad) if isinstance(value, nn.Parameter) else found
    copied: nn.Module = copy.deepcopy(transformer, dict(made))
    return copied


def inputs_in(inputs: Mapping[str, Tensor], dtype: torch.dtype, *, kept: Collection[str]) -> dict[str, Tensor]:
    """Inputs of the model for its copy in another dtype, but for integers and the names in `kept`.

    >>> cast = inputs_in({"x": torch.ones(2), "t": torch.ones(2), "ids": torch.ones(2).long()}, torch.half, kept=["t"])
    >>> {name: str(value.dtype) for name, value in cast.items()}
    {'x': 'torch.float16', 't': 'torch.float32', 'ids': 'torch.int64'}
    """
    return {
        name: value.to(dtype) if value.is_floating_point() and name not in kept else value
        for name, value in inputs.items()
    }
