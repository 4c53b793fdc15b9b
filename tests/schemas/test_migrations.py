"""A manifest of every older minor version becomes one of the newest; a newer one stays as it is."""

from __future__ import annotations

import copy

import pytest
from hypothesis import given
from hypothesis import strategies as st

from otcache.schemas.manifest import SCHEMA_MINOR
from otcache.schemas.migrations import MIGRATIONS, migrate

OLD = {
    "schema_version": "1.0",
    "golden": {"prompt": "of no meaning in 1.0"},
    "new": 1,
    "files": [{"path": "a/x.onnx"}, {"path": "a/x.onnx.data"}, {"path": "a/y.onnx"}],
    "stages": [{"name": "x", "onnx": "a/x.onnx"}, {"name": "y", "onnx": "a/y.onnx", "external_data": ["a/x.onnx"]}],
}


def test_every_older_version_has_one():
    assert set(MIGRATIONS) == set(range(SCHEMA_MINOR))


def test_from_1_0():
    before = copy.deepcopy(OLD)
    value = migrate(OLD, 0, SCHEMA_MINOR)
    assert [stage["external_data"] for stage in value["stages"]] == [["a/x.onnx.data"], []]
    assert "golden" not in value and value["new"] == 1 and value["schema_version"] == "1.0"
    assert before == OLD


@pytest.mark.parametrize(("minor", "field"), [(5, "slopes"), (6, "means")])
def test_fields_of_steps(minor, field):
    step = {"step_index": 0, field: {"latent_coef": 0.0}}
    programs = [{"budget": "2", "program": {"payload": "output", "steps": [step, 7]}}, None]
    value = migrate({"programs": programs, "shapes": {"sizes": [{"programs": programs}, {}]}}, minor, minor + 1)
    for entries in (value["programs"], value["shapes"]["sizes"][0]["programs"]):
        assert entries[0]["program"]["steps"] == [{"step_index": 0}, 7] and entries[1] is None
    assert step[field] and migrate({"programs": 1, "shapes": []}, minor, minor + 1) == {"programs": 1, "shapes": []}


def test_steps_of_prompts():
    value = migrate({"tokenizers": [{"path": "a", "steps": ["strip"]}, 7]}, 7, 8)
    assert value["tokenizers"] == [{"path": "a"}, 7] and migrate({"tokenizers": 1}, 7, 8) == {"tokenizers": 1}


def test_zeros_of_negative_prompts():
    value = migrate({"guidance": {"scale": 4.0, "negative_zeros": True}}, 8, 9)
    assert value["guidance"] == {"scale": 4.0} and migrate({"guidance": 1}, 8, 9) == {"guidance": 1}


@pytest.mark.parametrize(("minor", "expected"), [(0, "abc"), (1, "bc"), (2, "c"), (3, ""), (7, "")])
def test_one_after_the_other(minor, expected):
    steps = {place: lambda value, name=name: {**value, "x": value["x"] + name} for place, name in enumerate("abc")}
    assert migrate({"x": ""}, minor, 3, steps) == {"x": expected}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(("onnx", "path", "x", "program", "programs", "sizes", "steps")), inner, max_size=3
        )
    ),
    max_leaves=8,
)


@given(
    st.fixed_dictionaries(
        {}, optional={"files": JSON, "stages": JSON, "golden": JSON, "programs": JSON, "shapes": JSON}
    )
)
def test_no_value_makes_one_raise(value):
    migrate(value, 0, SCHEMA_MINOR)
