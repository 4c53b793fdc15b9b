"""Rewrites give the same values and leave nothing behind that ONNX or its runtime lacks."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn

from otcache.compiler.rewrites import (
    REPLACEMENTS,
    SizesAsTensors,
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


def test_replacements_are_of_classes_that_exist_and_last_as_long_as_asked():
    from diffusers.models.transformers import transformer_chroma

    part = transformer_chroma.ChromaCombinedTimestepTextProjEmbeddings(num_channels=8, out_dim=6)
    assert type(part).__name__ in REPLACEMENTS
    time = torch.tensor([0.2, 0.7])
    before = part(time)
    with replaced(part):
        assert "forward" in vars(part)
        assert torch.equal(part(time), before)
    assert "forward" not in vars(part)


def mochi():
    from diffusers.models.attention_processor import MochiAttention, MochiAttnProcessor2_0

    part = MochiAttention(
        query_dim=16, added_kv_proj_dim=16, processor=MochiAttnProcessor2_0(), heads=2, dim_head=8, out_dim=16, out_context_dim=16,
    ).eval()  # fmt: skip
    angle = torch.rand(6, 2, 4)
    mask = torch.arange(5) < torch.tensor([[2], [5], [1]])
    inputs = {"hidden_states": torch.randn(3, 6, 16), "encoder_hidden_states": torch.randn(3, 5, 16)}
    return part, {**inputs, "attention_mask": mask, "image_rotary_emb": (angle.cos(), angle.sin())}


def lumina():
    from diffusers import Lumina2Transformer2DModel

    model = Lumina2Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, hidden_size=32, num_layers=1, num_refiner_layers=1, num_attention_heads=2,
        num_kv_heads=2, multiple_of=16, axes_dim_rope=(4, 6, 6), axes_lens=(16, 4, 4), cap_feat_dim=8,
    ).eval()  # fmt: skip
    mask = (torch.arange(5) < torch.tensor([[2], [5], [1]])).long()
    inputs = {"hidden_states": torch.randn(3, 4, 4, 6), "encoder_hidden_states": torch.randn(3, 5, 8)}
    return model, {**inputs, "timestep": torch.rand(3), "encoder_attention_mask": mask, "return_dict": False}


def hunyuan():
    from diffusers import HunyuanVideo15Transformer3DModel

    model = HunyuanVideo15Transformer3DModel(
        in_channels=9, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2, num_refiner_layers=1,
        mlp_ratio=2.0, text_embed_dim=8, text_embed_2_dim=8, image_embed_dim=8, rope_axes_dim=(4, 6, 6), task_type="t2v",
    ).eval()  # fmt: skip
    mask = (torch.arange(5) < torch.tensor([[2], [5], [1]])).long()
    inputs = {"hidden_states": torch.randn(3, 9, 2, 4, 6), "encoder_hidden_states": torch.randn(3, 5, 8)}
    second = {"encoder_hidden_states_2": torch.randn(3, 4, 8), "encoder_attention_mask_2": mask.roll(1, 0)[:, :4]}
    return model, {
        **inputs, **second, "timestep": torch.rand(3), "encoder_attention_mask": mask, "image_embeds": torch.zeros(3, 6, 8),
        "return_dict": False,
    }  # fmt: skip


@pytest.mark.parametrize("make", [mochi, lumina, hunyuan])
@torch.no_grad()
def test_padded_text_hidden_by_a_mask_is_text_cut_off(make):
    torch.manual_seed(0)
    part, call = make()
    before = part(**call)
    with replaced(part) as rounds:
        assert rounds
        after = part(**call)
    for found, expected in zip(after, before, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    other = {**call, "encoder_hidden_states": call["encoder_hidden_states"].roll(1, 0)}
    assert not torch.allclose(part(**other)[0], before[0], atol=1e-3)  # text has a say in the result
