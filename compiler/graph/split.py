"""A labelled graph → `Stages`: one `torch.fx.GraphModule` per stage, each with the parameters that it reads.

Sizes are not tensors: a stage reads them from its own inputs. Constants are stored in the stages that read them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

from otcache.schemas.errors import ModelError

from .features import pair_features
from .fx_graph import Graph, ancestors, is_size, own_symbols, scope_of, symbols_in
from .stage_of_node import Labels
from .stages import StageGraph, StageKind, Stages

MAX_FOLDED_BYTES = 1 << 20
"""A larger constant is stored once, in embed, and handed to the other stages as a tensor."""


def split(graph: Graph, labels: Labels) -> Stages:
    """Split a traced model along the labels of its nodes.

    Args:
        graph: the traced model.
        labels: the stage of each of its nodes (`stage_of_node`).

    Raises:
        ModelError: what crosses a cut is not a single tensor.
    """
    stage_names = ["embed", *(f"block_{i}" for i in range(labels.blocks)), "head"]
    constants = graph.fold_constants()
    shared = _shared_constants(graph, labels, constants)
    stage = {**labels.stage, **dict.fromkeys(shared, 0)}

    outputs: list[list[fx.Node]] = [[] for _ in stage_names]
    for node in graph.nodes:
        here = stage.get(node)
        if here is not None and (node is graph.output or any(stage.get(user, here) != here for user in node.users)):
            outputs[here].append(node)

    names = {node: name for name, node in graph.input_nodes.items()}
    for index, name in enumerate(stage_names):
        _name_outputs(graph, names, name, outputs[index], kind=_kind(index, labels.head))

    builder = _Builder(graph, stage, names, constants)
    made: list[StageGraph] = []
    for index, name in enumerate(stage_names):
        if outputs[index]:
            made.append(builder.build(index, name, _kind(index, labels.head), outputs[index]))
    return Stages(
        stages=tuple(made),
        inputs=graph.inputs,
        output=names[graph.output],
        features=pair_features(graph, labels, names),
    )


def _kind(index: int, head: int) -> StageKind:
    return "embed" if index == 0 else "head" if index == head else "block"


def _shared_constants(graph: Graph, labels: Labels, constants: Mapping[fx.Node, Any]) -> list[fx.Node]:
    """Large constants that several stages read."""
    shared = []
    for node, value in constants.items():
        readers = {labels.stage[user] for user in node.users if user in labels.stage}
        if isinstance(value, Tensor) and value.nbytes > MAX_FOLDED_BYTES and len(readers) > 1:
            shared.append(node)
    return shared


def _name_outputs(
    graph: Graph, names: dict[fx.Node, str], stage: str, nodes: list[fx.Node], *, kind: StageKind
) -> None:
    """`embed_time_text_embed` where a submodule of the model made the tensor, else `block_3_out_0`."""
    taken = set(names.values())
    plain = 0
    for node in nodes:
        if node is graph.output:
            name = "output"
        elif kind == "embed" and (scope := scope_of(node)):
            name = f"{stage}_{re.sub(r'[^A-Za-z0-9_]', '_', scope)}"
        else:
            name, plain = f"{stage}_out_{plain}", plain + 1
        unique, count = name, 1
        while unique in taken:
            unique, count = f"{name}_{count}", count + 1
        taken.add(unique)
        names[node] = unique


class _Builder:
    """Copies the nodes of one stage into a graph of its own."""

    def __init__(
        self,
        graph: Graph,
        stage: Mapping[fx.Node, int],
        names: Mapping[fx.Node, str],
        constants: Mapping[fx.Node, Any],
    ) -> None:
        self.graph = graph
        self.stage_of = stage
        self.names = names
        self.constants = constants

    def build(self, index: int, name: str, kind: StageKind, outputs: list[fx.Node]) -> StageGraph:
        """Build one stage.

        Args:
            index: of the stage, as nodes are labelled with it.
            name: of the stage, which files and messages carry.
            kind: embed, block or head.
            outputs: the nodes that later stages or the caller read, in their order.

        Raises:
            ModelError: an output is no single tensor.
        """
        members = [node for node in self.graph.nodes if self.stage_of.get(node) == index]
        if not all(isinstance(node.meta.get("val"), Tensor) for node in outputs):
            bad = [node.name for node in outputs if not isinstance(node.meta.get("val"), Tensor)]
            raise ModelError(
                f"{self.graph.subject}: stage {name} would hand on {bad}, which are no single tensors: expected "
                "tensors only; the blocks of this model cannot be cut apart"
            )
        inputs = self._inputs(index, members)
        made = fx.Graph()
        attributes: dict[str, Any] = {}
        copies: dict[fx.Node, fx.Node] = {}
        for node in inputs:
            copies[node] = made.placeholder(self.names[node].replace(".", "_"))
            copies[node].meta = dict(node.meta)

        def copy(node: fx.Node) -> fx.Node:
            if node in copies:
                return copies[node]
            if node.op == "get_attr":
                target = str(node.target).removeprefix("module.")
                copies[node] = self._attribute(made, attributes, target, self.graph.attribute(node), node)
            elif node in self.constants:
                target = self._constant_name(attributes, self.constants[node])
                copies[node] = self._attribute(made, attributes, target, self.constants[node], node)
            elif is_size(node):
                copies[node] = self._size(made, node, inputs, copy)
            else:
                copies[node] = made.node_copy(node, copy)
            return copies[node]

        for node in members:
            copy(node)
        made.output(tuple(copy(node) for node in outputs))
        module = fx.GraphModule(attributes, made, class_name=f"{self.graph.subject}_{name}").eval()
        return StageGraph(
            name=name,
            kind=kind,
            module=module,
            inputs=tuple(self.names[node] for node in inputs),
            outputs=tuple(self.names[node] for node in outputs),
        )

    def _inputs(self, index: int, members: list[fx.Node]) -> list[fx.Node]:
        """What the stage reads: inputs of the model first, then tensors of earlier stages, in order of execution."""
        read = {argument for node in members for argument in node.all_input_nodes}
        inputs = [node for node in self.graph.input_nodes.values() if node in read]
        inputs += [node for node in self.graph.nodes if node in read and self.stage_of.get(node, index) != index]
        sizes = [node for node in ancestors(read) if is_size(node)]
        wanted = {symbol for node in sizes for symbol in symbols_in(node.meta["val"])}
        for node in self.graph.input_nodes.values():
            if wanted & set(own_symbols(node)) - {symbol for given in inputs for symbol in own_symbols(given)}:
                inputs.insert(0, node)
        return inputs

    @staticmethod
    def _constant_name(attributes: Mapping[str, Any], value: Tensor) -> str:
        """Equal constants share a name: every attention of a block derives the same rotary table."""
        names = [name for name in attributes if name.startswith("constant_")]
        for name in names:
            other = attributes[name]
            if other.dtype == value.dtype and other.shape == value.shape and torch.equal(other, value):
                return name
        return f"constant_{len(names)}"

    @staticmethod
    def _attribute(made: fx.Graph, attributes: dict[str, Any], target: str, value: Any, node: fx.Node) -> fx.Node:
        attributes[target] = value
        copy = made.create_node("get_attr", target, name=target.replace(".", "_"))
        copy.meta = dict(node.meta)
        return copy

    def _size(
        self, made: fx.Graph, node: fx.Node, inputs: list[fx.Node], copy: Callable[[fx.Node], fx.Node]
    ) -> fx.Node:
        """A size, worked out from those of the stage's own inputs.

        Arithmetic is copied as the model does it: in its simplest form it may divide negative numbers, which ONNX
        rounds otherwise.
        """
        value = node.meta["val"]
        if node.target is not torch.ops.aten.sym_size.int:
            return made.node_copy(node, copy)

        def read(symbol: Any) -> fx.Proxy:
            source = next(source for source in inputs if symbol in own_symbols(source))
            size = made.call_function(torch.ops.aten.sym_size.int, (copy(source), own_symbols(source)[symbol]))
            return fx.Proxy(size)

        expression = value.node.expr
        found = sympy_interp(
            PythonReferenceAnalysis, {symbol: read(symbol) for symbol in expression.free_symbols}, expression
        )
        size_node: fx.Node = found.node
        size_node.meta = dict(node.meta)
        return size_node
