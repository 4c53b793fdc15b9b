"""What is sent to workers: functions with what both sides have by name, and without what stays at home."""

from __future__ import annotations

import importlib.util
import io
import itertools
from types import SimpleNamespace

import pytest

if importlib.util.find_spec("ray") is None or importlib.util.find_spec("torch") is None:
    pytest.skip("needs torch, and ray (pip install 'otcache[ray]')", allow_module_level=True)

from otcache.compiler.fleet.crew import split
from otcache.compiler.fleet.packing import Absent, pack, pack_error, unpack, unpack_error
from otcache.compiler.workspace.ledger import Ledger
from otcache.compiler.workspace.progress import JsonReporter, Pass
from otcache.schemas.errors import ModelError


def test_shared_objects_become_the_workers_own():
    here, there = SimpleNamespace(name="here"), SimpleNamespace(name="there")
    data = pack(lambda suffix: here.name + suffix, {"pipeline": here})
    assert unpack(data, {"pipeline": there})("!") == "there!"


def test_what_stays_at_home_is_held_and_not_used():
    stream = io.StringIO()  # which cannot be sent
    advance = Pass(show=lambda current: stream.write("progress"))
    ledger, reporter = Ledger(), JsonReporter()

    def question():
        advance(1, 2)
        return ledger, reporter

    told, said = unpack(pack(question, {}), {})()
    assert isinstance(told, Absent) and isinstance(said, Absent) and stream.getvalue() == ""
    with pytest.raises(RuntimeError, match="a worker has no charge"):
        told.charge(1)


def test_weights_are_not_sent():
    import torch

    layer = torch.nn.Linear(2, 2)
    with pytest.raises(TypeError, match="holds a Linear"):
        pack(lambda: layer, {})
    assert unpack(pack(lambda: layer, {"transformer": layer}), {"transformer": 5})() == 5


def test_errors_come_back_as_they_were():
    cause = ValueError("inner")
    error = ModelError("the line")
    error.__cause__ = cause
    found = unpack_error(pack_error(error))
    assert isinstance(found, ModelError) and str(found) == "the line" and str(found.__cause__) == "inner"

    class Odd(Exception):
        def __init__(self, one, two):
            super().__init__(one)

    assert "Odd: a" in str(unpack_error(pack_error(Odd("a", "b"))))


@pytest.mark.parametrize(("count", "unit", "workers"), [(32, 8, 8), (8, 1, 3), (7, 2, 3), (5, 8, 2), (64, 4, 5)])
def test_samples_are_spread_in_whole_units(count, unit, workers):
    parts = split(count, unit, workers)
    assert parts[0][0] == 0 and parts[-1][1] == count
    assert all(end == start for (_, end), (start, _) in itertools.pairwise(parts))
    assert all(start % unit == 0 and end > start for start, end in parts)
    assert max(end - start for start, end in parts) - min(end - start for start, end in parts) < 2 * unit
