"""Prompt → conditioning: the exported text encoders against the pipeline's own."""

from __future__ import annotations

import pytest
import torch

from otcache.artifacts.training.text import POOLED_LENGTH, TEXT_LENGTH
from otcache.compiler.export.onnx_stages import export_module
from otcache.compiler.export.text_encoders import make_text_encoders
from otcache.compiler.export.tokenizers import PROBES
from otcache.schemas.errors import ModelError


def test_text_encoders_reproduce_encode_prompt(pipeline):
    encoders = make_text_encoders(pipeline, 10)
    assert [(spec.input_name, spec.length) for spec in encoders.tokenizers] == [
        ("input_ids", POOLED_LENGTH),
        ("input_ids_2", 10),
    ]
    assert {name: tuple(value.shape) for name, value in encoders.example.items()} == {
        "input_ids": (2, POOLED_LENGTH),
        "input_ids_2": (2, 10),
    }
    for prompt in PROBES:
        with torch.no_grad():
            result = encoders.module(**{spec.input_name: spec.encode([prompt]) for spec in encoders.tokenizers})
            hidden, pooled, _ = pipeline.encode_prompt(prompt, max_sequence_length=10)
        assert tuple(result) == encoders.output_names
        assert torch.equal(result["pooled_projections"], pooled)
        assert torch.equal(result["encoder_hidden_states"], hidden)


def test_text_encoders_export(pipeline, tmp_path):
    encoders = make_text_encoders(pipeline, TEXT_LENGTH)
    exported = export_module(
        encoders.module,
        encoders.example,
        encoders.output_names,
        tmp_path / "text_encoder.onnx",
        kind="text_encoder",
    )
    assert exported.max_relative_error < 1e-5
    assert [(info.name, info.dtype, info.shape) for info in (*exported.inputs, *exported.outputs)] == [
        ("input_ids", "int64", ("batch", POOLED_LENGTH)),
        ("input_ids_2", "int64", ("batch", TEXT_LENGTH)),
        ("pooled_projections", "float32", ("batch", 64)),
        ("encoder_hidden_states", "float32", ("batch", TEXT_LENGTH, 64)),
    ]


def test_other_classes_have_no_encoders(pipeline):
    class OtherPipeline(type(pipeline)):
        pass

    assert make_text_encoders(OtherPipeline.__new__(OtherPipeline), 16) is None


def test_a_missing_part_is_named(pipeline):
    part, pipeline.tokenizer_2 = pipeline.tokenizer_2, None
    try:
        with pytest.raises(ModelError, match="FluxPipeline has no tokenizer_2"):
            make_text_encoders(pipeline, 16)
    finally:
        pipeline.tokenizer_2 = part
