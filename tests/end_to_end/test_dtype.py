"""`otc compile --dtype` through the command line: float16 is served on the CPU, bfloat16 is compiled and checked."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from command import COMPILE, otc

from otcache.compiler.export.evaluators import array_from_tensor, load_evaluator
from otcache.compiler.export.precision import Served
from otcache.compiler.graph.stages import StageGraph
from otcache.compiler.models.load import load_model
from otcache.compiler.options import CompileOptions
from otcache.compiler.passes.evaluate import held_out_runs
from otcache.compiler.passes.golden import first_denoiser, rounding_of
from otcache.compiler.passes.prepare import prepare
from otcache.compiler.pipelines.call import call_options
from otcache.compiler.workspace.progress import Reporter
from otcache.runtime import Sampler
from otcache.runtime.artifact.reader import Artifact
from otcache.schemas.errors import HostError

PROMPT = "a red ring on black"
SAME = {
    "budgets": (2, 4),
    "num_inference_steps": 8,
    "calibration_prompts": 4,
    "evaluation_prompts": 3,
    "trials": 4,
    "threads": 1,
}
"""`COMPILE`, as options."""
OF_ONE_EVALUATION = {"float16": 2e-3, "bfloat16": 2e-2}
"""Largest error of the exported transformer, relative to the largest output of the float32 model. Measured: 6e-4 and
7e-3.
"""
OF_GOLDEN = {"float16": 1e-2, "bfloat16": 1e-1}
"""Largest distance from the golden latents that is let pass."""
OF_LATENTS = 5e-3
"""Distance of float16 latents after 8 steps from those of the float32 pipeline, relative to their size."""


@pytest.fixture(scope="module")
def halves(compiled, tiny_flux_folder, workspace, tmp_path_factory):
    """Artifacts in both dtypes, which share everything but the transformer's stages with the float32 one."""
    folder = tmp_path_factory.mktemp("halves")
    for dtype in OF_ONE_EVALUATION:
        target = ("--dtype", dtype, "-o", str(folder / dtype))
        result = otc("compile", str(tiny_flux_folder), *COMPILE, *target, workspace=workspace)
        assert result.exit_code == 0, result.output
    return folder


def trunk_weights(folder):
    """Bytes of weights by type, over the ONNX files of the transformer."""
    found: dict[str, int] = {}
    for stage in Artifact.open(folder).manifest.trunk:
        for value in onnx.load(folder / stage.onnx).graph.initializer:
            name = onnx.TensorProto.DataType.Name(value.data_type)
            found[name] = found.get(name, 0) + onnx.numpy_helper.to_array(value).nbytes
    return found


@pytest.mark.slow
@pytest.mark.parametrize("dtype", OF_ONE_EVALUATION)
def test_the_manifest_says_what_the_stages_are(halves, compiled, dtype):
    half, whole = Artifact.open(halves / dtype).manifest, Artifact.open(compiled).manifest
    assert half.conditions.dtype == dtype and whole.conditions.dtype == "float32"
    tensors = [tensor for stage in half.trunk for tensor in (*stage.inputs, *stage.outputs)]
    assert {tensor.dtype for tensor in tensors if tensor.name != half.timestep_input} == {dtype}
    assert {tensor.dtype for tensor in tensors if tensor.name == half.timestep_input} == {"float32"}
    assert 0 < half.max_relative_error < OF_ONE_EVALUATION[dtype] and whole.max_relative_error < 1e-4
    assert half.programs == whole.programs and half.model == whole.model, "searched in float32, and of the same weights"
    weights, floats = trunk_weights(halves / dtype), trunk_weights(compiled)["FLOAT"]
    assert weights[dtype.upper()] > 0.45 * floats and weights.get("FLOAT", 0) < 0.1 * floats


@pytest.mark.slow
def test_float16_is_served_close_to_the_float32_pipeline(halves, compiled, tiny_flux_folder):
    pipeline = load_model(str(tiny_flux_folder)).pipeline
    arguments = {
        **call_options(pipeline, num_inference_steps=8, height=16, width=16, max_sequence_length=12).arguments(4.0, 1),
        "output_type": "latent",
    }
    with torch.no_grad():
        expected = pipeline([PROMPT], generator=torch.Generator().manual_seed(3), **arguments).images.numpy()
    with Sampler.load(halves / "float16", "onnxruntime") as half, Sampler.load(compiled, "onnxruntime") as whole:
        for budget, reference in (("full", expected), ("4", whole.sample(whole.encode(PROMPT), budget="4", seed=3))):
            served = half.sample(half.encode(PROMPT), budget=budget, seed=3)
            distance = np.linalg.norm(served - reference) / np.linalg.norm(reference)
            assert 1e-6 < distance < OF_LATENTS, "as close as float16 is, and no closer than it can be"
    result = otc("verify", str(halves / "float16"), "--level", "golden")
    assert result.exit_code == 0, result.output


@pytest.mark.slow
def test_bfloat16_is_refused_on_a_cpu_with_the_way_out(halves, tmp_path):
    target = str(tmp_path / "out.png")
    result = otc("run", str(halves / "bfloat16"), "--budget", "4", "--prompt", PROMPT, "-o", target)
    assert result.exit_code == HostError.exit_code and len(result.stderr.strip().splitlines()) == 1
    assert "is bfloat16" in result.stderr and "otc build-engines, or compile with --dtype float16" in result.stderr
    assert not list(tmp_path.iterdir())
    result = otc("verify", str(halves / "bfloat16"))
    assert result.exit_code == 0, result.output


class File(torch.nn.Module):
    """An exported stage in place of the torch module that it was made of."""

    def __init__(self, path, stage):
        super().__init__()
        self.names = [tensor.name for tensor in stage.inputs], [tensor.name for tensor in stage.outputs]
        self.evaluate = load_evaluator(path, [tensor.dtype for tensor in (*stage.inputs, *stage.outputs)])

    def forward(self, *inputs):
        names, wanted = self.names
        found = self.evaluate(wanted, dict(zip(names, map(array_from_tensor, inputs), strict=True)))
        return [
            torch.from_numpy(a.view(np.int16)).view(torch.bfloat16)
            if a.dtype.name == "bfloat16"
            else torch.from_numpy(a)
            for a in found
        ]


def turned(path, target):
    """Copy an ONNX file with the rows of its largest matrix moved by one."""
    model = onnx.load(path)
    weight = max(model.graph.initializer, key=lambda value: onnx.numpy_helper.to_array(value).nbytes)
    rolled = np.roll(onnx.numpy_helper.to_array(weight), 1, axis=0)
    weight.CopyFrom(onnx.numpy_helper.from_array(rolled, weight.name))
    onnx.save(model, target)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", OF_ONE_EVALUATION)
def test_the_golden_request_is_tight_and_catches_one_wrong_matrix(dtype, halves, tiny_flux_folder, workspace, tmp_path):
    """Files are run as they are compared at export: by ONNX Runtime, and for bfloat16 by onnx's evaluator."""
    options = CompileOptions(model=str(tiny_flux_folder), dtype=dtype, workspace=workspace, **SAME)
    prepared, artifact = prepare(options, Reporter()), Artifact.open(halves / dtype)
    session, golden = prepared.session, artifact.manifest.golden
    runs = held_out_runs(prepared)
    expected = np.frombuffer(artifact.read(golden.latents), "<f4").reshape(artifact.manifest.latents.shape)
    program = artifact.manifest.program(golden.budget).program

    def error(folder):
        stages = [
            StageGraph(
                name=stage.name,
                kind=stage.kind,
                module=File(folder / stage.onnx, stage),
                inputs=tuple(tensor.name for tensor in stage.inputs),
                outputs=tuple(tensor.name for tensor in stage.outputs),
            )
            for stage in artifact.manifest.trunk
        ]
        served = Served(
            stages=replace(prepared.stages, stages=tuple(stages)),
            example={},
            elsewhere=(),
            dtype=getattr(torch, dtype),
            kept=(session.interface.timestep_input,),
        )
        latents = torch.from_numpy(runs.latents(slice(1), 0))
        return rounding_of(served, program, first_denoiser(session, runs), latents, expected)

    assert 1e-5 < error(artifact.folder) < golden.max_relative_error < OF_GOLDEN[dtype]
    broken = Path(shutil.copytree(artifact.folder, tmp_path / "broken"))
    block = next(stage for stage in artifact.manifest.trunk if stage.kind == "block")
    turned(artifact.folder / block.onnx, broken / block.onnx)
    assert error(broken) > 2 * golden.max_relative_error
