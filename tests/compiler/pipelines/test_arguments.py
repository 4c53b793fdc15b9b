"""A pipeline's call from named tensors: nesting, constants for each sample, offsets, and what is taken of the
output.
"""

from __future__ import annotations

import torch

from otcache.compiler.pipelines.arguments import PLAIN, Behind, Offset, Output, PerSample, arguments, flatten_values


def test_names_with_dots_are_nested_and_flattened_again():
    time = torch.ones(3)
    made = arguments({"added.text": time}, {"added.ids": 4, "flag": None, "empty": {}})
    assert made == {"added": {"text": time, "ids": 4}, "flag": None, "empty": {}}
    assert flatten_values(made) == {"added.text": time, "added.ids": 4, "flag": None, "empty": {}}


def test_tuples_of_tensors_are_flattened_and_made_again():
    cos, sin = torch.ones(2), torch.zeros(2)
    call = {"rotary": (cos, sin), "scale": (1.0, 2.0), "added": {"pair": (sin,)}}
    flat = flatten_values(call)
    assert set(flat) == {"rotary.0", "rotary.1", "scale", "added.pair.0"}
    made = arguments({"rotary.1": sin, "rotary.0": cos}, {"scale": flat["scale"], "added.pair.0": sin})
    assert made["rotary"][0] is cos and made["rotary"][1] is sin
    assert made["scale"] == (1.0, 2.0) and made["added"]["pair"] == (sin,)


def test_a_constant_row_is_there_for_each_sample():
    made = arguments({"x": torch.zeros(5, 2)}, {"scale": PerSample(torch.tensor([[7.0, 8.0]]))})
    assert torch.equal(made["scale"], torch.tensor([[7.0, 8.0]] * 5))


def test_an_offset_is_added_to_the_input_of_its_name():
    made = arguments({"time": torch.tensor([-0.25])}, {"time": Offset(1.0)})
    assert torch.equal(made["time"], torch.tensor([0.75]))


def test_channels_of_one_number_follow_the_inputs_own():
    made = arguments({"x": torch.zeros(2, 1, 3)}, {"x": Behind((1.0, 2.0))})["x"]
    assert torch.equal(made, torch.arange(3.0).view(1, 3, 1).expand(2, 3, 3))


def test_output():
    result = torch.arange(12.0).reshape(1, 4, 3)
    assert PLAIN(result) is result and PLAIN((result, None)) is result
    assert torch.equal(Output(channels=2, scale=-1.0)((result,)), -result[:, :2])
