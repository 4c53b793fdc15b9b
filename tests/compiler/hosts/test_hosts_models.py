"""Whether a host's model is the compiled one: saved folders, casts, LoRA, and changes after the check."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import DiffusionPipeline
from host_manifests import BUDGET

from otcache.compiler.hosts import CalibrationWarning, OTCacheScheduler
from otcache.schemas.errors import ModelError
from otcache.schemas.manifest import core_digest


@pytest.fixture
def folder(prepared, tmp_path):
    """The model of case `sd3`, as its pipeline saves it."""
    prepared("sd3").case.make().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def load(folder, dtype=torch.float32):
    absent = dict.fromkeys(f"{part}{place}" for part in ("text_encoder", "tokenizer") for place in ("", "_2", "_3"))
    pipeline = DiffusionPipeline.from_pretrained(folder, torch_dtype=dtype, **absent)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def check(prepared, pipeline, strict=True):
    return OTCacheScheduler.from_artifact(prepared("sd3").artifact, budget=BUDGET, strict=strict, pipeline=pipeline)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_hosts_cast_is_no_other_model(prepared, folder, dtype):
    check(prepared, load(folder, dtype))


def test_weights_that_are_stored_in_bfloat16_are_the_same_in_float16(prepared, tmp_path):
    """Small numbers do not survive the cast to float16: what is compared is the cast of what was stored."""
    from host_cases import CASES
    from host_manifests import full_run, write_manifest

    case = CASES["sd3"]
    pipeline = case.make()
    weight = pipeline.transformer.pos_embed.proj.weight
    weight.view(-1)[:4] = torch.tensor([1e-9, 3e-7, -2e-6, 65504.0 * 0.9])
    pipeline.transformer.bfloat16()
    pipeline.save_pretrained(tmp_path / "stored")
    compiled = load(tmp_path / "stored")
    artifact = write_manifest(tmp_path / "artifact", case, compiled, *full_run(case, compiled))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        OTCacheScheduler.from_artifact(artifact, budget=BUDGET, pipeline=load(tmp_path / "stored", dtype))
    other = load(tmp_path / "stored", torch.float16)
    other.transformer.pos_embed.proj.weight.view(-1)[2] *= 2
    with pytest.raises(ModelError, match="SD3Transformer2DModel has digest"):
        OTCacheScheduler.from_artifact(artifact, budget=BUDGET, pipeline=other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_another_fine_tune_is_refused_in_every_type(prepared, folder, dtype):
    pipeline = load(folder, dtype)
    pipeline.transformer.transformer_blocks[1].attn.to_q.weight.view(-1)[5] *= 1.02
    with pytest.raises(ModelError, match=r"has digest sha256:\w+: expected sha256:\w+, weights and options"):
        check(prepared, pipeline)


def test_an_artifact_that_knows_no_float16_says_so(prepared, folder, tmp_path):
    value = json.loads((prepared("sd3").artifact / "manifest.json").read_text())
    value["schema_version"] = "1.7"
    del value["model"]["denoiser_digest_float16"]
    value["digest"] = core_digest(value)
    (tmp_path / "manifest.json").write_text(json.dumps(value))
    OTCacheScheduler.from_artifact(tmp_path, budget=BUDGET, pipeline=load(folder, torch.bfloat16))
    with pytest.raises(ModelError, match=r"is held in float16: expected float32 or bfloat16.*older than schema 1.8"):
        OTCacheScheduler.from_artifact(tmp_path, budget=BUDGET, pipeline=load(folder, torch.float16))


@pytest.mark.parametrize("part", ["transformer/config.json", "scheduler/scheduler_config.json"])
def test_options_of_a_later_diffusers_are_no_other_model(prepared, folder, part):
    config = json.loads((folder / part).read_text())
    (folder / part).write_text(json.dumps({**config, "an_option_of_diffusers_99": True, "_diffusers_version": "99.0"}))
    pipeline = load(folder)
    name = part.partition("/")[0]
    assert getattr(pipeline, name).config["an_option_of_diffusers_99"] is True
    check(prepared, pipeline)


# --- LoRA
# -----------------------------------------------------------------------------------------


def add_lora(pipeline, name="style"):
    from peft import LoraConfig

    config = LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False)
    pipeline.transformer.add_adapter(config, name)


@pytest.mark.parametrize("off", ["disable_lora", "delete_adapters", "set_adapters"])
def test_a_lora_that_is_switched_off_is_no_fault(prepared, folder, off):
    pipeline = load(folder)
    add_lora(pipeline)
    with pytest.raises(ModelError, match=r"has LoRA style: expected none.*switch it off"):
        check(prepared, pipeline)
    if off == "delete_adapters":
        pipeline.transformer.delete_adapters("style")
    elif off == "set_adapters":
        pipeline.transformer.set_adapters("style", 0.0)
    else:
        pipeline.transformer.disable_lora()
    scheduler = check(prepared, pipeline)
    pipeline.transformer.transformer_blocks[0].attn.to_k.weight.view(-1)[0] += 1.0
    with pytest.raises(ModelError, match="has digest"):
        scheduler.check(pipeline)


def test_a_lora_that_is_fused_is_another_model(prepared, folder):
    pipeline = load(folder)
    add_lora(pipeline)
    pipeline.transformer.fuse_lora()
    with pytest.raises(ModelError, match="SD3Transformer2DModel has digest"):
        check(prepared, pipeline)
    pipeline.transformer.unfuse_lora()
    with pytest.raises(ModelError, match="has LoRA style"):
        check(prepared, pipeline)


def replace_weights(pipeline):
    torch.manual_seed(7)
    pipeline.transformer = type(pipeline.transformer).from_config(pipeline.transformer.config).eval()


def fuse_and_unload(pipeline):
    add_lora(pipeline)
    pipeline.transformer.fuse_lora()
    pipeline.transformer.unload_lora()


CHANGES = {
    "lora": (add_lora, "has LoRA style"),
    "fused lora": (fuse_and_unload, "has digest"),
    "another transformer": (replace_weights, "has digest"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_changes_after_the_check_is_noticed_in_the_next_request(prepared, folder, name):
    change, message = CHANGES[name]
    one, pipeline = prepared("sd3"), load(folder)
    pipeline.scheduler = check(prepared, pipeline)
    before = one.case(pipeline, steps=BUDGET)
    change(pipeline)
    with pytest.raises(ModelError, match=message):
        one.case(pipeline, steps=BUDGET)
    pipeline = load(folder)
    pipeline.scheduler = check(prepared, pipeline, strict=False)
    change(pipeline)
    with pytest.warns(CalibrationWarning, match=message):
        assert not torch.equal(one.case(pipeline, steps=BUDGET), before)


def test_a_cast_and_weights_moved_away_after_the_check_are_no_change(prepared, folder):
    one, pipeline = prepared("sd3"), load(folder)
    pipeline.scheduler = check(prepared, pipeline)
    pipeline.to(torch.bfloat16)
    embeds = {key: value.bfloat16() for key, value in one.case.arguments.items() if isinstance(value, torch.Tensor)}
    one.case(pipeline, steps=BUDGET, **embeds)
    pipeline = load(folder)
    pipeline.scheduler = check(prepared, pipeline)
    pipeline.transformer.to("meta")  # as sequential offload leaves it between two requests
    pipeline.scheduler.set_timesteps(BUDGET)
