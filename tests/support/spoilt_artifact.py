"""The small artifact with a stage whose numbers are not finite."""

from __future__ import annotations

import numpy as np
import onnx
import small_artifact as small
from onnx import helper, numpy_helper


def spoil(folder, stage, *, below=None, factor=np.nan):
    """Let a stage's output be multiplied by a number that is none, or only at times below a threshold."""
    path = folder / f"engines/onnx/{stage}.onnx"
    model = onnx.load(path)
    (output,) = model.graph.output
    for node in model.graph.node:
        node.output[:] = ["clean" if name == output.name else name for name in node.output]
    constants = {"one": 1.0, "spoilt": factor, "below": below or 0.0}
    for name, value in constants.items():
        model.graph.initializer.append(numpy_helper.from_array(np.float32(value), name))
    name = "spoilt"
    if below is not None:
        model.graph.node.append(helper.make_node("ReduceMin", ["timestep"], ["earliest"], keepdims=0))
        model.graph.node.append(helper.make_node("Less", ["earliest", "below"], ["late"]))
        model.graph.node.append(helper.make_node("Where", ["late", "spoilt", "one"], ["factor"]))
        name = "factor"
    model.graph.node.append(helper.make_node("Mul", ["clean", name], [output.name]))
    onnx.save(model, path)
    small.reseal_file(folder, f"engines/onnx/{stage}.onnx")
