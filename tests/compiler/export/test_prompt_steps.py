"""What pipelines do to prompts is found by prompts that show it, or the artifact is not served from the prompt on."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from model_zoo.pipelines import CASES

from otcache.compiler.export.prompt_steps import telling_prompts, with_prompt_steps
from otcache.compiler.export.text_encoders import make_text_encoders
from otcache.compiler.pipelines.call import call_options
from otcache.compiler.pipelines.probe import probe
from otcache.schemas.prompt_steps import apply_steps


def served(name, pipeline=None):
    """The encoders with the steps that were found, or None."""
    case = CASES[name]
    pipeline = pipeline or case.pipeline()
    options = call_options(pipeline, num_inference_steps=3, negative_prompt="", **case.call)
    interface = probe(pipeline, options, 4.0, case.prompts)
    encoders = make_text_encoders(pipeline, options.max_sequence_length or 0)
    return with_prompt_steps(encoders, pipeline, interface, options, case.prompts)


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("WanPipeline", ("unescape", "unescape", "collapse", "strip")),
        ("PixArtSigmaPipeline", ()),
        ("StableDiffusion3Pipeline", ()),
        ("QwenImagePipeline", ()),
        ("HunyuanVideoPipeline", ()),
        ("DiTPipeline", ()),
    ],
)
def test_steps_of_the_pipelines_that_are_served(name, steps):
    found = served(name)
    assert found is not None
    for tokenizer in found.tokenizers:
        assert tuple(step for step in tokenizer.steps if step != "ftfy") == steps


def test_what_no_step_does_is_not_served(monkeypatch):
    """A Wan that reads its prompts backwards."""
    from diffusers.pipelines.wan import pipeline_wan

    monkeypatch.setattr(pipeline_wan, "prompt_clean", lambda text: text[::-1])
    assert served("WanPipeline") is None


@given(st.text(max_size=30))
def test_clean_text_is_wans_own(text):
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean
    from diffusers.utils import is_ftfy_available

    steps = ["ftfy"] if is_ftfy_available() else []
    assert apply_steps(text, [*steps, "unescape", "unescape", "collapse", "strip"]) == prompt_clean(text)


def test_every_telling_prompt_is_one():
    prompts = telling_prompts("a ring")
    assert len(set(prompts)) == len(prompts) and "a ring" not in prompts


def test_a_step_without_its_package(monkeypatch):
    import sys

    from otcache.schemas.errors import HostError

    monkeypatch.setitem(sys.modules, "ftfy", None)
    with pytest.raises(HostError, match=r"not installed \(ftfy\): run pip install ftfy"):
        apply_steps("a", ["ftfy"])
