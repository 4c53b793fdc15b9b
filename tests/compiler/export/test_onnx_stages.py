"""ONNX files: parity with torch, declared names and shapes, nothing of the build host, the same bytes every time."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys

import numpy as np
import onnx
import pytest
import torch
from diffusers import DiTTransformer2DModel, FluxTransformer2DModel
from torch import nn

from otcache.compiler.export import onnx_stages as export
from otcache.compiler.export.onnx_stages import (
    end_to_end_error,
    export_module,
    export_stages,
    relative_error,
    run_exported,
)
from otcache.compiler.graph import split
from otcache.compiler.graph.cut import cut
from otcache.schemas.errors import ModelError


def flux():
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=8,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=10,
        axes_dims_rope=(4, 6, 6),
    )
    kwargs = {
        "hidden_states": torch.randn(2, 5, 8),
        "timestep": torch.rand(2),
        "encoder_hidden_states": torch.randn(2, 5, 12),
        "pooled_projections": torch.randn(2, 10),
    }
    constants = {
        "img_ids": torch.rand(5, 3),
        "txt_ids": torch.zeros(5, 3),
        "guidance": None,
        "joint_attention_kwargs": {},
        "return_dict": False,
    }
    return model.eval(), kwargs, constants


class Trunk(nn.Module):
    """The least that has embed, two blocks and a head, and a table that every block reads."""

    def __init__(self):
        super().__init__()
        self.inlet, self.outlet = nn.Linear(8, 16), nn.Linear(16, 8)
        self.layers = nn.ModuleList([TrunkBlock(), TrunkBlock()])

    def forward(self, hidden_states, timestep):
        h = self.inlet(hidden_states)
        table = torch.arange(5 * 16).reshape(5, 16).cos()
        for layer in self.layers:
            h = layer(h, timestep, table)
        return self.outlet(h)


class TrunkBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(16), nn.Linear(16, 16)

    def forward(self, h, timestep, table):
        x = (self.norm(h) * table).reshape(h.shape[0], 5, 2, 8).transpose(1, 2)
        x = nn.functional.scaled_dot_product_attention(x, x, x).transpose(1, 2).reshape(h.shape)
        return h + self.mix(x) * timestep[:, None, None]


def trunk():
    torch.manual_seed(0)
    return Trunk().eval(), {"hidden_states": torch.randn(2, 5, 8), "timestep": torch.rand(2)}, {}


@pytest.fixture(scope="module", params=[trunk, pytest.param(flux, marks=pytest.mark.slow)], ids=["trunk", "flux"])
def exported(request, tmp_path_factory):
    model, kwargs, constants = request.param()
    calls = []
    stages = cut(model, kwargs, constants=constants)
    folder = tmp_path_factory.mktemp("onnx") / "made"
    result = export_stages(stages, kwargs, folder, progress=lambda done, total: calls.append((done, total)))
    total = len(stages.stages)
    assert calls == [(i, total) for i in range(1, total + 1)]
    return model, kwargs, constants, stages, result


def test_stages_match_torch(exported):
    *_, stages, result = exported
    assert [(s.name, s.kind) for s in result] == [(s.name, s.kind) for s in stages.stages]
    assert all(0 <= stage.max_relative_error < 1e-5 for stage in result)


def test_files_declare_what_the_stages_do(exported):
    *_, stages, result = exported
    for stage, made in zip(stages.stages, result, strict=True):
        model = onnx.load(made.path)
        assert tuple(v.name for v in model.graph.input) == stage.inputs == tuple(info.name for info in made.inputs)
        assert tuple(v.name for v in model.graph.output) == stage.outputs == tuple(info.name for info in made.outputs)
        assert model.opset_import[0].version == export.OPSET
        for value, info in zip((*model.graph.input, *model.graph.output), (*made.inputs, *made.outputs), strict=True):
            assert tuple(d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim) == info.shape
            assert info.dtype == "float32" and info.shape[0] == "batch"


@pytest.mark.parametrize("size", [1, 2, 5])
def test_chain_matches_the_model_end_to_end(exported, size):
    model, kwargs, constants, stages, result = exported
    inputs = {name: torch.randn(size, *value.shape[1:]) for name, value in kwargs.items()}
    with torch.no_grad():
        reference = model(**inputs, **constants)
    reference = reference if isinstance(reference, torch.Tensor) else reference[0]
    assert end_to_end_error(result, inputs, reference) < 1e-5
    assert set(run_exported(result, inputs)) == {*kwargs, *(name for stage in stages.stages for name in stage.outputs)}


def test_weights_above_the_limit_lie_beside_the_file(tmp_path, monkeypatch):
    model, kwargs, _ = trunk()
    stages = cut(model, kwargs, constants={})
    whole = export_stages(stages, kwargs, tmp_path / "whole")
    assert export.EXTERNAL_BYTES <= 1 << 30
    monkeypatch.setattr(export, "EXTERNAL_BYTES", 1024)  # more than embed and head have, less than a block
    beside = export_stages(stages, kwargs, tmp_path / "beside")
    assert [len(stage.files) for stage in whole] == [1, 1, 1, 1]
    assert [len(stage.files) for stage in beside] == [1, 2, 2, 1]
    for stage, other in zip(beside, whole, strict=True):
        entries = [
            entry.value
            for tensor in onnx.load(stage.path, load_external_data=False).graph.initializer
            for entry in tensor.external_data
            if entry.key == "location"
        ]
        assert set(entries) == {path.name for path in stage.files[1:]}
        assert sum(path.stat().st_size for path in stage.files) < 2 * other.path.stat().st_size
    found, expected = run_exported(beside, kwargs), run_exported(whole, kwargs)
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


def test_files_hold_nothing_of_the_build_host(exported):
    *_, result = exported
    for stage in result:
        content = stage.path.read_bytes()
        for trace in (
            b"/work",
            b"/root",
            b"/home",
            b"/tmp",
            b"site-packages",
            b".py",
            b"diffusers",
            os.getcwd().encode(),
        ):
            assert trace not in content, (stage.name, trace)


SCRIPT = """
import torch
from pathlib import Path
from torch import nn
from otcache.compiler.export.onnx_stages import export_module
torch.manual_seed(0)
class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)
    def forward(self, x, y):
        h = nn.functional.scaled_dot_product_attention(*(3 * (self.norm(x)[:, None],)))
        return x + self.mix(h).reshape(x.shape[0], -1, 8) * y[:, None]
example = {"x": torch.randn(2, 3, 8), "y": torch.randn(2, 8)}
export_module(Block().eval(), example, ("z",), Path(folder) / "block.onnx", kind="block")
"""


def test_bytes_do_not_depend_on_the_process(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    there.mkdir()
    exec(SCRIPT, {"folder": here, "__name__": "script"})
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", f"folder = {str(there)!r}\n{SCRIPT}"]
    done = subprocess.run(command, env=environment, cwd=there, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    digests = {hashlib.sha256((folder / "block.onnx").read_bytes()).hexdigest() for folder in (here, there)}
    assert len(digests) == 1


def test_large_tables_cross_the_cuts_with_a_fixed_shape(tmp_path, monkeypatch):
    monkeypatch.setattr(split, "MAX_FOLDED_BYTES", 1)
    model, kwargs, constants = trunk()
    stages = cut(model, kwargs, constants=constants)
    result = export_stages(stages, kwargs, tmp_path)
    assert (5, 16) in [info.shape for info in result[0].outputs]
    assert all((5, 16) in [info.shape for info in block.inputs] for block in result[1:3])
    with torch.no_grad():
        assert end_to_end_error(result, kwargs, model(**kwargs)) < 1e-5


@pytest.mark.slow
def test_whole_model_with_a_head_that_reads_a_block(tmp_path):
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=4,
        num_embeds_ada_norm=10,
    ).eval()
    kwargs = {
        "hidden_states": torch.randn(2, 4, 4, 4),
        "timestep": torch.tensor([3, 500]),
        "class_labels": torch.tensor([1, 2]),
    }
    constants = {"return_dict": False}
    whole = export_module(model, kwargs, ("output",), tmp_path / "whole.onnx", kind="whole", constants=constants)
    chain = export_stages(cut(model, kwargs, constants=constants), kwargs, tmp_path)
    with torch.no_grad():
        reference = model(**kwargs, **constants)[0]
    assert [info.name for info in whole.outputs] == ["output"]
    assert end_to_end_error([whole], kwargs, reference) < 1e-5
    assert end_to_end_error(chain, kwargs, reference) < 1e-5


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x, table):
        return self.linear(x), self.linear(x) * table


def test_large_weights_go_to_a_file_beside(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "EXTERNAL_BYTES", 1)
    inputs = {"x": torch.randn(2, 4), "table": torch.randn(2, 3)}
    made = export_module(Two().eval(), inputs, ("a", "b"), tmp_path / "two.onnx", kind="block")
    assert [path.name for path in made.files] == ["two.onnx", "two.onnx.data"]
    assert [info.shape for info in made.outputs] == [("batch", 3), ("batch", 3)]


def test_refusals(tmp_path):
    inputs = {"x": torch.randn(2, 4), "table": torch.randn(2, 3)}
    with pytest.raises(ModelError, match=r"Two is in training mode.*\.eval\(\)"):
        export_module(Two().train(), inputs, ("a", "b"), tmp_path / "two.onnx", kind="block")
    with pytest.raises(ModelError, match="returns 2 tensors: expected 1"):
        export_module(Two().eval(), inputs, ("a",), tmp_path / "two.onnx", kind="block")
    with pytest.raises(ModelError, match=r"batch sizes .* expected one size of 2 or more"):
        export_module(
            Two().eval(), {k: v[:1] for k, v in inputs.items()}, ("a", "b"), tmp_path / "two.onnx", kind="block"
        )
    with pytest.raises(ModelError, match=r"stage two: its ONNX form differs from torch by .*expected at most -1"):
        export_module(Two().eval(), inputs, ("a", "b"), tmp_path / "two.onnx", kind="block", tolerance=-1.0)
    with pytest.raises(ModelError, match=r"tensor 'x' is torch.float64.*load the model in float32"):
        double = {k: v.double() for k, v in inputs.items()}
        export_module(Two().double().eval(), double, ("a", "b"), tmp_path / "two.onnx", kind="block")


def test_relative_error():
    assert relative_error(np.array([1.0, 2.0]), np.array([1.0, 4.0])) == 0.5
    assert relative_error(np.array([0.5]), np.array([0.0])) == 0.5
    assert relative_error(np.zeros(2), np.zeros(3)) == float("inf")
    assert relative_error(np.array([np.nan]), np.array([1.0])) == float("inf")


class Branches(nn.Module):
    def forward(self, x):
        return torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,))


def test_a_branch_in_a_graph_is_refused_as_readers_do(tmp_path):
    with pytest.raises(ModelError, match="stage branches has the operator If in its ONNX form"):
        export_module(Branches().eval(), {"x": torch.ones(2, 3)}, ["y"], tmp_path / "branches.onnx", kind="decoder")
