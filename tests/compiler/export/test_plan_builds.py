"""Plans of real models, with the real library for RTX: every stage of the bundled model, and blocks as wide as
FLUX.1's.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel

from otcache.compiler.export.decoder import LatentDecoder
from otcache.compiler.export.onnx_stages import export_module, export_stages
from otcache.compiler.export.text_encoders import make_text_encoders
from otcache.compiler.graph.cut import cut
from otcache.runtime.build.plan import BuildJob, build_plan

pytest.importorskip("tensorrt_rtx")
SHAPES = Path(__file__).parents[3] / "artifacts" / "models" / "shapes"


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
        "img_ids": torch.rand(image_tokens, 3),
        "txt_ids": torch.zeros(text_tokens, 3),
        "guidance": None,
        "joint_attention_kwargs": {},
        "return_dict": False,
    }
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
    job = BuildJob(
        name=stage.name,
        source=stage.path,
        backend="tensorrt-rtx",
        target=target,
        shapes=shapes,
        workspace_bytes=None,
        output=output,
        timing_cache=output.with_suffix(".cache"),
    )
    plan = build_plan(job)
    assert output.stat().st_size == plan.size_bytes
    return plan


@pytest.mark.long
@pytest.mark.parametrize(("dtype", "target"), [("float32", "sm_89"), ("float16", "sm_86")])
def test_every_stage_of_the_bundled_model(tmp_path, dtype, target):
    """Embed, eight blocks, head, text encoders and decoder, at the sizes at which `otc compile shapes` exports them."""
    pipeline = FluxPipeline.from_pretrained(SHAPES, torch_dtype=getattr(torch, dtype))
    pipeline.transformer.eval(), pipeline.vae.eval()
    stages = list(exported(pipeline.transformer, tmp_path, image_tokens=36, text_tokens=12))
    encoders = make_text_encoders(pipeline, 12)
    names, example = encoders.output_names, encoders.example
    stages.append(export_module(encoders.module, example, names, tmp_path / "text_encoder.onnx", kind="text_encoder"))
    latents = {"latents": torch.randn(2, 36, pipeline.transformer.config.in_channels, dtype=getattr(torch, dtype))}
    decoder = LatentDecoder(pipeline, (48, 48)).eval()
    rounding = 1e-2 if dtype == "float16" else None  # its pictures are float32, whatever they were computed in
    path = tmp_path / "vae_decoder.onnx"
    stages.append(export_module(decoder, latents, ("images",), path, kind="decoder", tolerance=rounding))
    assert len(stages) == 12
    for stage in stages:
        plan = built(stage, target)
        print(dtype, target, stage.name, plan)
        assert plan.layers[dtype] > 10 and (dtype == "float16" or "float16" not in plan.layers), (stage.name, plan)


@pytest.mark.long
def test_blocks_as_wide_as_those_of_flux(tmp_path):
    """One double and one single block at FLUX.1's widths, float16; few tokens, which change no weights."""
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=128,
        num_attention_heads=24,
        joint_attention_dim=4096,
        pooled_projection_dim=768,
        axes_dims_rope=(16, 56, 56),
    ).half()
    double, single = (
        stage for stage in exported(model, tmp_path, image_tokens=16, text_tokens=8) if stage.kind == "block"
    )
    for stage, weights_bytes in ((double, 680e6), (single, 280e6)):
        plan = built(stage, "sm_89")
        assert 0.98 * weights_bytes < plan.size_bytes < 1.1 * weights_bytes, plan
        print(stage.name, plan)
