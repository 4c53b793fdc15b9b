"""What exported stages are compared on, here on the build host: ONNX Runtime, and onnx's reference for bfloat16.

ONNX Runtime's CPU provider computes float16 by casts to float32 around the operators that it has no float16 form of,
but has no bfloat16 form of matrix products or of arithmetic, and inserts no casts for it. onnx's `ReferenceEvaluator`
rounds to bfloat16 after every operator, as a GPU does; of its operators those that sum are made to do so in float32, as
a GPU does too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import torch
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from onnx.reference.ops import load_op
from torch import Tensor

from otcache.schemas.errors import ModelError

from ..graph.trace import reason_of

Run = Callable[[Sequence[str], Mapping[str, NDArray[Any]]], Sequence[NDArray[Any]]]
"""From the names of outputs, and the inputs by name, to the outputs."""

OPSET = 20
"""Newest opset without the `Attention` operator, whose float32 form TensorRT-RTX refuses."""
SUMMING = ("Conv", "Gemm", "LayerNormalization", "MatMul", "ReduceMean", "ReduceSum", "Softmax")
"""numpy sums bfloat16 in bfloat16, which stops growing at 256 ones."""
_BFLOAT16 = onnx.helper.tensor_dtype_to_np_dtype(onnx.TensorProto.BFLOAT16)


def load_evaluator(path: Path, dtypes: Sequence[str]) -> Run:
    """Load a file to run on the CPU.

    Args:
        path: the ONNX file; its data lie beside it.
        dtypes: of its inputs and outputs, as manifests name them.

    Raises:
        ModelError: ONNX Runtime has no form of an operator.
    """
    if "bfloat16" in dtypes:
        return _load_reference(path)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.disable_prepacking", "1")  # a second copy of the weights
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"]).run  # type: ignore[no-any-return]
    except Exception as error:
        raise ModelError(
            f"stage {path.stem}: ONNX Runtime refuses the file: {reason_of(error)}; expected operators that its CPU "
            "provider implements; replace the operator in the model, or report it to otcache"
        ) from error


def _load_reference(path: Path) -> Run:
    """Load a file into onnx's evaluator, with weights that are read where they lie: it would keep them twice."""
    model = onnx_ir.load(path)
    weights = {name: value.const_value.numpy() for name, value in model.graph.initializers.items() if value.const_value}
    model.graph.initializers.clear()
    session = ReferenceEvaluator(onnx_ir.to_proto(model), new_ops=[_in_float32(name) for name in SUMMING])

    def run(names: Sequence[str], inputs: Mapping[str, NDArray[Any]]) -> Sequence[NDArray[Any]]:
        return session.run(list(names), {**weights, **inputs})  # type: ignore[return-value]

    return run


def array_from_tensor(tensor: Tensor) -> NDArray[Any]:
    """The tensor as an array of its own type, bfloat16 as that of `ml_dtypes`.

    >>> array_from_tensor(torch.tensor([1.5, -2.0], dtype=torch.bfloat16)).astype(np.float32).tolist()
    [1.5, -2.0]
    """
    value = tensor.detach().cpu()
    if value.dtype != torch.bfloat16:
        return value.numpy()
    array: NDArray[Any] = value.contiguous().view(torch.int16).numpy().view(_BFLOAT16)
    return array


def _in_float32(name: str) -> type[OpRun]:
    """The operator, with its bfloat16 inputs as float32 and its results rounded to bfloat16."""
    original = load_op("", name, OPSET)

    def run(self: Any, *inputs: Any, **attributes: Any) -> tuple[Any, ...]:
        wide = [x.astype(np.float32) if x is not None and x.dtype == _BFLOAT16 else x for x in inputs]
        results = original._run(self, *wide, **attributes)
        return tuple(y.astype(inputs[0].dtype) for y in results)

    return type(name, (original,), {"op_domain": "", "_run": run})
