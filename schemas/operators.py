"""The ONNX operators that an engine may consist of: no others are exported, and a reader opens no file with others.

Each is a function of tensors that ends: there are no loops, branches, functions, random numbers, sequences, strings or
anything that reads files. Export emits the first group, over all classes of `otc models` with their text encoders and
decoders; the second holds what torch.onnx writes for other layers of the same kind.
"""

from __future__ import annotations

_EMITTED = """
    Abs Add And ArgMax Cast Clip Concat Conv Cos CumSum Div Equal Expand Gather GatherND Gelu Gemm Greater
    GreaterOrEqual Identity InstanceNormalization IsNaN LayerNormalization Less LessOrEqual Log MatMul Max Min Mul Neg
    Not Pad Pow Range Reciprocal ReduceL2 ReduceMax ReduceMean ReduceSum Relu Reshape Resize ScatterElements Shape
    Sigmoid Sin Slice Softmax Split Sqrt Squeeze Sub Tile Transpose Unsqueeze Where
"""
_RELATED = """
    ArgMin Atan AveragePool CastLike Ceil Constant ConstantOfShape ConvTranspose DepthToSpace Einsum Elu Erf Exp Flatten
    Floor GatherElements GlobalAveragePool GridSample GroupNormalization HardSigmoid HardSwish IsInf LeakyRelu
    LogSoftmax MaxPool Mean Mish Mod NonZero OneHot Or PRelu ReduceL1 ReduceLogSumExp ReduceMin ReduceProd
    ReduceSumSquare Round ScatterND Selu Sign Size Softplus Softsign SpaceToDepth Sum Tan Tanh TopK Trilu Xor
"""
OPERATORS = frozenset(_EMITTED.split()) | frozenset(_RELATED.split())
DOMAINS = frozenset({"", "ai.onnx"})
"""Two names of the same set of operators, ONNX's own."""


def fault_of(operator: str, domain: str) -> str | None:
    """What is wrong with a node of this type, in words; None if it may stand in an engine.

    >>> fault_of("MatMul", ""), fault_of("Loop", ""), fault_of("MatMul", "com.microsoft")
    (None, 'the operator Loop', 'the operator MatMul of com.microsoft')
    """
    if domain not in DOMAINS:
        return f"the operator {operator} of {domain}"
    return None if operator in OPERATORS else f"the operator {operator}"
