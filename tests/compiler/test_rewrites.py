"""Rewrites give the same values and leave nothing behind that ONNX or its runtime lacks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from otcache.compiler.rewrites import (
    REPLACEMENTS,
    boolean_choice,
    complex_rotation,
    idle_squeeze,
    layout_free_view,
    replaced,
)

aten = torch.ops.aten


class Rotation(nn.Module):
    def __init__(self):
        super().__init__()
        self.turn = torch.polar(torch.ones(5, 4), torch.randn(5, 4))

    def forward(self, x):
        pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * self.turn).flatten(-2)


class Masks(nn.Module):
    def forward(self, x):
        mask = x > 0
        chosen = torch.where(mask, x > 1, x < -1)
        return chosen.masked_fill(x > 2, True).masked_fill(x < -2, False)


class View(nn.Module):
    def forward(self, x):
        return x.view(x.shape[0], -1)


class Squeeze(nn.Module):
    def forward(self, x):
        return x.squeeze(1)


@pytest.mark.parametrize(
    ("model", "rewrite", "gone"),
    [
        (Rotation(), complex_rotation, {aten.view_as_complex.default}),
        (Masks(), boolean_choice, {aten.where.self, aten.masked_fill.Scalar}),
        (View(), layout_free_view, {aten.view.default}),
        (Squeeze(), idle_squeeze, {aten.squeeze.dim}),
    ],
)
def test_rewrite(model, rewrite, gone):
    x = 3 * torch.randn(2, 5, 8)
    module = torch.export.export(model.eval(), (x,), dynamic_shapes=({0: torch.export.Dim.AUTO},)).module()
    assert gone <= {node.target for node in module.graph.nodes}
    rounded = rewrite(module)
    module.recompile()
    assert not gone & {node.target for node in module.graph.nodes}
    if rounded:
        torch.testing.assert_close(module(x), model(x), rtol=0, atol=2e-6)
    else:
        assert torch.equal(module(x), model(x))
    assert rounded == (rewrite is complex_rotation)
    assert not rewrite(module)


def test_a_squeeze_of_one_stays():
    module = torch.export.export(Squeeze().eval(), (torch.randn(2, 1, 8),)).module()
    idle_squeeze(module)
    assert aten.squeeze.dim in {node.target for node in module.graph.nodes}


def test_replacements_are_of_classes_that_exist_and_last_as_long_as_asked():
    from diffusers.models.transformers import transformer_chroma

    (name,) = REPLACEMENTS
    part = getattr(transformer_chroma, name)(num_channels=8, out_dim=6)
    time = torch.tensor([0.2, 0.7])
    before = part(time)
    with replaced(part):
        assert "forward" in vars(part)
        assert torch.equal(part(time), before)
    assert "forward" not in vars(part)
