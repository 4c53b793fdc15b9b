"""Weights that accelerate and diffusers keep elsewhere are put in place for tracing, and offloaded again after it."""

from __future__ import annotations

from pathlib import Path

import accelerate
import pytest
import torch
from diffusers.hooks import apply_group_offloading
from flux_export import export_error, output
from torch import nn

from otcache.compiler.export.exportable import unexportable
from otcache.compiler.models.offloading import describe_offloading, weights_in_place
from otcache.schemas.errors import ModelError

CPU = torch.device("cpu")


def test_weights_in_place_are_told_from_offloaded_ones(flux):
    assert describe_offloading(flux) is None
    with weights_in_place(flux):
        assert describe_offloading(flux) is None


def offload_to_cpu(model: nn.Module, folder: Path) -> None:
    accelerate.cpu_offload(model, execution_device=CPU)


def offload_to_disk(model: nn.Module, folder: Path) -> None:
    accelerate.disk_offload(model, str(folder), execution_device=CPU)


def offload_whole(model: nn.Module, folder: Path) -> None:
    accelerate.cpu_offload_with_hook(model, execution_device=CPU)


def offload_groups(model: nn.Module, folder: Path) -> None:
    apply_group_offloading(model, CPU, offload_type="block_level", num_blocks_per_group=1)


def offload_groups_to_disk(model: nn.Module, folder: Path) -> None:
    apply_group_offloading(model, CPU, offload_type="leaf_level", offload_to_disk_path=str(folder))


@pytest.mark.parametrize(
    ("offload", "hook"),
    [
        (offload_to_cpu, "AlignDevicesHook"),
        (offload_to_disk, "AlignDevicesHook"),
        (offload_whole, "CpuOffload"),
        (offload_groups, "GroupOffloadingHook"),
        (offload_groups_to_disk, "GroupOffloadingHook"),
    ],
)
def test_offloaded_weights_are_put_in_place(flux, tmp_path, offload, hook):
    weights = {name: value.clone() for name, value in flux.state_dict().items()}
    expected = output(flux)
    offload(flux, tmp_path / "offloaded")
    assert unexportable(flux) is None
    told = describe_offloading(flux)
    assert told is not None
    assert told.startswith(f"FluxTransformer2DModel has 62 of 62 weights offloaded ({hook}, the first time_text_embed.")
    with weights_in_place(flux):
        assert describe_offloading(flux) is None
        for name, value in flux.state_dict().items():
            assert torch.equal(value, weights[name])
        assert export_error(flux, tmp_path / "stages") < 1e-5
    assert describe_offloading(flux) == told
    assert torch.equal(output(flux), expected)


def test_hooks_are_back_after_an_error(flux):
    offload_to_cpu(flux, Path())
    with pytest.raises(ModelError), weights_in_place(flux):
        raise ModelError("while exporting")
    assert "AlignDevicesHook" in (describe_offloading(flux) or "")
    assert all(value.is_meta for value in flux.parameters())
