"""Where tensors are made and counted: on a GPU that is only pretended, tensors of two devices raise as on a
real one.
"""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from otcache.compiler.calibration.rollout import StagedModel
from otcache.compiler.export.decoder import LatentDecoder
from otcache.compiler.graph.stages import StageGraph, Stages
from otcache.compiler.pipelines.denoiser import Denoiser, place_constants
from otcache.compiler.pipelines.interface import Interface
from otcache.compiler.pipelines.placement import (
    PeakBytes,
    Placement,
    check_placement,
    choose_micro_batch,
    device_from_name,
    placement_of,
)
from otcache.compiler.pipelines.size_tables import InPlaceOf, Table
from otcache.schemas.errors import HostError, UsageError
from otcache.schemas.program import Step

CUDA = torch.device("cuda", 0)
OTHER_DEVICE = r"different devices|same device|two devices|cuda.*cpu"


@pytest.fixture
def gpu():
    with FakeTensorMode(allow_non_fake_inputs=False), torch.no_grad():  # gradients ask for streams
        yield


def interface(**changes):
    values = dict(
        latents_input="hidden_states",
        timestep_input="timestep",
        timestep_scale=1e-3,
        conditioning=("encoder_hidden_states", "pooled_projections"),
        constants={"img_ids": torch.zeros(4, 3), "txt_ids": torch.zeros(5, 3), "return_dict": False},
        guided=True,
        stacked=False,
        positive_first=False,
        noise_shape=(4, 16),
        noise_split=(4, 16),
        noise_permutation=(0, 1),
        latents_shape=(4, 16),
        dtype=torch.bfloat16,
    )
    return Interface(**values | changes)


def denoiser(transformer, found):
    conditioning = {
        "encoder_hidden_states": torch.zeros(2, 3, 5, 64, device=CUDA, dtype=torch.bfloat16),
        "pooled_projections": torch.zeros(2, 3, 64, device=CUDA, dtype=torch.bfloat16),
    }
    return Denoiser(
        transformer=transformer, interface=found, conditioning=conditioning, guidance=torch.ones(3, device=CUDA)
    )


class Transformer(nn.Module):
    """Reads every argument. (Slices and convolutions on a GPU take a torch that was built for one.)"""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(16, 16, device=CUDA, dtype=torch.bfloat16))

    def forward(
        self, hidden_states, timestep, encoder_hidden_states, pooled_projections, img_ids, txt_ids, return_dict=True
    ):
        assert hidden_states.dtype == torch.bfloat16 and timestep.dtype == torch.bfloat16
        text = encoder_hidden_states.mean((1, 2)) + pooled_projections.mean(1) + timestep
        places = img_ids.sum(1).view(1, -1, 1) + txt_ids.sum()
        return (hidden_states @ self.weight + places + text.view(-1, 1, 1),)


def test_a_denoiser_stays_on_its_device(gpu):
    model, latents = Transformer(), torch.zeros(3, 4, 16, device=CUDA)
    output = denoiser(model, place_constants(interface(), CUDA))(latents, 500.0)
    assert output.device == CUDA and output.dtype == torch.float32 and output.shape == latents.shape
    with pytest.raises(RuntimeError, match=OTHER_DEVICE):
        denoiser(model, interface())(latents, 500.0)


class Scale(nn.Module):
    def forward(self, latents, table):
        return (latents * table,)


class Shift(nn.Module):
    def forward(self, embedded):
        return (embedded + 1,)


class Last(nn.Module):
    def forward(self, result):
        return (result * 2,)


def stages():
    parts = [
        ("embed", "embed", Scale(), ("hidden_states", "table"), ("embedded",)),
        ("block_0", "block", Shift(), ("embedded",), ("result",)),
        ("head", "head", Last(), ("result",), ("output",)),
    ]
    return Stages(
        stages=tuple(
            StageGraph(name, kind, torch.fx.symbolic_trace(module), inputs, outputs)
            for name, kind, module, inputs, outputs in parts
        ),
        inputs=("hidden_states", "table"),
        output="output",
        features=(("embedded", "result"),),
    )


def test_a_model_in_stages_stays_on_its_device_with_its_tables(gpu):
    table = Table(place=InPlaceOf.__new__(InPlaceOf), value=torch.ones(16))
    found = interface(tables={"table": table}, guided=False, dtype=torch.float32)
    staged = StagedModel(stages(), denoiser(None, place_constants(found, CUDA)), keep=1)
    latents = torch.zeros(3, 4, 16, device=CUDA)
    step = dict(timestep=1.0, input_scale=1.0, residual_coefs=(1.0,), latent_coef=1.0, output_coefs=(1.0,))
    for index, compute in enumerate((True, False)):
        output = staged(latents, Step(step_index=index, compute=compute, **step))
        assert output.device == CUDA
    with pytest.raises(RuntimeError, match=OTHER_DEVICE):
        StagedModel(stages(), denoiser(None, found))(latents, Step(step_index=0, compute=True, **step))


class Autoencoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 1, 1, device=CUDA, dtype=torch.bfloat16))
        self.config = {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
        self.dtype = torch.bfloat16

    def decode(self, latents, return_dict):
        return ((self.weight * latents).sum(1, keepdim=True).expand(-1, 3, -1, -1),)


def test_a_decoder_is_where_latents_come_from(gpu):
    vae = Autoencoder()
    latents = torch.zeros(1, 4, 8, 8, device=CUDA)
    pictures = LatentDecoder(SimpleNamespace(vae=vae), None, CUDA)(latents)
    assert pictures.device == CUDA and pictures.dtype == torch.float32 and pictures.shape == (1, 8, 8, 3)
    with pytest.raises(RuntimeError, match=OTHER_DEVICE):
        LatentDecoder(SimpleNamespace(vae=vae), None)(latents)


def test_bytes_are_counted_and_dropped():
    weight = torch.zeros(1000, 1000)
    with PeakBytes([weight]) as counted:
        first = weight + 1
        assert counted.live == 1000 * 1000 * 4
        del first
        second = weight[:500] * 2  # a view takes nothing
        assert counted.live == 500 * 1000 * 4
        del second
    assert counted.live == 0 and counted.peak == 1000 * 1000 * 4


def test_bytes_of_a_device_are_counted(gpu):
    weight = torch.zeros(1000, 1000, device=CUDA)
    with PeakBytes([weight]) as counted:
        assert (weight + 1).device == CUDA
    assert counted.peak == 1000 * 1000 * 4


@pytest.mark.parametrize(
    ("sample", "free", "expected"),
    [(1 << 30, 100 << 30, 8), (1 << 30, 10 << 30, 4), (9 << 30, 10 << 30, 1), (1 << 40, None, 8)],
)
def test_the_micro_batch_fits(sample, free, expected):
    assert choose_micro_batch(sample, free) == expected


def test_one_sample_that_does_not_fit_says_what_it_would_take():
    with pytest.raises(HostError, match=r"takes about 11.8 GB beside the model, and 10.7 GB are free: give a smaller"):
        choose_micro_batch(11 << 30, 10 << 30)


def test_devices_that_are_not_there():
    for name, error, said in [
        ("cuda:99", HostError, r"--device is cuda:99: this host has \d+ CUDA devices"),
        ("meta", HostError, "--device is meta: torch cannot use it here"),
        ("fast", UsageError, "--device is 'fast': expected auto, cpu"),
    ]:
        with pytest.raises(error, match=said):
            device_from_name(name)
    with pytest.raises(UsageError, match="--offload group gives a device's memory back"):
        check_placement(Placement(device=torch.device("cpu"), precision=torch.float32, offload="group"))


def test_the_precision_of_a_pipeline_in_memory_is_that_of_most_of_its_weights():
    model = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64))
    model[0].to(torch.bfloat16)  # as diffusers keeps norms in float32
    pipeline = SimpleNamespace(components={"transformer": model}, _execution_device=torch.device("cpu"))
    found = placement_of(pipeline, model)
    assert found.precision == torch.bfloat16 and not found.exportable
    assert dataclasses.replace(found, precision=torch.float32).exportable
