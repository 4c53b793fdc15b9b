"""What stands in for a class while it is traced computes what the class does."""

from __future__ import annotations

import pytest
import torch

from otcache.compiler.graph.cut import cut
from otcache.compiler.graph.replacements import REPLACEMENTS, stand_ins
from otcache.compiler.pipelines.arguments import Listed, Samples
from otcache.schemas.errors import ModelError


def test_replacements_are_of_classes_that_exist_and_last_as_long_as_asked():
    from diffusers.models.transformers import transformer_chroma

    part = transformer_chroma.ChromaCombinedTimestepTextProjEmbeddings(num_channels=8, out_dim=6)
    assert type(part).__name__ in REPLACEMENTS
    time = torch.tensor([0.2, 0.7])
    before = part(time)
    with stand_ins(part):
        assert "forward" in vars(part)
        assert torch.equal(part(time), before)
    assert "forward" not in vars(part)


def mochi():
    from diffusers.models.attention_processor import MochiAttention, MochiAttnProcessor2_0

    part = MochiAttention(
        query_dim=16,
        added_kv_proj_dim=16,
        processor=MochiAttnProcessor2_0(),
        heads=2,
        dim_head=8,
        out_dim=16,
        out_context_dim=16,
    ).eval()
    angle = torch.rand(6, 2, 4)
    mask = torch.arange(5) < torch.tensor([[2], [5], [1]])
    inputs = {"hidden_states": torch.randn(3, 6, 16), "encoder_hidden_states": torch.randn(3, 5, 16)}
    return part, {**inputs, "attention_mask": mask, "image_rotary_emb": (angle.cos(), angle.sin())}


def lumina():
    from diffusers import Lumina2Transformer2DModel

    model = Lumina2Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        hidden_size=32,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=2,
        multiple_of=16,
        axes_dim_rope=(4, 6, 6),
        axes_lens=(16, 4, 4),
        cap_feat_dim=8,
    ).eval()
    mask = (torch.arange(5) < torch.tensor([[2], [5], [1]])).long()
    inputs = {"hidden_states": torch.randn(3, 4, 4, 6), "encoder_hidden_states": torch.randn(3, 5, 8)}
    return model, {**inputs, "timestep": torch.rand(3), "encoder_attention_mask": mask, "return_dict": False}


def hunyuan():
    from diffusers import HunyuanVideo15Transformer3DModel

    model = HunyuanVideo15Transformer3DModel(
        in_channels=9,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=8,
        text_embed_2_dim=8,
        image_embed_dim=8,
        rope_axes_dim=(4, 6, 6),
        task_type="t2v",
    ).eval()
    mask = (torch.arange(5) < torch.tensor([[2], [5], [1]])).long()
    inputs = {"hidden_states": torch.randn(3, 9, 2, 4, 6), "encoder_hidden_states": torch.randn(3, 5, 8)}
    second = {"encoder_hidden_states_2": torch.randn(3, 4, 8), "encoder_attention_mask_2": mask.roll(1, 0)[:, :4]}
    return model, {
        **inputs,
        **second,
        "timestep": torch.rand(3),
        "encoder_attention_mask": mask,
        "image_embeds": torch.zeros(3, 6, 8),
        "return_dict": False,
    }


def z_image_model(layers=2):
    from diffusers import ZImageTransformer2DModel

    model = ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=layers,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=8,
        axes_dims=[4, 6, 6],
        axes_lens=[128, 32, 32],
    ).eval()
    for token in (model.x_pad_token, model.cap_pad_token):
        torch.nn.init.normal_(token)  # zero until it is trained
    return model


def z_image(length, height, width):
    """Captions of 1, some and all rows."""
    mask = (torch.arange(length) < torch.tensor([[1], [length], [length - 2]])).long()
    x, captions = torch.randn(3, 4, 1, height, width), torch.randn(3, length, 8)
    call = {"x": Samples(x), "t": torch.rand(3), "cap_feats": Samples(captions, mask), "return_dict": False}
    return z_image_model(), call


@pytest.mark.parametrize("make", [mochi, lumina, hunyuan])
@torch.no_grad()
def test_padded_text_hidden_by_a_mask_is_text_cut_off(make):
    torch.manual_seed(0)
    part, call = make()
    before = part(**call)
    with stand_ins(part) as rounds:
        assert rounds
        after = part(**call)
    for found, expected in zip(after, before, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    other = {**call, "encoder_hidden_states": call["encoder_hidden_states"].roll(1, 0)}
    assert not torch.allclose(part(**other)[0], before[0], atol=1e-3)  # text has a say in the result


@pytest.mark.parametrize(("length", "height", "width"), [(5, 4, 6), (70, 8, 12), (32, 16, 16)])
@torch.no_grad()
def test_samples_at_once_are_samples_in_lists(length, height, width):
    """Also where pictures are padded, and captions to several multiples of 32."""
    torch.manual_seed(0)
    model, call = z_image(length, height, width)
    pictures, captions = list(call["x"]), list(call["cap_feats"])
    assert [len(rows) for rows in captions] == [1, length, length - 2]
    expected = torch.stack(model(**{**call, "x": pictures, "cap_feats": captions})[0])
    torch.testing.assert_close(torch.stack(model(**call)[0]), expected)  # what the list model is given elsewhere
    with stand_ins(model) as rounds:
        assert rounds
        torch.testing.assert_close(model(**call)[0], expected, rtol=1e-5, atol=1e-5)
        other = Samples(call["cap_feats"].rows.roll(1, 0), call["cap_feats"].mask)
        assert not torch.allclose(model(**{**call, "cap_feats": other})[0], expected, atol=1e-3)


def test_the_picture_is_the_feature_of_a_sequence_that_text_joins_before_the_blocks():
    """With refiners that are a small part of the model, as they are of the real one, and no trace of them among the
    blocks.
    """
    torch.manual_seed(0)
    mask = (torch.arange(5) < torch.tensor([[2], [5]])).long()
    inputs = {
        "x": torch.randn(2, 4, 4, 6),
        "t": torch.rand(2),
        "cap_feats": torch.randn(2, 5, 8),
        "cap_feats_mask": mask,
    }
    constants = {"x": Listed(axis=1), "cap_feats": Listed(mask="cap_feats_mask"), "return_dict": False}
    stages = cut(z_image_model(layers=11), inputs, constants=constants)
    assert [stage.name for stage in stages.stages] == ["embed", *(f"block_{i}" for i in range(11)), "head"]
    ((source, result),) = stages.features
    assert source in stages.stages[0].outputs and result == "block_10_out_0"


def test_lists_of_samples_without_a_replacement_are_refused(monkeypatch):
    monkeypatch.delitem(REPLACEMENTS, "ZImageTransformer2DModel")
    inputs = {"x": torch.randn(2, 4, 4, 6), "t": torch.rand(2), "cap_feats": torch.randn(2, 5, 8)}
    constants = {"x": Listed(axis=1), "cap_feats": Listed(), "return_dict": False}
    with pytest.raises(ModelError, match="an argument lists one tensor a sample, which fixes the batch"):
        cut(z_image_model(), inputs, constants=constants)
