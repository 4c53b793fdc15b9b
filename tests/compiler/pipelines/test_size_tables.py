"""Tables: what parts without weights make of the size alone is found by running the model, and stands in for them."""

from __future__ import annotations

import torch
from torch import nn

from otcache.compiler.pipelines.arguments import InPlaceOf, PerSample, tensor_of
from otcache.compiler.pipelines.size_tables import following, standing_in, tables_of


class Rotary(nn.Module):
    """A complex table of the size, and rows that are repeated for each sample."""

    def forward(self, x, length):
        angle = torch.arange(length, dtype=torch.float32)[:, None] * torch.tensor([1.0, 0.5])
        return torch.polar(torch.ones_like(angle), angle), angle.repeat(x.shape[0], 1, 1)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.rotary, self.halved, self.scaled, self.idle = Rotary(), nn.Identity(), nn.Identity(), nn.Identity()
        self.weighted = nn.Linear(4, 4)
        self.blocks = nn.ModuleList(nn.Identity() for _ in range(2))

    def forward(self, x, time, length):
        table, rows = self.rotary(x, length)
        x = self.scaled(x) * self.halved(time / 2)[:, None, None]  # neither is the same at every step
        positions = self.idle(torch.arange(length, dtype=torch.float32)) * 0
        positions = self.idle(positions)  # what runs twice makes two things
        for block in self.blocks:
            positions = block(positions)
        turned = torch.view_as_complex(x.unflatten(-1, (2, 2))) * table
        return self.weighted(torch.view_as_real(turned).flatten(-2)) + rows.repeat(1, 1, 2) + positions[:, None]


def call(length):
    random = torch.Generator().manual_seed(length)
    return {"x": torch.randn(3, length, 4, generator=random), "time": torch.full((3,), 0.8)}


def test_only_constants_of_the_size_are_tables():
    tables = tables_of(Model().eval(), call(5), {"length": 5}, ("x", "time"))
    assert {name: table.place for name, table in tables.items()} == {
        "rotary_0": InPlaceOf(part="rotary", position=0, spread=False, pairs=True),
        "rotary_1": InPlaceOf(part="rotary", position=1, spread=True, pairs=False),
    }
    assert tables["rotary_0"].value.shape == (5, 2, 2)
    assert isinstance(tables["rotary_1"].value, PerSample) and tables["rotary_1"].value.row.shape == (1, 5, 2)


def test_tables_stand_in_for_the_part_as_long_as_asked():
    model = Model().eval()
    there = {length: tables_of(model, call(length), {"length": length}, ("x", "time")) for length in (5, 7)}
    assert following(list(there.values())) == ("rotary_0", "rotary_1") and not following([there[5], there[5]])
    inputs = {**call(5), **{name: tensor_of(table.value) for name, table in there[5].items()}}
    with torch.no_grad():
        expected = model(**call(5), length=5)
        with standing_in(model, inputs, {name: table.place for name, table in there[7].items()}):
            table, rows = model.rotary(None, "not a length")
            assert torch.equal(model(**call(5), length=5), expected)
    assert table.is_complex() and rows.shape == (3, 5, 2) and "forward" not in vars(model.rotary)
