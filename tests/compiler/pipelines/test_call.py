"""A pipeline's own defaults are those of a compile; what it refuses is one line."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from model_zoo.pipelines import CASES

from otcache.compiler.pipelines.call import call_options
from otcache.compiler.pipelines.full_run import with_known_negative
from otcache.compiler.pipelines.invoke import invoke
from otcache.compiler.pipelines.probe import probe
from otcache.compiler.pipelines.prompts import (
    class_numbers,
    class_prompts,
    probe_prompts,
    prompt_arguments,
    split_labels,
)
from otcache.schemas.errors import HostError, ModelError, UsageError

SIZED = (
    "StableDiffusionPipeline",
    "StableDiffusionXLPipeline",
    "StableDiffusion3Pipeline",
    "PixArtSigmaPipeline",
    "DiTPipeline",
    "CogView4Pipeline",
    "CogVideoXPipeline",
)
"""Pipelines whose tiny models say their own size; the others' is fixed in code, and large."""


@pytest.mark.parametrize("name", SIZED)
def test_the_size_is_what_the_pipeline_draws(name):
    case = CASES[name]
    pipeline = case.pipeline()
    pipeline.vae.register_to_config(sample_size=96)  # which no pipeline asks
    length = {key: value for key, value in case.call.items() if key == "max_sequence_length"}
    options = call_options(pipeline, num_inference_steps=2, **length)
    call = {"num_inference_steps": 2, "output_type": "np", **length}
    if "use_resolution_binning" in options.accepted:
        call["use_resolution_binning"] = False
    drawn = np.asarray(pipeline(**prompt_arguments(pipeline, case.prompts[:1]), **call)[0])
    frames = () if options.num_frames is None else (options.num_frames,)
    assert drawn.shape == (1, *frames, options.height, options.width, 3)


def test_what_is_given_wins_and_what_is_missing_is_asked():
    pipeline = CASES["StableDiffusionPipeline"].pipeline()
    options = call_options(pipeline, num_inference_steps=2, width=24)
    assert (options.height, options.width, options.num_frames) == (16, 24, None)
    with pytest.raises(UsageError, match="--num-frames is 5, but StableDiffusionPipeline draws pictures"):
        call_options(pipeline, num_inference_steps=2, num_frames=5)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("StableDiffusionXLPipeline", None), ("StableDiffusionPipeline", ""), ("MochiPipeline", ""), ("DiTPipeline", "")],
)
def test_no_negative_prompt_is_the_empty_text_where_that_is_the_same(name, expected):
    case = CASES[name]
    pipeline = case.pipeline()
    options = call_options(pipeline, num_inference_steps=3, **case.call)
    assert options.negative_prompt is None and "negative_prompt" not in options.arguments(4.0, 2)
    interface = probe(pipeline, options, 4.0, case.prompts)
    assert with_known_negative(pipeline, interface, options, 4.0, case.prompts).negative_prompt == expected


def test_true_guidance_needs_a_negative_prompt():
    case = CASES["QwenImagePipeline"]
    assert call_options(case.pipeline(), num_inference_steps=3, **case.call).negative_prompt == ""


def test_errors_of_the_pipelines_own_call():
    from diffusers import StableDiffusionInpaintPipeline

    pipeline = CASES["StableDiffusionPipeline"].pipeline()
    with pytest.raises(
        ModelError, match=r"^StableDiffusionPipeline, argument height and width: ValueError: .*height=17"
    ):
        invoke(pipeline, {"prompt": ["a"], "height": 17, "width": 16})
    with pytest.raises(ModelError, match=r"called with prompt, generator: ValueError: .*list of generators") as e:
        invoke(pipeline, {"prompt": ["a"], "generator": [torch.Generator()] * 2})
    assert "\n" not in str(e.value)
    inpaint = StableDiffusionInpaintPipeline(**pipeline.components)
    with pytest.raises(
        ModelError, match=r"^StableDiffusionInpaintPipeline, argument .*image.*that draws without .*image"
    ):
        call_options(inpaint, num_inference_steps=2)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), HostError),
        (torch.OutOfMemoryError("CUDA out of memory"), HostError),
        (OSError("disk"), OSError),
    ],
)
def test_errors_that_others_handle_pass(error, expected):
    pipeline = CASES["StableDiffusionPipeline"].pipeline()

    def fail(*_):
        raise error

    pipeline.unet.register_forward_pre_hook(fail)
    with pytest.raises(expected):
        invoke(pipeline, {"prompt": ["a"], "num_inference_steps": 1})


def pipeline_of(labels: dict[str, int], count: int | None):
    config = {} if count is None else {"num_embeds_ada_norm": count}
    return SimpleNamespace(labels=labels, transformer=SimpleNamespace(config=SimpleNamespace(**config)))


@given(
    st.dictionaries(st.text(min_size=1, max_size=3), st.integers(0, 9), max_size=10),
    st.lists(st.integers(0, 9), max_size=8),
    st.integers(0, 12),
)
def test_classes_by_label_and_number(labels, numbers, count):
    pipeline = pipeline_of(labels, 10)
    prompts = [str(number) for number in numbers if str(number) not in labels]
    assert prompt_arguments(pipeline, prompts) == {"class_labels": [int(prompt) for prompt in prompts]}
    assert prompt_arguments(pipeline, list(labels)) == {"class_labels": list(labels.values())}
    known = class_numbers(pipeline)
    assert sorted(known[prompt] for prompt in class_prompts(pipeline)) == sorted(set(known.values()))
    drawn = probe_prompts(pipeline, prompts, count)
    assert len(drawn) == count and all(prompt in known for prompt in drawn)
    assert len(set(drawn)) >= min(count, len(set(known.values())))


def test_texts_and_unknown_classes():
    texts = SimpleNamespace()
    assert class_prompts(texts) is None and prompt_arguments(texts, ["a"]) == {"prompt": ["a"]}
    assert probe_prompts(texts, ["a", "a"], 3) == ["a", "probe 0", "probe 1"]
    assert class_prompts(pipeline_of({"cat": 1, "dog": 1}, None)) == ["0", "dog"]
    with pytest.raises(
        ModelError, match="no label 'b': expected one of 3 classes, by label or number, such as '0', '1'"
    ):
        prompt_arguments(pipeline_of({}, 3), ["b"])


@given(st.lists(st.text(max_size=2), min_size=1, max_size=5), st.integers(1, 9), st.integers(1, 9))
def test_labels_repeat(labels, calibration, evaluation):
    first, second = split_labels(labels, calibration, evaluation)
    assert (len(first), len(second)) == (calibration, evaluation) and set(first + second) <= set(labels)
    assert (first + second)[: len(labels)] == labels[: calibration + evaluation]


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("shapes", {"height": 48, "width": 48, "max_sequence_length": 12}),
        ("shapes-qwen", {"height": 32, "width": 32, "max_sequence_length": 16}),
        ("shapes-video", {"height": 32, "width": 32, "num_frames": 13, "max_sequence_length": 12}),
    ],
)
def test_bundled_models_as_diffusers_loads_them(name, call):
    """Nothing but `from_pretrained(folder)`, as a snippet has it; and they are compiled at the sizes of `call.json`."""
    from diffusers import DiffusionPipeline

    from otcache.compiler.models.find import bundled_folder
    from otcache.compiler.models.load import load_model

    pipeline = DiffusionPipeline.from_pretrained(bundled_folder() / name)
    pipeline.set_progress_bar_config(disable=True)
    dtypes = {
        weight.dtype
        for part in pipeline.components.values()
        if isinstance(part, torch.nn.Module)
        for weight in part.parameters()
    }
    assert dtypes == {torch.float32}
    made = pipeline(
        "a small red ring on blue",
        num_inference_steps=2,
        true_cfg_scale=4.0,
        negative_prompt="",
        **call,
        output_type="np",
    )
    assert np.isfinite(np.asarray(made[0])).all()
    own = load_model(name).call
    assert {key: getattr(own, key) for key in call} == call
