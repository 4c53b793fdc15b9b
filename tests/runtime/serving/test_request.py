"""Requests are read once: what a caller gives becomes a frozen value, or one line that says why not."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from otcache.runtime import RequestError, Sampler
from otcache.runtime.artifact.reader import Artifact
from otcache.runtime.serving.request import MOST_SAMPLES, Request, parse_request
from otcache.runtime.serving.request_size import Sizes

OWN: dict[str, int | None] = {}


@pytest.fixture(scope="module")
def sizes(artifact_folder):
    return Sizes(Artifact.open(artifact_folder))


def parse(sizes, **given):
    return parse_request(sizes, **{"prompt": "a", "budget": 2, "size": OWN, **given})


def test_a_request_is_frozen_and_whole(sizes):
    request = parse(sizes, prompt=["a", "b"], negative_prompt="c", images_per_prompt=3, seed=np.int64(5))
    assert request.texts == (("c", "c"), ("a", "b")) and request.samples == 6
    assert request.budget == "2" and request.program == request.manifest.program(2).program
    assert request.seed == 5 and type(request.seed) is int and len(request.guidance_weights) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        request.budget = "3"


def test_a_callers_lists_may_change_afterwards(sizes):
    prompts, seeds = ["a", "b"], [1, 2]
    request = parse(sizes, prompt=prompts, seed=seeds)
    prompts[0], seeds[0] = "z", 9
    assert request.texts[-1] == ("a", "b") and request.seed == (1, 2)


def test_another_budget_is_another_request(sizes):
    request = parse(sizes)
    full = request.at_budget("full")
    assert request.budget == "2" and full.budget == "full"
    assert full.program == request.manifest.program("full").program != request.program
    with pytest.raises(RequestError, match="budget is '5': expected one of 2, 3, full"):
        request.at_budget("5")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"images_per_prompt": 10**15}, f"{10**15} pictures: expected at most {MOST_SAMPLES}"),
        ({"prompt": ["a"] * 5, "images_per_prompt": 1000}, "5000 pictures"),
        ({"images_per_prompt": 5, "most_samples": 4}, "5 pictures: expected at most 4"),
        ({"images_per_prompt": 1.0}, "images_per_prompt is 1.0"),
        ({"prompt": []}, "at least one"),
        ({"prompt": "\ud800"}, "half a surrogate"),
        ({"seed": [1]}, None),
        ({"seed": [1, 2]}, "seed is a list of 2"),
        ({"size": {"height": 99}}, "height is 99"),
    ],
)
def test_what_is_refused(sizes, given, words):
    if words is None:
        assert parse(sizes, **given).seed == (1,)
        return
    with pytest.raises(RequestError, match=words) as caught:
        parse(sizes, **given)
    assert "\n" not in str(caught.value)


@given(st.lists(st.text(max_size=4), min_size=1, max_size=4), st.integers(1, 4))
def test_each_prompt_has_as_many_pictures(sizes, prompts, images):
    prompts = [text.encode("utf-8", "ignore").decode() for text in prompts]
    request = parse(sizes, prompt=prompts, images_per_prompt=images)
    assert request.samples == images * len(prompts) and request.texts[-1] == tuple(prompts)
    assert {len(branch) for branch in request.texts} == {len(prompts)}


def test_calling_is_reading_and_then_drawing(artifact_folder):
    with Sampler.load(artifact_folder, threads=1) as sampler:
        request = sampler.request(["a", "b"], budget=3, images_per_prompt=2, seed=4)
        assert isinstance(request, Request) and sampler.check("a", budget=3) == 1
        found = sampler.draw(request)
        np.testing.assert_array_equal(found, sampler(["a", "b"], budget=3, images_per_prompt=2, seed=4))
        np.testing.assert_array_equal(found, sampler.draw(request))  # nothing of it was used up
        conditioning = sampler.encode(["a", "a", "b", "b"])
        latents = sampler.sample(conditioning, budget=3, seed=4)
        np.testing.assert_array_equal(found, sampler.decode(latents))
