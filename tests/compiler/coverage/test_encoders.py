"""Text encoders as modules give the transformer what the pipelines themselves give it."""

from __future__ import annotations

import pytest
import torch
from model_zoo.pipelines import CASES

from otcache.compiler.export.onnx_stages import export_module
from otcache.compiler.export.text_encoders import FAMILIES, make_text_encoders
from otcache.compiler.pipelines.call import call_options
from otcache.compiler.pipelines.full_run import conditioning_of
from otcache.compiler.pipelines.probe import probe

LONG = "a small red ring on blue, a large green star on a black background, a yellow square on a white background"


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def family(request):
    case = CASES[request.param]
    pipeline = case.pipeline()
    options = call_options(pipeline, num_inference_steps=3, negative_prompt="", **case.call)
    prompts = case.prompts if request.param == "DiTPipeline" else [*case.prompts[:2], LONG, "", *case.prompts[2:]]
    return pipeline, options, prompts


def test_conditioning_is_the_pipelines(family):
    pipeline, options, prompts = family
    interface = probe(pipeline, options, 4.0, prompts)
    expected = conditioning_of(pipeline, interface, options, 4.0, prompts)
    encoders = make_text_encoders(pipeline, options.max_sequence_length or 0)
    with torch.no_grad():
        texts = [prompts] if interface.branches == 1 else [[""] * len(prompts), prompts]
        made = [
            encoders.module(**{spec.input_name: spec.encode(part) for spec in encoders.tokenizers}) for part in texts
        ]
    assert set(encoders.output_names) == set(expected) == set(made[0])
    masks = [name for name in expected if "mask" in name]
    for name, value in expected.items():
        found = torch.stack([part[name] for part in made])
        if masks and name not in masks and value.ndim == 4:
            kept = expected[masks[0]][..., None].to(value.dtype)  # what a mask hides may be anything
            found, value = found * kept, value * kept
        torch.testing.assert_close(found.to(value.dtype), value, rtol=1e-5, atol=1e-5)


@pytest.mark.long
def test_encoders_export(family, tmp_path):
    pipeline, options, _ = family
    encoders = make_text_encoders(pipeline, options.max_sequence_length or 0)
    path = tmp_path / "text_encoder.onnx"
    exported = export_module(encoders.module, encoders.example, encoders.output_names, path, kind="text_encoder")
    assert exported.max_relative_error < 1e-5
