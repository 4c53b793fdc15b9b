"""Tokenizers as JSON give the ids that the pipeline's give."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers

from otcache.artifacts.training.text import POOLED_LENGTH, make_tokenizers
from otcache.compiler.export.tokenizers import PROBES, convert_tokenizer
from otcache.schemas.errors import ModelError

CLIP, T5 = make_tokenizers()
SPECS = {
    "plain": (CLIP, convert_tokenizer(CLIP, "input_ids", POOLED_LENGTH)),
    "templated": (T5, convert_tokenizer(T5, "input_ids", 10, "a large {} on blue")),
}


@pytest.mark.parametrize("name", SPECS)
@given(prompt=st.sampled_from(PROBES) | st.text(max_size=60) | st.from_regex(r"(a|red|ring|on|blue| |,){0,9}"))
def test_ids_are_those_of_the_tokenizer(name, prompt):
    tokenizer, spec = SPECS[name]
    received = spec.encode([prompt])
    assert received.dtype == torch.int64 and received.shape == (1, spec.length)
    text = spec.template.replace("{}", prompt)
    expected = tokenizer([text], padding="max_length", max_length=spec.length, truncation=True, return_tensors="pt")
    assert torch.equal(received, expected.input_ids)


def test_prompts_in_lower_case():
    spec = convert_tokenizer(CLIP, "input_ids", POOLED_LENGTH, lower=True)
    assert torch.equal(spec.encode(["  A Red RING "]), spec.encode(["a red ring"]))
    assert not torch.equal(spec.encode(["a red ring"]), spec.encode(["a blue ring"]))


def test_tokenizer_that_json_cannot_express_is_refused():
    clip, _ = make_tokenizers()
    clip.padding_side = "left"
    with pytest.raises(ModelError, match="gives other ids than the pipeline"):
        convert_tokenizer(clip, "input_ids", 16)


def test_tokenizer_that_no_reader_takes_is_refused():
    clip, _ = make_tokenizers()
    clip.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("(a+)+$"), "isolated")
    with pytest.raises(ModelError, match=r"no reader of artifacts takes: .*regular expression '\(a\+\)\+\$'"):
        convert_tokenizer(clip, "input_ids", 16)
