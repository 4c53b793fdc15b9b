"""A small FLUX transformer: how it is called, and how far its exported stages are from it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from otcache.compiler.export.onnx_stages import end_to_end_error, export_stages
from otcache.compiler.graph.cut import cut


def inputs() -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(1)
    shapes = {"hidden_states": (2, 4, 4), "encoder_hidden_states": (2, 3, 64), "pooled_projections": (2, 64)}
    drawn = {name: torch.randn(shape, generator=random) for name, shape in shapes.items()}
    return {**drawn, "timestep": torch.tensor([0.25, 0.75])}


def constants() -> dict[str, object]:
    places = torch.cartesian_prod(torch.zeros(1), torch.arange(2.0), torch.arange(2.0))
    return {"img_ids": places, "txt_ids": torch.zeros(3, 3), "return_dict": False}


@torch.no_grad()
def output(model: nn.Module) -> Tensor:
    return model(**inputs(), **constants())[0]


def export_error(model: nn.Module, folder: Path) -> float:
    """Relative error of all exported stages, one after the other, to the model. Raises ModelError."""
    exported = export_stages(cut(model, inputs(), constants=constants()), inputs(), folder)
    return end_to_end_error(exported, inputs(), output(model))
