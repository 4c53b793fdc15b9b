"""Rewrites of captured graphs: equal forms of what ONNX cannot express. Pass `cut` applies them all.

Each has a name and a reason, matches a pattern of operators rather than a model, and is proven where it is applied:
`cut` compares the stages with the model as it was, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten


def complex_rotation(module: fx.GraphModule) -> None:
    """`view_as_real(view_as_complex(x) · f)` as (a·c − b·d, a·d + b·c): ONNX has no complex numbers.

    Rotary embeddings of Qwen-Image, Z-Image, Lumina2 and others. The factor f may be any complex tensor; where it is a
    constant, its parts are folded.
    """
    for node in list(module.graph.nodes):
        if node.target is not aten.view_as_real.default or node.args[0].target is not aten.mul.Tensor:
            continue
        first, second = node.args[0].args
        if not (isinstance(first, fx.Node) and isinstance(second, fx.Node)):
            continue
        with module.graph.inserting_before(node):
            (a, b), (c, d) = _parts(module.graph, first, node), _parts(module.graph, second, node)
            real = _call(
                module.graph, node, aten.sub.Tensor, _product(module, node, a, c), _product(module, node, b, d)
            )
            imaginary = _call(
                module.graph, node, aten.add.Tensor, _product(module, node, a, d), _product(module, node, b, c)
            )
            node.replace_all_uses_with(_call(module.graph, node, aten.stack.default, [real, imaginary], -1))
    module.graph.eliminate_dead_code()


def _parts(graph: fx.Graph, value: fx.Node, like: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Real and imaginary part of a complex node."""
    if value.target is aten.view_as_complex.default:
        pairs = value.args[0]
    else:
        pairs = _call(graph, like, aten.view_as_real.default, value)
    return _call(graph, like, aten.select.int, pairs, -1, 0), _call(graph, like, aten.select.int, pairs, -1, 1)


def _product(module: fx.GraphModule, like: fx.Node, first: fx.Node, second: fx.Node) -> fx.Node:
    return _call(module.graph, like, aten.mul.Tensor, first, second)


def _call(graph: fx.Graph, like: fx.Node, target: Callable[..., Any], *args: Any) -> fx.Node:
    """A new node in the scope of `like`, with the shape and type of its value."""
    node = graph.call_function(target, args)
    node.meta = {**like.meta, "val": target(*fx.map_arg(args, lambda argument: argument.meta["val"]))}
    return node


REWRITES: tuple[Callable[[fx.GraphModule], None], ...] = (complex_rotation,)
"""In the order in which they are applied."""
