"""Text encoders run once and leave the device; what the pipeline is conditioned on stays the same to the last bit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline

from otcache.compiler.pipelines.encode_once import encoders_aside, text_encoders
from otcache.compiler.pipelines.placement import Placement

SUPPORT = Path(__file__).parents[2] / "support"
SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
import alt_device, torch
from diffusers import DiffusionPipeline
from otcache.compiler.pipelines.encode_once import encoders_aside, text_encoders
from otcache.compiler.pipelines.placement import Placement

alt_device.install()
pipeline = DiffusionPipeline.from_pretrained(sys.argv[2])
pipeline.to("alt")
placement = Placement(device=torch.device("alt"), precision=torch.float32)
encoders = text_encoders(pipeline)
assert [type(each).__name__ for each in encoders] == ["CLIPTextModel", "T5EncoderModel"]
calls = []
for each in encoders:
    each.register_forward_hook(lambda module, *_: calls.append(type(module).__name__))


def places():
    return [each.device.type for each in encoders]


def run(prompt):
    call = dict(height=16, width=16, max_sequence_length=12, num_inference_steps=2, output_type="latent")
    return pipeline(prompt, generator=torch.Generator().manual_seed(0), **call).images.cpu()


with alt_device.Tensors():
    expected = run(["a ring"]), run(["a star"])
    calls.clear()
    with encoders_aside(pipeline, placement) as leave:
        assert torch.equal(run(["a ring"]), expected[0])
        leave()
        assert places() == ["cpu", "cpu"] and pipeline._execution_device.type == "alt"
        assert torch.equal(run(["a ring"]), expected[0]) and len(calls) == 2, "known from before"
        assert places() == ["cpu", "cpu"]
        assert torch.equal(run(["a star"]), expected[1]) and len(calls) == 4, "another prompt has them come back"
        assert places() == ["cpu", "cpu"], "and leave again"
    assert places() == ["alt", "alt"] and "encode_prompt" not in vars(pipeline)
"""


def test_encoders_leave_the_device_and_come_back(tiny_flux_folder):
    command = [sys.executable, "-c", SCRIPT, str(SUPPORT), str(tiny_flux_folder)]
    done = subprocess.run(command, env=os.environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize(
    "placement",
    [
        Placement(device=torch.device("cpu"), precision=torch.float32),
        Placement(device=torch.device("cuda"), precision=torch.float32, offload="model"),
    ],
    ids=["on the CPU", "offloaded"],
)
def test_encoders_that_others_move_are_left_alone(tiny_flux_folder, placement):
    pipeline = DiffusionPipeline.from_pretrained(tiny_flux_folder)
    with encoders_aside(pipeline, placement) as leave:
        leave()
        assert "encode_prompt" not in vars(pipeline)
    assert len(text_encoders(pipeline)) == 2
