"""The ONNX operators that an engine may consist of: no others are exported, and a reader opens no file with others.

Each is a function of tensors that ends: there are no loops, branches, functions, random numbers, strings or anything
that reads files. Export emits the first group, over the classes of `otc models` with their text encoders and decoders
and the artifacts of older versions; the second holds what torch.onnx writes for other layers of the same kind.
"""

from __future__ import annotations

_EMITTED = """
    Abs Add And ArgMax Cast Clip Concat Conv Cos CumSum DepthToSpace Div Einsum Equal Expand Gather GatherND
    Gelu Gemm Greater GreaterOrEqual Identity InstanceNormalization IsNaN LayerNormalization Less LessOrEqual
    Log MatMul Max Min Mod Mul Neg Not Pad Pow Range Reciprocal ReduceL2 ReduceMax ReduceMean ReduceSum Relu
    Reshape Resize ScatterElements ScatterND SequenceAt Shape Sigmoid Sin Slice Softmax Split SplitToSequence
    Sqrt Squeeze Sub Tanh Tile Transpose Unsqueeze Where
"""
_RELATED = """
    ArgMin Atan AveragePool CastLike Ceil ConcatFromSequence Constant ConstantOfShape ConvTranspose Elu Erf Exp
    Flatten Floor GatherElements GlobalAveragePool GridSample GroupNormalization HardSigmoid HardSwish IsInf
    LeakyRelu LogSoftmax MaxPool Mean Mish NonZero OneHot Or PRelu ReduceL1 ReduceLogSumExp ReduceMin ReduceProd
    ReduceSumSquare Round Selu SequenceConstruct Sign Size Softplus Softsign SpaceToDepth Sum Tan TopK Trilu Xor
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
