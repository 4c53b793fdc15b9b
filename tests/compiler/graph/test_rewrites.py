"""Rewrites give the same values and leave nothing behind that ONNX or its runtime lacks."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn

from otcache.compiler.graph.rewrites import (
    SizesAsTensors,
    drop_idle_squeeze,
    expand_complex_rotation,
    inline_idle_autocast,
    replace_boolean_choice,
    reshape_views,
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


class Uncast(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        with torch.amp.autocast("cuda", enabled=False):
            return self.linear(x.float()).sin() + x


@pytest.mark.parametrize(
    ("model", "rewrite", "gone"),
    [
        (Uncast(), inline_idle_autocast, {torch.ops.higher_order.wrap_with_autocast}),
        (Rotation(), expand_complex_rotation, {aten.view_as_complex.default}),
        (Masks(), replace_boolean_choice, {aten.where.self, aten.masked_fill.Scalar}),
        (View(), reshape_views, {aten.view.default}),
        (Squeeze(), drop_idle_squeeze, {aten.squeeze.dim}),
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
    assert rounded == (rewrite is expand_complex_rotation)
    assert not rewrite(module)


def test_a_squeeze_of_one_stays():
    module = torch.export.export(Squeeze().eval(), (torch.randn(2, 1, 8),)).module()
    drop_idle_squeeze(module)
    assert aten.squeeze.dim in {node.target for node in module.graph.nodes}


class Lengths(nn.Module):
    def forward(self, x):
        return x + torch.as_tensor(x.shape[1], device=x.device) + torch.tensor(x.shape[1], dtype=torch.float32)


@pytest.mark.parametrize("rewritten", [False, True])
def test_sizes_that_become_tensors_stay_symbolic(rewritten):
    dynamic = ({0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO},)
    with SizesAsTensors() if rewritten else contextlib.nullcontext():
        program = torch.export.export(Lengths(), (torch.zeros(2, 5),), dynamic_shapes=dynamic)
    if rewritten:
        assert torch.equal(program.module()(torch.zeros(2, 7)), torch.full((2, 7), 14.0))
    else:
        with pytest.raises(AssertionError, match="size"):
            program.module()(torch.zeros(2, 7))
