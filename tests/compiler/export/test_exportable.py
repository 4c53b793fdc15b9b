"""What cannot be exported is said beforehand: with torchao, gguf and bitsandbytes themselves where they are installed.

They are no dependencies: `pip install --no-deps torchao gguf bitsandbytes` has these tests run. bitsandbytes quantises
on the CPU layer by layer, while diffusers asks for a GPU before it loads a whole model with it, so its layers are put
into a model by hand here.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel, GGUFQuantizationConfig
from flux_export import constants, export_error, inputs
from torch import nn

from otcache.compiler.export.exportable import unexportable
from otcache.compiler.graph.cut import cut
from otcache.schemas.errors import ModelError

TO_Q = "transformer_blocks.0.attn.to_q"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_plain_weights_are_exportable(flux, dtype):
    assert unexportable(flux.to(dtype)) is None


def gguf_file(model: nn.Module, path: Path) -> Path:
    """The model in a GGUF file, its matrices in Q8_0."""
    gguf = pytest.importorskip("gguf", reason="pip install gguf")
    kind = gguf.GGMLQuantizationType.Q8_0
    writer = gguf.GGUFWriter(path, "flux")
    for name, value in model.state_dict().items():
        array = value.numpy().astype(np.float32)
        if array.ndim == 2 and array.shape[1] % 32 == 0:
            writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_gguf_is_refused_until_it_is_dequantised(flux, tmp_path):
    path = gguf_file(flux, tmp_path / "flux.gguf")
    flux.save_config(tmp_path)
    model = FluxTransformer2DModel.from_single_file(
        str(path),
        config=str(tmp_path),
        quantization_config=GGUFQuantizationConfig(compute_dtype=torch.float32),
        torch_dtype=torch.float32,
    ).eval()
    reason = unexportable(model)
    assert reason is not None and "\n" not in reason
    assert reason.startswith("FluxTransformer2DModel is quantised (gguf: ")
    assert "weights are GGUFParameter, the first time_text_embed.timestep_embedder.linear_1.weight)" in reason
    assert reason.endswith("leave engines out with --engines none")
    with pytest.raises(ModelError, match="has no graph"):
        cut(model, inputs(), constants=constants())
    model.dequantize()
    assert unexportable(model) is None
    assert export_error(model, tmp_path / "stages") < 1e-5


def test_weight_only_torchao_is_exportable(flux, tmp_path):
    quantization = pytest.importorskip("torchao.quantization", reason="pip install --no-deps torchao")
    plain = sum(file.stat().st_size for file in written(flux, tmp_path / "plain"))
    quantization.quantize_(flux, quantization.Int8WeightOnlyConfig())
    assert unexportable(flux) is None
    assert export_error(flux, tmp_path / "stages") < 1e-5
    packed = sum(file.stat().st_size for file in (tmp_path / "stages").iterdir())
    assert packed < 0.6 * plain  # engines hold the integers


def written(model: nn.Module, folder: Path) -> list[Path]:
    export_error(model, folder)
    return list(folder.iterdir())


def test_torchao_that_quantises_activations_is_refused(flux, tmp_path):
    quantization = pytest.importorskip("torchao.quantization", reason="pip install --no-deps torchao")
    linear = {path for path, layer in flux.named_modules() if isinstance(layer, nn.Linear)}
    quantization.quantize_(flux, quantization.Int8WeightOnlyConfig(), lambda _, path: path in linear - {TO_Q})
    quantization.quantize_(flux, quantization.Int8DynamicActivationInt8WeightConfig(), lambda _, path: path == TO_Q)
    reason = unexportable(flux)
    assert reason is not None and "\n" not in reason
    assert "torchao: " in reason and "weights are Int8Tensor" in reason
    assert f"{TO_Q}.weight does not export: " in reason and "_int_mm" in reason
    with pytest.raises(ModelError, match="_int_mm"):
        export_error(flux, tmp_path)


@pytest.mark.parametrize(("layer", "weight"), [("Linear4bit", "Params4bit"), ("Linear8bitLt", "Int8Params")])
def test_bitsandbytes_is_refused(flux, layer, weight):
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="pip install --no-deps bitsandbytes")
    attention = flux.get_submodule(TO_Q.rpartition(".")[0])
    made = getattr(bitsandbytes.nn, layer)(64, 64)
    made.load_state_dict(attention.to_q.state_dict())
    attention.to_q = made.to("cpu")
    reason = unexportable(flux)
    assert reason is not None and "\n" not in reason
    assert f"(bitsandbytes: 1 of 62 weights are {weight}, the first {TO_Q}.weight" in reason


def test_8_bit_storage_is_refused(flux):
    flux.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    reason = unexportable(flux)
    assert reason is not None
    assert reason.startswith("FluxTransformer2DModel is quantised (") and "weights are float8_e4m3fn" in reason


def test_integers_in_buffers_of_a_layer_are_refused(flux):
    """A class made here of torch's own, named as auto_round's is: that package cannot be installed beside ours."""

    class QuantLinear(nn.Module):
        __module__ = "auto_round.modules"

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("qweight", torch.zeros(8, 64, dtype=torch.int32))

    flux.set_submodule(TO_Q, QuantLinear())
    reason = unexportable(flux)
    assert reason is not None
    assert f"(auto_round: 1 of 73 modules are QuantLinear, the first {TO_Q})" in reason


def test_weights_that_nobody_keeps_are_named(flux):
    reason = unexportable(flux.to("meta"))
    assert reason is not None and "\n" not in reason
    assert reason.startswith("FluxTransformer2DModel has no values for 62 of 62 weights, the first time_text_embed.")
