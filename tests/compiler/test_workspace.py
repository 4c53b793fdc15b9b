"""Results are kept under the digest of their inputs, whole or not at all."""

from __future__ import annotations

import numpy as np
import pytest

from otcache.compiler.workspace import Workspace


def test_values_come_back_and_are_not_computed_again(tmp_path):
    workspace = Workspace(tmp_path)
    calls = []
    for _ in range(2):
        value = workspace.json("pass", {"a": 1}, lambda: calls.append(1) or {"x": [0.1, 1 / 3]})
        arrays = workspace.arrays("array", 7, lambda: calls.append(2) or {"m": np.eye(2, dtype=np.float32)})
        assert value == {"x": [0.1, 1 / 3]}
        assert np.array_equal(arrays["m"], np.eye(2)) and arrays["m"].dtype == np.float32
    assert calls == [1, 2]
    assert workspace.reused == ["pass", "array"]


def test_another_key_is_another_result(tmp_path):
    workspace = Workspace(tmp_path)
    assert workspace.json("pass", {"a": 1}, lambda: 1) == 1
    assert workspace.json("pass", {"a": 2}, lambda: 2) == 2


def test_a_failed_pass_leaves_nothing(tmp_path):
    workspace = Workspace(tmp_path)

    def fill(folder):
        (folder / "half").write_text("x")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        workspace.tree("tree", 1, fill)
    assert list(tmp_path.iterdir()) == []
    folder = workspace.tree("tree", 1, lambda folder: (folder / "whole").write_text("x"))
    assert [path.name for path in folder.iterdir()] == ["whole"]
