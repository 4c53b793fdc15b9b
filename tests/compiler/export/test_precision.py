"""A transformer in another dtype: the weights that diffusers would load, and the files that bfloat16 is compared on."""

from __future__ import annotations

import pytest
import torch
from diffusers import FluxTransformer2DModel, WanTransformer3DModel
from torch import nn

from otcache.compiler.export.onnx_stages import export_module, run_exported
from otcache.compiler.export.precision import in_dtype, inputs_in
from otcache.schemas.errors import ModelError


def wan():
    """Its class keeps norms and time embeddings in float32."""
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=8,
        freq_dim=8,
        ffn_dim=16,
        num_layers=1,
        rope_max_seq_len=16,
    )


def flux():
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=8,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=10,
        axes_dims_rope=(4, 6, 6),
    )


@pytest.mark.parametrize("make", [flux, wan])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_are_those_that_diffusers_loads(make, dtype, tmp_path):
    model = make()
    model.save_pretrained(tmp_path)
    expected = type(model).from_pretrained(tmp_path, torch_dtype=dtype).state_dict()
    found = in_dtype(model, dtype, tmp_path).state_dict()
    assert found.keys() == expected.keys() and dtype in {value.dtype for value in found.values()}
    for name, value in found.items():
        assert value.dtype == expected[name].dtype and torch.equal(value, expected[name]), name
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}, "the model is as it was"


def test_time_and_integers_stay():
    example = {"hidden_states": torch.ones(2, 3), "timestep": torch.ones(2), "ids": torch.ones(2, dtype=torch.int64)}
    found = {name: value.dtype for name, value in inputs_in(example, torch.float16, kept=("timestep",)).items()}
    assert found == {"hidden_states": torch.float16, "timestep": torch.float32, "ids": torch.int64}


WIDTH = 1024
"""Where sums in bfloat16 would go wrong."""


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.mix = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return nn.functional.gelu(self.mix(self.norm(x)), approximate="tanh")


@pytest.mark.parametrize(("dtype", "expected"), [(torch.float16, 2e-3), (torch.bfloat16, 1.5e-2)])
def test_half_files_are_run_and_compared(dtype, expected, tmp_path):
    x = 1 + torch.randn(2, 4, WIDTH, generator=torch.Generator().manual_seed(1))
    module, path = in_dtype(Small().eval(), dtype, tmp_path), tmp_path / "small.onnx"
    made = export_module(module, {"x": x.to(dtype)}, ("y",), path, kind="block")
    assert 0 <= made.max_relative_error < expected
    (y,) = (value for name, value in run_exported([made], {"x": x.to(dtype)}).items() if name == "y")
    whole = Small()(x).detach().numpy()
    assert str(y.dtype) == str(dtype).removeprefix("torch.")
    assert 0 < abs(y.astype("float32") - whole).max() < expected * abs(whole).max()
    with pytest.raises(ModelError, match="stage small: its ONNX form differs from torch by"):
        export_module(module, {"x": x.to(dtype)}, ("y",), path, kind="block", tolerance=-1.0)
