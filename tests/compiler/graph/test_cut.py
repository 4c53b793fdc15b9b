"""The cut: stages reproduce the model bit for bit, and the features are what a skipped run of blocks must supply."""

from __future__ import annotations

import functools

import pytest
import torch
from diffusers import DiTTransformer2DModel, FluxTransformer2DModel, PixArtTransformer2DModel, SD3Transformer2DModel
from torch import nn

from otcache.compiler.graph.cut import cut
from otcache.compiler.graph.stages import run_in_turn
from otcache.schemas.errors import ModelError


def flux(image_tokens=5, text_tokens=5):
    # Equal lengths: the shape alone does not tell which tensor the features evolve from.
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=8,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=10,
        axes_dims_rope=(4, 6, 6),
    )
    kwargs = {
        "hidden_states": torch.randn(2, image_tokens, 8),
        "timestep": torch.rand(2),
        "encoder_hidden_states": torch.randn(2, text_tokens, 12),
        "pooled_projections": torch.randn(2, 10),
    }
    constants = {
        "img_ids": torch.rand(image_tokens, 3),
        "txt_ids": torch.zeros(text_tokens, 3),
        "guidance": None,
        "joint_attention_kwargs": {},
        "return_dict": False,
    }
    return model, kwargs, constants


def dit():
    model = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=4,
        num_embeds_ada_norm=10,
    )
    latents, labels = torch.randn(2, 4, 4, 4), torch.tensor([1, 2])
    return (
        model,
        {"hidden_states": latents, "timestep": torch.tensor([3, 500]), "class_labels": labels},
        {"return_dict": False},
    )


def sd3():
    model = SD3Transformer2DModel(
        sample_size=4,
        in_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=32,
        pooled_projection_dim=10,
        out_channels=4,
        pos_embed_max_size=4,
    )
    kwargs = {
        "hidden_states": torch.randn(2, 4, 4, 4),
        "encoder_hidden_states": torch.randn(2, 5, 12),
        "pooled_projections": torch.randn(2, 10),
        "timestep": torch.rand(2) * 1000,
    }
    return model, kwargs, {"return_dict": False}


def pixart():
    model = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=32,
        sample_size=4,
        caption_channels=12,
        use_additional_conditions=False,
    )
    kwargs = {
        "hidden_states": torch.randn(2, 4, 4, 4),
        "encoder_hidden_states": torch.randn(2, 5, 12),
        "timestep": torch.rand(2) * 1000,
    }
    return model, kwargs, {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}, "return_dict": False}


MODELS = {make.__name__: make for make in (flux, dit, sd3, pixart)}


@functools.cache
def made(name):
    torch.manual_seed(0)
    model, kwargs, constants = MODELS[name]()
    with torch.no_grad():
        for parameter in model.parameters():  # the initial ones hold zeros, which hide mistakes
            parameter.add_(0.02 * torch.randn_like(parameter))
    model.eval()
    return name, model, kwargs, constants, cut(model, kwargs, constants=constants)


@pytest.fixture(params=MODELS)
def example(request):
    return made(request.param)


def batch_of(kwargs, size):
    rows = torch.arange(size) % 2
    return {n: v[rows] + torch.randn(v[rows].shape) if v.is_floating_point() else v[rows] for n, v in kwargs.items()}


@pytest.mark.parametrize("size", [1, 2, 3])
def test_stages_reproduce_the_model_at_any_batch(example, size):
    _, model, kwargs, constants, stages = example
    inputs = batch_of(kwargs, size)
    with torch.no_grad():
        expected = model(**inputs, **constants)[0]
    received = run_in_turn(stages, inputs)[stages.output]
    assert torch.equal(received, expected) if size == 2 else torch.allclose(received, expected, rtol=1e-5, atol=1e-5)


def test_stages_are_a_chain(example):
    name, _, kwargs, _, stages = example
    blocks = 4 if name.startswith("flux") else 2
    assert [stage.name for stage in stages.stages] == ["embed", *(f"block_{i}" for i in range(blocks)), "head"]
    known = set(stages.inputs)
    assert known == set(kwargs)
    for stage in stages.stages:
        assert known.issuperset(stage.inputs)
        assert known.isdisjoint(stage.outputs)
        assert all(output.isidentifier() for output in stage.outputs)
        known.update(stage.outputs)
    assert stages.stages[-1].outputs == (stages.output,)


def test_stages_own_what_they_use(example):
    _, model, _, _, stages = example
    total = sum(p.numel() for p in model.parameters())
    owned = [sum(p.numel() for p in stage.module.parameters()) for stage in stages.stages]
    assert all(owned) and all(count < total for count in owned)
    originals = {id(p) for p in model.parameters()}
    assert all(id(p) in originals for stage in stages.stages for p in stage.module.parameters())


def test_one_pair_of_features_stands_in_for_the_blocks(example):
    _, model, kwargs, constants, stages = example
    assert len(stages.features) == 1
    (source, result) = stages.features[0]
    tensors = dict(kwargs)
    for stage in stages.stages[:-1]:
        tensors.update(stage.run(tensors))
    residual = tensors[result] - tensors[source]
    embed, head = stages.stages[0], stages.stages[-1]
    skipped = {**kwargs, **embed.run(kwargs)}  # the blocks do not run
    skipped[result] = skipped[source] + residual
    assert set(head.inputs) <= set(skipped)
    with torch.no_grad():
        expected = model(**kwargs, **constants)[0]
    torch.testing.assert_close(head.run(skipped)[stages.output], expected, rtol=1e-4, atol=1e-5)


def test_flux_stages_by_name():
    _, model, kwargs, constants, stages = made("flux")
    assert stages.features == (("embed_x_embedder", "block_3_out_0"),)
    assert stages.stages[0].outputs == ("embed_x_embedder", "embed_time_text_embed", "embed_context_embedder")
    assert stages.stages[1].inputs == stages.stages[0].outputs
    modulation = [n for n, _ in stages.stages[1].module.named_parameters() if "norm1.linear" in n]
    assert modulation, "modulation by the timestep stays in its block"
    again = cut(model, kwargs, constants=constants)
    assert [(s.name, s.inputs, s.outputs, s.module.code) for s in again.stages] == [
        (s.name, s.inputs, s.outputs, s.module.code) for s in stages.stages
    ]


class Blocks(nn.Module):
    """A minimal trunk; `keep` lets the head read something that block 0 makes of the timestep alone."""

    def __init__(self, body=None):
        super().__init__()
        self.inlet = nn.Linear(4, 4)
        self.layers = nn.ModuleList([Block(), Block()])
        self.body = body

    def forward(self, x, t):
        x = self.inlet(x)
        kept = None
        for layer in self.layers:
            x, modulation = layer(x, t)
            kept = modulation if kept is None else kept
        x = x * kept
        return self.body(x) if self.body else x


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.modulation = nn.Linear(1, 4)
        self.mix = nn.Linear(4, 4)

    def forward(self, x, t):
        modulation = self.modulation(t[:, None])
        return x + self.mix(x) * modulation, modulation


def tiny_inputs():
    return {"x": torch.randn(2, 4), "t": torch.rand(2)}


def test_what_head_needs_of_a_block_besides_features_moves_to_embed():
    stages = cut(Blocks().eval(), tiny_inputs(), constants={})
    embed, block, *_, head = stages.stages
    assert "layers.0.modulation.weight" in dict(embed.module.named_parameters())
    assert "layers.0.modulation.weight" not in dict(block.module.named_parameters())
    assert len(stages.features) == 1
    assert set(head.inputs) == {stages.features[0][1], *(set(embed.outputs) - {stages.features[0][0]})}


def test_refusals():
    with pytest.raises(ModelError, match=r"Blocks is in training mode.*\.eval\(\)"):
        cut(Blocks().train(), tiny_inputs(), constants={})
    with pytest.raises(ModelError, match=r"batch sizes .* expected one size of 2 or more"):
        cut(Blocks().eval(), {"x": torch.randn(1, 4), "t": torch.rand(1)}, constants={})
    with pytest.raises(ModelError, match=r"input 't' is a tensor of shape .*dimension 0 is the batch"):
        cut(Blocks().eval(), {"x": torch.randn(2, 4), "t": torch.tensor(1.0)}, constants={})
    with pytest.raises(ModelError, match="has no trunk: found 0 blocks"):
        cut(nn.Linear(4, 4).eval(), {"input": torch.randn(2, 4)}, constants={})
    with pytest.raises(ModelError, match="fixes the batch"):
        cut(Blocks(lambda x: x.reshape(2, 4)).eval(), tiny_inputs(), constants={})
    with pytest.raises(ModelError, match="embed → block_0 → block_1 → head do not reproduce the model"):
        cut(Blocks(lambda x: x + torch.rand_like(x)).eval(), tiny_inputs(), constants={})
    with pytest.raises(ModelError, match="has no graph"):
        cut(Blocks(lambda x: x if x.sum() > 0 else -x).eval(), tiny_inputs(), constants={})
