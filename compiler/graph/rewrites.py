"""Rewrites: equal forms of what ONNX cannot express, whatever the model. Pass `cut` applies them all.

Each has a name and a reason, and is proven where it is applied: `cut` compares the stages with the model as it was.
They match patterns of operators in a captured graph, and say whether values may now be rounded otherwise; without that
the comparison is bit for bit. `SizesAsTensors` keeps sizes symbolic that models turn into tensors. What cannot even be
captured has a replacement (`replacements`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.overrides import TorchFunctionMode

aten = torch.ops.aten


def inline_idle_autocast(module: fx.GraphModule) -> bool:
    """Inline regions where autocast is switched off: nothing is cast around them either (Z-Image)."""
    for node in list(module.graph.nodes):
        if node.target is not torch.ops.higher_order.wrap_with_autocast or node.args[2]:
            continue
        _, _, _, _, region, *inputs = node.args
        graph: fx.Graph = getattr(module, region.target).graph
        values = dict(zip(graph.find_nodes(op="placeholder"), inputs, strict=True))
        with module.graph.inserting_before(node):
            results = module.graph.graph_copy(graph, values)
        for user in list(node.users):
            user.replace_all_uses_with(results[user.args[1]])  # type: ignore[index]
    module.graph.eliminate_dead_code()
    return False


def expand_complex_rotation(module: fx.GraphModule) -> bool:
    """Write `view_as_real(view_as_complex(x) · f)` as (a·c − b·d, a·d + b·c): ONNX has no complex numbers.

    Rotary embeddings of Qwen-Image, Z-Image, Lumina2 and others. The factor f may be any complex tensor; where it is a
    constant, its parts are folded. Rounds otherwise where torch's complex product fuses its additions.
    """
    changed = False
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
            changed = True
    module.graph.eliminate_dead_code()
    return changed


def _parts(graph: fx.Graph, value: fx.Node, like: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Real and imaginary part of a complex node."""
    pairs = _pairs(graph, value, like)
    return _call(graph, like, aten.select.int, pairs, -1, 0), _call(graph, like, aten.select.int, pairs, -1, 1)


def _pairs(graph: fx.Graph, value: fx.Node, like: fx.Node) -> fx.Node:
    """A complex node as real pairs along one axis more."""
    if value.target is aten.view_as_complex.default:
        pairs: fx.Node = value.args[0]  # type: ignore[assignment]
        return pairs
    if value.target is aten.unsqueeze.default:
        inner, axis = value.args
        return _call(graph, like, value.target, _pairs(graph, inner, like), axis % value.meta["val"].ndim)  # type: ignore[arg-type, operator]
    return _call(graph, like, aten.view_as_real.default, value)


def _product(module: fx.GraphModule, like: fx.Node, first: fx.Node, second: fx.Node) -> fx.Node:
    return _call(module.graph, like, aten.mul.Tensor, first, second)


def _call(graph: fx.Graph, like: fx.Node, target: Callable[..., Any], *args: Any) -> fx.Node:
    """A new node in the scope of `like`, with the shape and type of its value."""
    node = graph.call_function(target, args)
    node.meta = {**like.meta, "val": target(*fx.map_arg(args, lambda argument: argument.meta["val"]))}
    return node


def reshape_views(module: fx.GraphModule) -> bool:
    """Write `view` as `reshape`: a view holds for the memory layout that one attention kernel leaves, others copy."""
    for node in module.graph.nodes:
        if node.target is aten.view.default:
            node.target = aten.reshape.default
    return False


def drop_idle_squeeze(module: fx.GraphModule) -> bool:
    """Drop `squeeze` of an axis that is longer than one: torch leaves it, ONNX refuses it (PixArt's head)."""
    for node in list(module.graph.nodes):
        if node.target is aten.squeeze.dim and node.args[0].meta["val"].shape[node.args[1]] != 1:
            node.replace_all_uses_with(node.args[0])
    module.graph.eliminate_dead_code()
    return False


def replace_boolean_choice(module: fx.GraphModule) -> bool:
    """Write `where` and `masked_fill` on booleans as logic: ONNX Runtime's CPU provider has no `Where` for them.

    Attention masks of HunyuanVideo's token refiner.
    """
    for node in list(module.graph.nodes):
        if not isinstance(value := node.meta.get("val"), torch.Tensor) or value.dtype != torch.bool:
            continue
        with module.graph.inserting_before(node):
            if node.target is aten.masked_fill.Scalar:
                kept, mask, filled = node.args
                if filled:
                    new = _call(module.graph, node, aten.logical_or.default, kept, mask)
                else:
                    new = _both(module.graph, node, kept, _not(module.graph, node, mask))
            elif node.target is aten.where.self:
                mask, first, second = node.args
                rest = _both(module.graph, node, second, _not(module.graph, node, mask))
                new = _call(module.graph, node, aten.logical_or.default, _both(module.graph, node, first, mask), rest)
            else:
                continue
        node.replace_all_uses_with(new)
    module.graph.eliminate_dead_code()
    return False


def _not(graph: fx.Graph, like: fx.Node, value: Any) -> fx.Node:
    return _call(graph, like, aten.logical_not.default, value)


def _both(graph: fx.Graph, like: fx.Node, first: Any, second: Any) -> fx.Node:
    return _call(graph, like, aten.logical_and.default, first, second)


REWRITES: tuple[Callable[[fx.GraphModule], bool], ...] = (
    inline_idle_autocast,
    expand_complex_rotation,
    reshape_views,
    drop_idle_squeeze,
    replace_boolean_choice,
)
"""In the order in which they are applied; each tells whether values may be rounded otherwise after it."""


class SizesAsTensors(TorchFunctionMode):
    """While it lasts, `torch.tensor` and `torch.as_tensor` of a symbolic size stay symbolic: they would read it as a
    number (Qwen-Image).
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in (torch.tensor, torch.as_tensor) and args and isinstance(args[0], torch.SymInt):
            return torch.scalar_tensor(args[0], **{"dtype": torch.int64, **kwargs})  # type: ignore[arg-type]
        return function(*args, **kwargs)
