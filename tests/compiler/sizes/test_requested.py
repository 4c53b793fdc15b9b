"""`--sizes`, `--frame-counts` and `--text-lengths`: what they mean, where the pipeline is looked at, and what is
refused.
"""

from __future__ import annotations

import pytest

from otcache.compiler.sizes.requested import Wanted, wanted_from_options
from otcache.schemas.errors import UsageError

OWN = {"height": 512, "width": 512, "max_sequence_length": 128}


def asked(own=OWN, sizes=None, frame_counts=None, text_lengths=None):
    return wanted_from_options(own, sizes=sizes, frame_counts=frame_counts, text_lengths=text_lengths)


def test_nothing_asked_is_the_own_size_alone():
    assert asked() == Wanted()


def test_a_list_is_served_as_listed_and_holds_the_own_size():
    found = asked(sizes="768x512,512x768,768x512", text_lengths="64")
    assert [(p["height"], p["width"], p["max_sequence_length"]) for p in found.listed] == [
        (512, 512, 128),
        (512, 512, 64),
        (768, 512, 128),
        (768, 512, 64),
        (512, 768, 128),
        (512, 768, 64),
    ]
    assert [(a.name, a.minimum, a.maximum, a.step) for a in found.axes] == [
        ("height", 512, 768, 256),
        ("width", 512, 768, 256),
        ("max_sequence_length", 64, 128, 64),
    ]
    assert found.probed(OWN)[0] == OWN and {**OWN, "height": 768} in found.probed(OWN)


def test_a_range_is_looked_at_where_it_ends_and_one_step_in():
    found = asked(sizes="256x384:1024x512:128", text_lengths="128:512:64")
    assert not found.listed and [str(axis) for axis in found.axes] == [
        "256 to 1024 in steps of 128",
        "384 to 512 in steps of 128",
        "128 to 512 in steps of 64",
    ]
    points = found.probed(OWN)
    assert points[0] == OWN and len(points) == len({tuple(p.values()) for p in points})
    assert {"height": 1024, "width": 512, "max_sequence_length": 512} in points and {**OWN, "height": 384} in points


def test_what_is_given_up_stays_as_compiled():
    found = asked(sizes="768x512,768x768", text_lengths="64")
    left = found.without({"height"}, OWN)
    assert left.listed == ({"width": 512, "max_sequence_length": 128}, {"width": 512, "max_sequence_length": 64})
    assert found.without(set(OWN), OWN) == Wanted()
    ranges = asked(sizes="256x256:1024x1024:256").without({"width"}, OWN)
    assert [axis.name for axis in ranges.axes] == ["height"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sizes": "512"}, "--sizes is '512': expected a list such as 512x512,768x768, or a range"),
        ({"sizes": "512x0"}, "--sizes is '512x0'"),
        ({"sizes": "512x512:768x768"}, "with its step"),
        ({"sizes": "512x512:768x768:100"}, "expected steps of 100 that lead from 512 to 768"),
        ({"sizes": "768x512:512x512:64"}, "steps of 64 that lead from 768 to 512"),
        ({"sizes": "640x512:768x768:64"}, "height is 512: expected the size that is compiled within it"),
        ({"frame_counts": "5,9"}, "--frame-counts is given, but this pipeline takes no num_frames: leave it out"),
        ({"sizes": "512x512,768x768", "text_lengths": "64:128:64"}, "--text-lengths is a range and --sizes a list"),
        ({"text_lengths": "a:b:c"}, "--text-lengths is 'a:b:c'"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(UsageError) as error:
        asked(**options)
    assert message in str(error.value)
