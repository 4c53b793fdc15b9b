"""Weights that are mapped from a file: their memory is given back, and they are read again."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from otcache.compiler.mapped import give_back

SIDE = 4096
BYTES = 4 * SIDE * SIDE


def resident() -> int:
    """Bytes of mapped files that are in memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssFile:"))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux, whose kernel says what is in memory")
def test_memory_is_given_back_and_nothing_is_lost(tmp_path):
    save_file({"weight": torch.ones(SIDE, SIDE)}, tmp_path / "weights.safetensors")
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
