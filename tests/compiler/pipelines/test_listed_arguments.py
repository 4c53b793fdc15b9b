"""Lists of one tensor a sample become tensors; other lists stay what they are."""

from __future__ import annotations

import torch

from otcache.compiler.pipelines.arguments import Listed, Samples, arguments
from otcache.compiler.pipelines.listed_arguments import as_tensors, extra_axis, lists_of

SAMPLE = torch.zeros(2, 3, 4, 4)


def test_there_and_back():
    latents, words = list(torch.randn(2, 3, 1, 4, 4)), [torch.randn(2, 5), torch.randn(4, 5)]
    call = {"x": latents, "words": words, "sizes": [(4, 4)] * 2, "levels": list(torch.randn(3, 7))}
    listed = lists_of(call, SAMPLE)
    assert listed == {"x": Listed(axis=1), "words": Listed(mask="words_mask")}  # three levels are not two samples
    made = as_tensors(call, listed)
    assert made["x"].shape == (2, 3, 4, 4) and made["words"].shape == (2, 4, 5)
    assert made["words_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]] and made["levels"] is call["levels"]
    inputs = {name: made[name] for name in ("x", "words", "words_mask")}
    back = arguments(inputs, listed)
    assert set(back) == {"x", "words"} and isinstance(back["x"], Samples)
    for name in back:
        assert all(torch.equal(*pair) for pair in zip(back[name], call[name], strict=True))


def test_both_branches_in_one_list():
    assert set(lists_of({"x": list(torch.randn(4, 3, 4, 4))}, SAMPLE)) == {"x"}


def test_extra_axis():
    assert extra_axis((3, 1, 4), (3, 4)) == 1 and extra_axis((3, 2, 4), (3, 4)) is None
