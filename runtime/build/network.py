"""Networks for TensorRT: a stage from its ONNX file, a combination from its description.

They are strongly typed on every version: types in a network are those of the file or the manifest, and nothing changes
them. `trt` is the module of either library.
"""

from __future__ import annotations

import functools
from collections import Counter
from pathlib import Path
from typing import Any

from otcache.schemas.combinations import COEFS, Combination
from otcache.schemas.manifest import TensorInfo
from otcache.schemas.messages import one_line
from otcache.schemas.program import FARTHEST, TINY, position_axes

from ..engines.tensorrt_library import TYPES

_NAMES = {trt_name: name for name, trt_name in TYPES.items()}


class NetworkError(Exception):
    """What cannot become a network; the message names the node."""


def create_network(builder: Any, trt: Any) -> Any:
    """An empty network whose types are what it is given. Always so from 11 on, where the flag may be gone."""
    strongly = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return builder.create_network(0 if strongly is None else 1 << int(strongly))


def parse_stage(trt: Any, network: Any, path: Path, logger: Any) -> Any:
    """Fill the network from an ONNX file, and return the parser.

    The parser owns the weights, to which the network has pointers only: it must live until the plan is built. Raises
    NetworkError with the node that cannot be expressed.
    """
    parser = trt.OnnxParser(network, logger)
    if parser.parse_from_file(str(path)):
        return parser
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    found = [error for error in errors if error.node_operator()] or errors
    if not found:
        raise NetworkError("the parser gives no reason")
    node = f"node {one_line(found[0].node_name() or '(unnamed)', 80)} ({one_line(found[0].node_operator(), 40)})"
    raise NetworkError(f"{node}: {one_line(found[0].desc())}")


def add_combination(trt: Any, network: Any, combination: Combination) -> Any:
    """Fill the network with a linear combination (`otcache.schemas.combinations`), and return its constants.

    The network has pointers to them only: they must live until the plan is built.
    """
    inputs = {
        tensor.name: network.add_input(
            tensor.name,
            getattr(trt.DataType, TYPES[tensor.dtype]),
            _dimensions(tensor),
        )
        for tensor in combination.inputs
    }
    ops = _Operations(trt, network, inputs.pop(COEFS, None), rank=len(combination.total.shape))
    terms = [ops.cast(term, trt.DataType.FLOAT) for term in inputs.values()]
    if combination.kind == "spread":
        total = ops.join([ops.times(terms[0], 0)] * combination.branches)
    elif combination.kind == "residual":
        total = ops.apply(terms[0], terms[1], trt.ElementWiseOperation.SUB)
    elif combination.kind == "forecast":
        total = ops.add(terms[0], ops.weigh(terms[1:], first_coef=0))
    elif combination.kind == "guide":
        each = ops.parts(terms[0], combination.branches)
        total = ops.weigh(each, first_coef=0)
        if combination.keep_norm:
            total = ops.as_long_as(total, each[-1])
    else:
        count = len(terms) * (2 if combination.means else 1)
        if combination.kind == "follow":
            coefs = ops.follow_coefs(terms[-2], terms[-1], count=count)
        else:
            coefs = [ops.coef(index) for index in range(count)]
        total = ops.products(terms, coefs[: len(terms)])
        if combination.means:
            total = ops.add(total, ops.mean(ops.products(terms, coefs[len(terms) :])))
    total = ops.cast(total, getattr(trt.DataType, TYPES[combination.total.dtype]))
    if total.is_network_input:
        total = network.add_identity(total).get_output(0)
    total.name = combination.total.name
    network.mark_output(total)
    return ops.constants


def layers_by_type(network: Any) -> dict[str, int]:
    """How many layers there are by the type of what they write; types are fixed, so this holds for the plan."""
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    types = Counter(layer.get_output(0).dtype.name for layer in layers if layer.num_outputs)
    return {_NAMES.get(name, name.lower()): count for name, count in sorted(types.items())}


def _dimensions(tensor: TensorInfo) -> tuple[int, ...]:
    """Of an input; -1 for what its profile says."""
    symbols = tensor.symbols or (None,) * len(tensor.shape)
    return tuple(
        -1 if symbol or isinstance(size, str) else size for size, symbol in zip(tensor.shape, symbols, strict=True)
    )


class _Operations:
    """Arithmetic on a network's tensors, float32 unless said otherwise."""

    def __init__(self, trt: Any, network: Any, coefs: Any, *, rank: int) -> None:
        self.trt, self.network, self.coefs, self.rank = trt, network, coefs, rank
        self.constants: list[Any] = []

    def constant(self, array: Any) -> Any:
        """An array as a tensor; the network has a pointer to it only, so it is kept in `constants`."""
        self.constants.append(array)
        return self.network.add_constant(array.shape, array).get_output(0)

    def cast(self, tensor: Any, dtype: Any) -> Any:
        """The tensor in a type; itself where it has it."""
        return tensor if tensor.dtype == dtype else self.network.add_cast(tensor, dtype).get_output(0)

    def apply(self, a: Any, b: Any, operation: Any) -> Any:
        """An operation of two tensors, element by element."""
        return self.network.add_elementwise(a, b, operation).get_output(0)

    def add(self, a: Any, b: Any) -> Any:
        """a + b."""
        return self.apply(a, b, self.trt.ElementWiseOperation.SUM)

    def reshape(self, tensor: Any, shape: tuple[int, ...]) -> Any:
        """The same values in a shape."""
        layer = self.network.add_shuffle(tensor)
        layer.reshape_dims = shape
        return layer.get_output(0)

    def product(self, a: Any, b: Any) -> Any:
        """a · b, element by element."""
        return self.apply(a, b, self.trt.ElementWiseOperation.PROD)

    def coef(self, index: int) -> Any:
        """A coefficient, with a dimension of 1 for each of the terms'."""
        one = self.network.add_slice(self.coefs, (index,), (1,), (1,)).get_output(0)
        return self.reshape(one, (1,) * self.rank)

    def times(self, tensor: Any, coef: int) -> Any:
        """The tensor times a coefficient."""
        return self.product(tensor, self.coef(coef))

    def products(self, terms: list[Any], coefs: list[Any]) -> Any:
        """Σ coefs · terms: the first plus the sum of the others, in order."""
        first, *others = [self.product(term, coef) for term, coef in zip(terms, coefs, strict=True)]
        return self.add(first, self.sum(others)) if others else first

    def mean(self, tensor: Any) -> Any:
        """Over positions, which stay as dimensions of 1."""
        axes = sum(1 << axis for axis in position_axes(self.rank))
        return self.network.add_reduce(tensor, self.trt.ReduceOperation.AVG, axes, True).get_output(0)

    def sum(self, terms: list[Any]) -> Any:
        """Σ terms, in order."""
        return functools.reduce(self.add, terms)

    def weigh(self, terms: list[Any], *, first_coef: int) -> Any:
        """Σ coefs · terms, in order."""
        return self.sum([self.times(term, index) for index, term in enumerate(terms, start=first_coef)])

    def follow_coefs(self, before: Any, output: Any, *, count: int) -> list[Any]:
        """coefs_i + s · coefs_{count + i} for each sample, with s its place among the samples:
        `arithmetic.place_among_samples`.
        """
        operation = self.trt.ElementWiseOperation
        moved, size = self._log_square(self.apply(output, before, operation.SUB)), self._log_square(output)
        change = self.product(self.apply(moved, size, operation.SUB), self._scalar(0.5))
        place = self.apply(
            self.apply(change, self.coef(2 * count), operation.SUB), self.coef(2 * count + 1), operation.DIV
        )
        place = self.apply(place, self._scalar(-FARTHEST), operation.MAX)
        place = self.apply(place, self._scalar(FARTHEST), operation.MIN)
        return [self.add(self.coef(index), self.product(place, self.coef(count + index))) for index in range(count)]

    def _log_square(self, tensor: Any) -> Any:
        """The logarithm of the sum of squares of every sample, with a dimension of 1 for each of the terms' others."""
        every_other = (1 << self.rank) - 2
        square = self.product(tensor, tensor)
        total = self.network.add_reduce(square, self.trt.ReduceOperation.SUM, every_other, True).get_output(0)
        total = self.apply(total, self._scalar(TINY), self.trt.ElementWiseOperation.MAX)
        return self.network.add_unary(total, self.trt.UnaryOperation.LOG).get_output(0)

    def _scalar(self, value: float) -> Any:
        import numpy as np

        return self.constant(np.full((1,) * self.rank, value, np.float32))

    def join(self, tensors: list[Any]) -> Any:
        """The rows of all tensors, one after the other."""
        layer = self.network.add_concatenation(tensors)
        layer.axis = 0
        return layer.get_output(0)

    def parts(self, tensor: Any, count: int) -> list[Any]:
        """The tensor's rows in so many equal parts, whatever its shape."""
        operation = self.trt.ElementWiseOperation
        shape = self.network.add_shape(tensor).get_output(0)
        size = self.apply(shape, self._vector(count, others=1), operation.FLOOR_DIV)
        zeros, ones = (0,) * self.rank, (1,) * self.rank
        found = []
        for index in range(count):
            begin = self.apply(size, self._vector(index, others=0), operation.PROD)
            layer = self.network.add_slice(tensor, zeros, zeros, ones)
            layer.set_input(1, begin)
            layer.set_input(2, size)
            found.append(layer.get_output(0))
        return found

    def _vector(self, rows: int, *, others: int) -> Any:
        """A number for the rows of a shape, and one for every other dimension."""
        import numpy as np

        return self.constant(np.array([rows, *[others] * (self.rank - 1)], np.int64))

    def as_long_as(self, tensor: Any, other: Any) -> Any:
        """The tensor, its vectors along the last axis as long as the other's."""
        operation = self.trt.ElementWiseOperation
        own = self.apply(self._length(tensor), self._scalar(TINY), operation.MAX)
        return self.apply(tensor, self.apply(self._length(other), own, operation.DIV), operation.PROD)

    def _length(self, tensor: Any) -> Any:
        square = self.apply(tensor, tensor, self.trt.ElementWiseOperation.PROD)
        total = self.network.add_reduce(square, self.trt.ReduceOperation.SUM, 1 << (self.rank - 1), True).get_output(0)
        return self.network.add_unary(total, self.trt.UnaryOperation.SQRT).get_output(0)
