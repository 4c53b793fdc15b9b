"""Digests of what is in memory: the same for the same model however it is held, another for another one."""

from __future__ import annotations

import copy
import hashlib
import json
import math

import accelerate
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, PixArtTransformer2DModel
from diffusers.hooks import apply_group_offloading

from otcache.compiler.models.digests import (
    config_digest,
    denoiser_digest,
    options_from_plain,
    own_options,
    plain_options,
    weights_digest,
)
from otcache.compiler.models.load import load_model
from otcache.compiler.models.offloading import describe_offloading
from otcache.schemas.digest import digest_of_value
from otcache.schemas.errors import ModelError


@pytest.fixture(scope="module")
def transformer():
    torch.manual_seed(0)
    return PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        cross_attention_dim=16,
        sample_size=8,
        patch_size=2,
        caption_channels=16,
    )


def test_precision_and_reloading_do_not_matter(transformer, tmp_path):
    expected = denoiser_digest(transformer)
    assert denoiser_digest(copy.deepcopy(transformer).bfloat16()) == expected
    half = copy.deepcopy(transformer).half()
    assert denoiser_digest(copy.deepcopy(half).float()) == denoiser_digest(half)
    transformer.save_pretrained(tmp_path)
    assert denoiser_digest(PixArtTransformer2DModel.from_pretrained(tmp_path)) == expected


def test_definition(transformer):
    """As schemas/README.md has it."""
    tensors = {}
    for name, value in transformer.state_dict().items():
        data = value.to(torch.bfloat16).view(torch.int16).numpy().astype("<i2").tobytes()
        tensors[name] = [list(value.shape), "sha256:" + hashlib.sha256(data).hexdigest()]
    value = {"class": "PixArtTransformer2DModel", "config": own_options(transformer), "tensors": tensors}
    assert denoiser_digest(transformer) == digest_of_value(value)


def test_another_weight_or_option_shows(transformer):
    other = copy.deepcopy(transformer)
    with torch.no_grad():
        next(other.parameters()).view(-1)[0] += 1.0
    assert denoiser_digest(other) != denoiser_digest(transformer)
    other = copy.deepcopy(transformer)
    other.register_to_config(interpolation_scale=7)
    assert denoiser_digest(other) != denoiser_digest(transformer)


def test_only_options_that_differ_from_the_defaults_count():
    assert own_options(FlowMatchEulerDiscreteScheduler(shift=3.0, base_shift=0.5)) == {"shift": 3.0}


def test_options_of_a_manifest_are_json_and_read_back():
    scheduler = DPMSolverMultistepScheduler(solver_order=3, trained_betas=[0.1] * 1000)
    options = plain_options(scheduler)
    assert options["solver_order"] == 3 and options["trained_betas"] == [0.1] * 1000
    assert options["lambda_min_clipped"] == {"__float__": "-Infinity"}, "which JSON does not know as a number"
    again = options_from_plain(json.loads(json.dumps(options, allow_nan=False)))
    assert again["lambda_min_clipped"] == -math.inf and again["solver_order"] == 3
    assert digest_of_value({"a": math.nan}) == digest_of_value({"a": {"__float__": "NaN"}}), "as transformers writes it"
    assert digest_of_value({"a": math.inf}) != digest_of_value({"a": -math.inf})


def test_weights_that_are_elsewhere_are_refused(transformer):
    with pytest.raises(
        ModelError, match=r"PixArtTransformer2DModel: .* is on the meta device: expected weights in memory"
    ):
        denoiser_digest(copy.deepcopy(transformer).to("meta"))


def test_every_component_of_a_pipeline_counts(tiny_flux_folder):
    pipeline = load_model(str(tiny_flux_folder)).pipeline
    again = load_model(str(tiny_flux_folder)).pipeline
    configs, weights = config_digest(pipeline), weights_digest(pipeline)
    assert (config_digest(again), weights_digest(again)) == (configs, weights)
    again.scheduler = FlowMatchEulerDiscreteScheduler(shift=2.0)
    assert config_digest(again) != configs and weights_digest(again) == weights
    with torch.no_grad():
        next(again.text_encoder_2.parameters()).view(-1)[0] *= 1 + 2**-20
    assert weights_digest(again) != weights


@pytest.mark.parametrize("offload", ["sequential", "group"])
def test_weights_that_hooks_keep_elsewhere_are_found(transformer, offload):
    offloaded, cpu = copy.deepcopy(transformer), torch.device("cpu")
    if offload == "sequential":
        accelerate.cpu_offload(offloaded, execution_device=cpu)
        assert all(value.is_meta for value in offloaded.parameters())
    else:
        apply_group_offloading(offloaded, cpu, offload_type="leaf_level")
    assert denoiser_digest(offloaded) == denoiser_digest(transformer)
    assert describe_offloading(offloaded) is not None


class Packed(torch.Tensor):
    """Whole numbers and a scale, as packages that quantise keep a matrix."""

    @staticmethod
    def __new__(cls, numbers, scale):
        return torch.Tensor._make_wrapper_subclass(cls, numbers.shape, dtype=torch.float32)

    def __init__(self, numbers, scale):
        self.numbers, self.scale = numbers, scale

    def __tensor_flatten__(self):
        return ["numbers", "scale"], None

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].numbers, args[0].scale)
        raise NotImplementedError(f"{func} of packed numbers")


def test_packed_weights_are_named_by_their_parts(transformer):
    def quantised(scale):
        model = copy.deepcopy(transformer)
        numbers = torch.arange(model.proj_out.weight.numel(), dtype=torch.int8).view_as(model.proj_out.weight)
        model.proj_out.weight = torch.nn.Parameter(Packed(numbers, torch.tensor(scale)), requires_grad=False)
        return denoiser_digest(model)

    assert quantised(0.5) == quantised(0.5)
    assert len({quantised(0.5), quantised(0.25), denoiser_digest(transformer)}) == 3
