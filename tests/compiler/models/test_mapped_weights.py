"""Weights that are mapped from a file: their memory is given back, and they are read again."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from otcache.compiler.models.mapped_weights import give_back, given_back_in_turn, in_file, move_to_file

SIDE = 4096
BYTES = 4 * SIDE * SIDE


def resident() -> int:
    """Bytes of mapped files that are in memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssFile:"))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux, whose kernel says what is in memory")
def test_memory_is_given_back_and_nothing_is_lost(tmp_path):
    save_file({"weight": torch.ones(SIDE, SIDE)}, tmp_path / "weights.safetensors")
    with open(tmp_path / "weights.safetensors", "rb") as file:
        os.fsync(file.fileno())  # what is not on the disk yet cannot be dropped
    with torch.device("meta"):
        module = torch.nn.Linear(SIDE, SIDE, bias=False)
    module.load_state_dict(load_file(tmp_path / "weights.safetensors"), assign=True)
    weight = module.weight.requires_grad_(False)
    before = resident()
    assert float(weight.sum()) == SIDE * SIDE
    weight[0, 0] = 2.0  # a change, as a fused LoRA makes it
    assert resident() - before > 0.9 * BYTES
    give_back(module)
    assert resident() - before < 0.1 * BYTES
    assert float(weight.double().sum()) == SIDE * SIDE + 1


class Chain(torch.nn.Sequential):
    """Tells how much is in memory when its end is reached."""

    def forward(self, x):
        x = super().forward(x)
        self.resident = resident()
        return x


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux, whose kernel says what is in memory")
def test_what_is_called_is_given_back_in_turn(tmp_path):
    layers = Chain(*(torch.nn.Linear(1024, 1024) for _ in range(8))).requires_grad_(False)
    move_to_file(layers, tmp_path)
    assert not list(tmp_path.iterdir()), "the file has no name"
    x, before = torch.ones(1, 1024), resident()
    expected = layers(x)
    assert layers.resident - before > 0.9 * 8 * 4 * 1024**2, "all of it"
    give_back(layers)
    with given_back_in_turn(layers):
        assert torch.equal(layers(x), expected)
    assert layers.resident - before < 2 * 4 * 1024**2
    layers(x)
    assert layers.resident - before > 0.9 * 8 * 4 * 1024**2, "no longer"


def test_any_tensor_is_put_into_a_file(tmp_path):
    tensors = [
        torch.arange(3, dtype=torch.int8),
        torch.randn(2, 3).t(),
        torch.empty(0, 4),
        torch.tensor(True),
        torch.randn(5).bfloat16(),
    ]
    found = in_file((tensor for tensor in tensors), tmp_path)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(tensors, found, strict=True))
    found[1][0, 0] = 7.0
    assert found[1][0, 0] == 7.0 and in_file([], tmp_path) == []
    assert found[4].untyped_storage().nbytes() == 10, "of its own: what copies the storage copies no neighbours"
