"""A transformer in another dtype: what its stages compute in where `--dtype` asks for float16 or bfloat16.

Capture, searches and evaluation stay in float32, where the CPU is fast; what is exported is cut from a copy in the dtype, so
that every cast is where the model itself has it. Latents, conditioning and features are in the dtype at the borders of stages,
and nothing is cast between them. Time stays float32: half of it would round the step itself.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from .cut import cut
from .interface import Interface
from .sizes import Sizes, cut_at
from .stages import Stages


def stages_in(
    dtype: torch.dtype, transformer: nn.Module, interface: Interface, example: Mapping[str, Tensor], sizes: Sizes
) -> tuple[Stages, dict[str, Tensor], list[dict[str, Tensor]]]:
    """The transformer's stages in the dtype, an example of their inputs, and the inputs at each of `sizes`. Raises ModelError.

    example: in float32, with the constants of the size, which stay so.
    """
    kept = (interface.timestep_input, *sizes.constants)
    inputs, made = inputs_in(example, dtype, kept=kept), in_dtype(transformer, dtype)
    elsewhere = [inputs_in(each, dtype, kept=kept) for each in sizes.inputs()]
    if elsewhere:
        return cut_at(made, sizes, elsewhere), inputs, elsewhere
    return cut(made, inputs, constants=interface.constants, output=interface.output), inputs, []


def in_dtype(transformer: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy with the weights that diffusers' `from_pretrained(torch_dtype=…)` loads: its class keeps some in float32.

    Weights are cast one by one, and those that are kept are shared with the original: no second float32 copy is ever in memory.
    """
    kept = set(getattr(transformer, "_keep_in_fp32_modules", None) or ())
    made: dict[int, Tensor] = {}
    for name, value in transformer.state_dict(keep_vars=True).items():
        if not value.is_floating_point() or not kept.isdisjoint(name.split(".")):
            made[id(value)] = value
        elif id(value) not in made:  # a weight may have two names
            cast = value.detach().to(dtype)
            made[id(value)] = nn.Parameter(cast, value.requires_grad) if isinstance(value, nn.Parameter) else cast
    copied: nn.Module = copy.deepcopy(transformer, dict(made))
    return copied


def inputs_in(inputs: Mapping[str, Tensor], dtype: torch.dtype, *, kept: Collection[str]) -> dict[str, Tensor]:
    """Inputs of the model for its copy in the dtype. kept: those that stay as they are."""
    return {
        name: value.to(dtype) if value.is_floating_point() and name not in kept else value
        for name, value in inputs.items()
    }
