"""Plans of real models, with the real library for RTX: every stage of the bundled model's transformer, and blocks as wide as FLUX.1's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel

from otcache.compiler.cut import cut
from otcache.compiler.export import export_stages
from otcache.runtime.tensorrt_build import BuildJob, build_plan

pytest.importorskip("tensorrt_rtx")
SHAPES = Path(__file__).parents[2] / "artifacts" / "models" / "shapes" / "transformer"


def exported(model, folder, *, image_tokens, text_tokens):
    """The stages of a FLUX transformer as ONNX files, of the type that its weights have."""
    config, dtype = model.config, next(model.parameters()).dtype
    kwargs = {
        "hidden_states": torch.randn(2, image_tokens, config.in_channels, dtype=dtype),
        "timestep": torch.rand(2, dtype=dtype),
        "encoder_hidden_states": torch.randn(2, text_tokens, config.joint_attention_dim, dtype=dtype),
        "pooled_projections": torch.randn(2, config.pooled_projection_dim, dtype=dtype),
    }
    constants = {
        "img_ids": torch.rand(image_tokens, 3), "txt_ids": torch.zeros(text_tokens, 3), "guidance": None,
        "joint_attention_kwargs": {}, "return_dict": False,
    }  # fmt: skip
    return export_stages(cut(model.eval(), kwargs, constants=constants), kwargs, folder)


def built(stage, target):
    """The plan of an exported stage for 1 to 4 rows."""
    shapes = {
        tensor.name: tuple(
            tuple(rows if isinstance(size, str) else size for size in tensor.shape) for rows in (1, 2, 4)
        )
        for tensor in stage.inputs
        if "batch" in tensor.shape
    }
    output = stage.path.with_suffix(".plan")
    job = BuildJob(name=stage.name, source=stage.path, backend="tensorrt-rtx", target=target, shapes=shapes,
                   workspace_bytes=None, output=output, timing_cache=output.with_suffix(".cache"))  # fmt: skip
    plan = build_plan(job)
    assert output.stat().st_size == plan.size_bytes
    return plan


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "target"), [("float32", "sm_89"), ("float16", "sm_75")])
def test_the_bundled_model(tmp_path, dtype, target):
    model = FluxTransformer2DModel.from_pretrained(SHAPES, torch_dtype=getattr(torch, dtype))
    stages = exported(model, tmp_path, image_tokens=36, text_tokens=12)
    assert len(stages) == 10
    for stage in stages:
        layers = built(stage, target).layers
        assert layers[dtype] > 10 and (dtype == "float16" or "float16" not in layers), (stage.name, layers)


@pytest.mark.long
def test_blocks_as_wide_as_those_of_flux(tmp_path):
    """One double and one single block at FLUX.1's widths, float16; few tokens, which change no weights."""
    model = FluxTransformer2DModel(
        patch_size=1, in_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=128, num_attention_heads=24,
        joint_attention_dim=4096, pooled_projection_dim=768, axes_dims_rope=(16, 56, 56),
    ).half()  # fmt: skip
    double, single = (
        stage for stage in exported(model, tmp_path, image_tokens=16, text_tokens=8) if stage.kind == "block"
    )
    for stage, weights_bytes in ((double, 680e6), (single, 280e6)):
        plan = built(stage, "sm_89")
        assert 0.98 * weights_bytes < plan.size_bytes < 1.1 * weights_bytes, plan
        print(stage.name, plan)
