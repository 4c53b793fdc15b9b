"""The captured graph of a transformer: its nodes, what they depend on, and the submodules that they come from.

`torch.export` writes into each node which submodule it came from. What depends on no input and no parameter (rotary
tables) is computed once, here.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn

LATENT_NAMES = ("hidden_states", "sample", "x")
"""Keyword arguments that hold the latents, most common first; else the first floating-point input does."""
_REPEAT = re.compile(r"@\d+")
"""`torch.export` marks the second call of a submodule as `name@1`."""


class Graph:
    """The captured graph: live nodes in order, what they depend on, and where they come from."""

    def __init__(self, subject: str, module: fx.GraphModule, inputs: tuple[str, ...]) -> None:
        self.subject = subject
        self.module = module
        self.inputs = inputs
        nodes = list(module.graph.nodes)
        placeholders = [node for node in nodes if node.op == "placeholder"]
        self.input_nodes = dict(zip(inputs, placeholders, strict=True))
        (self.output,) = _nodes_in(next(node for node in nodes if node.op == "output").args)
        live = ancestors([self.output])
        self.nodes = [node for node in nodes if node in live and node.op == "call_function" and not is_size(node)]
        latents = self.input_nodes[_name_of_latents(inputs, placeholders)]
        self.features = self._find_descendants(latents)
        """Nodes whose values depend on the latents."""
        self.constant = self._find_constants()
        """Nodes whose values depend on no input and no parameter."""

    def _find_descendants(self, source: fx.Node) -> set[fx.Node]:
        found = {source}
        for node in self.nodes:
            if any(argument in found for argument in node.all_input_nodes):
                found.add(node)
        return found

    def _find_constants(self) -> set[fx.Node]:
        found: set[fx.Node] = set()
        for node in self.nodes:
            if all(
                argument in found or (argument.op == "get_attr" and self._is_buffer(argument))
                for argument in node.all_input_nodes
            ):
                found.add(node)
        return found

    def _is_buffer(self, node: fx.Node) -> bool:
        value = self.attribute(node)
        return isinstance(value, Tensor) and not isinstance(value, nn.Parameter)

    def attribute(self, node: fx.Node) -> Any:
        """The parameter or buffer that a `get_attr` node reads."""
        return operator.attrgetter(str(node.target))(self.module)

    def fold_constants(self) -> dict[fx.Node, Tensor]:
        """Compute the constant nodes, from the buffers that they read."""
        values: dict[fx.Node, Any] = {}

        def value(argument: fx.Node) -> Any:
            return values[argument] if argument in values else self.attribute(argument)

        with torch.no_grad():
            for node in self.nodes:
                if node in self.constant:
                    args = fx.map_arg(node.args, value)
                    values[node] = node.target(*args, **fx.map_arg(node.kwargs, value))  # type: ignore[operator]
        return values


def _name_of_latents(names: tuple[str, ...], placeholders: list[fx.Node]) -> str:
    """The input that holds the latents: by name (`LATENT_NAMES`), else the first of floating point."""
    for name in LATENT_NAMES:
        if name in names:
            return name
    floating = [name for name, node in zip(names, placeholders, strict=True) if node.meta["val"].is_floating_point()]
    return (floating or list(names))[0]


def _nodes_in(arguments: Any) -> list[fx.Node]:
    """All nodes in the arguments of a node, however deep they are nested."""
    found: list[fx.Node] = []
    fx.map_arg(arguments, lambda node: found.append(node) or node)  # type: ignore[func-returns-value]
    return found


def is_size(node: fx.Node) -> bool:
    """Whether the node's value is a size (or arithmetic on sizes) rather than a tensor."""
    value = node.meta.get("val")
    return isinstance(value, (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool))


def is_item(node: fx.Node) -> bool:
    """Whether the node takes one item of a tuple."""
    return node.target is operator.getitem


def ancestors(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """The nodes themselves and all that they are computed from.

    >>> graph = fx.Graph()
    >>> x, y = graph.placeholder("x"), graph.placeholder("y")
    >>> double = graph.call_function(operator.mul, (x, 2))
    >>> sorted(node.name for node in ancestors([double]))
    ['mul', 'x']
    """
    found: set[fx.Node] = set()
    pending = list(nodes)
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            pending.extend(node.all_input_nodes)
    return found


def scope_of(node: fx.Node) -> str:
    """Dotted path, inside the model, of the submodule that the node came from; empty for the model itself.

    >>> node = fx.Graph().placeholder("x")
    >>> node.meta["nn_module_stack"] = {"1": ("L__self__", None), "2": ("L__self__.blocks.3.norm@1", None)}
    >>> scope_of(node)
    'blocks.3.norm'
    """
    stack = node.meta.get("nn_module_stack") or {}
    paths = [path for path, _ in stack.values()]
    path = _REPEAT.sub("", paths[-1]) if paths else ""
    return ".".join(path.split(".")[1:])


def symbols_in(value: Any) -> set[Any]:
    """The sympy symbols in a size; none in a plain number or a tensor."""
    return (
        set(value.node.expr.free_symbols) if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool) else set()
    )


def own_symbols(node: fx.Node) -> dict[Any, int]:
    """The symbols that are the size of a dimension of a tensor, with that dimension."""
    found: dict[Any, int] = {}
    for dimension, size in enumerate(node.meta["val"].shape):
        if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
            found.setdefault(size.node.expr, dimension)
    return found
