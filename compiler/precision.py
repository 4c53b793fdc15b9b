"""A transformer in another dtype: what its stages compute in where `--dtype` asks for float16 or bfloat16.

Capture, searches and evaluation stay in float32, where the CPU is fast; what is exported is cut from a copy in the dtype, so
that every cast is where the model itself has it. Latents, conditioning and features are in the dtype at the borders of stages,
and nothing is cast between them. Time stays float32: half of it would round the step itself.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .cut import cut
from .interface import Interface
from .stages import Stages


def stages_in(
    dtype: torch.dtype, transformer: nn.Module, interface: Interface, example: Mapping[str, Tensor]
) -> tuple[Stages, dict[str, Tensor]]:
    """The transformer's stages in the dtype, and an example of their inputs. example: in float32. Raises ModelError."""
    inputs = inputs_in(example, dtype, timestep=interface.timestep_input)
    made = in_dtype(transformer, dtype)
    return cut(made, inputs, constants=interface.constants, output=interface.output), inputs


def in_dtype(transformer: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy with the weights that diffusers' `from_pretrained(torch_dtype=…)` loads: its class keeps some in float32."""
    kept = set(getattr(transformer, "_keep_in_fp32_modules", None) or ())
    made = copy.deepcopy(transformer)
    for name, value in made.state_dict(keep_vars=True).items():
        if value.is_floating_point() and kept.isdisjoint(name.split(".")):
            value.data = value.data.to(dtype)
    return made


def inputs_in(inputs: Mapping[str, Tensor], dtype: torch.dtype, *, timestep: str) -> dict[str, Tensor]:
    """Inputs of the model for its copy in the dtype. timestep: the one that stays as it is."""
    return {
        name: value.to(dtype) if value.is_floating_point() and name != timestep else value
        for name, value in inputs.items()
    }
