"""Rewrites: equal forms of what cannot be captured or what ONNX cannot express. Pass `cut` applies them all.

Each has a name and a reason, and is proven where it is applied: `cut` compares the stages with the model as it was.
`REWRITES` match patterns of operators in a captured graph, whatever the model, and say whether values may now be rounded
otherwise; without that the comparison is bit for bit. `REPLACEMENTS` are for Python that cannot be traced: they stand in for
one method of one class of diffusers while it is traced.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

aten = torch.ops.aten


def complex_rotation(module: fx.GraphModule) -> bool:
    """`view_as_real(view_as_complex(x) · f)` as (a·c − b·d, a·d + b·c): ONNX has no complex numbers.

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


def layout_free_view(module: fx.GraphModule) -> bool:
    """`view` as `reshape`: a view holds for the memory layout that one attention kernel leaves, others copy."""
    for node in module.graph.nodes:
        if node.target is aten.view.default:
            node.target = aten.reshape.default
    return False


def idle_squeeze(module: fx.GraphModule) -> bool:
    """`squeeze` of an axis that is longer than one: torch leaves it, ONNX refuses it (PixArt's head)."""
    for node in list(module.graph.nodes):
        if node.target is aten.squeeze.dim and node.args[0].meta["val"].shape[node.args[1]] != 1:
            node.replace_all_uses_with(node.args[0])
    module.graph.eliminate_dead_code()
    return False


def boolean_choice(module: fx.GraphModule) -> bool:
    """`where` and `masked_fill` on booleans as logic: ONNX Runtime's CPU provider has no `Where` for them.

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
    complex_rotation,
    layout_free_view,
    idle_squeeze,
    boolean_choice,
)
"""In the order in which they are applied; each tells whether values may be rounded otherwise after it."""


def chroma_timestep(self: Any, timestep: Tensor) -> Tensor:
    """`ChromaCombinedTimestepTextProjEmbeddings.forward` with zeros of the batch's size for a Python list of them."""
    batch, length = timestep.shape[0], self.mod_proj.shape[0]
    time = self.time_proj(timestep).to(timestep.dtype)
    guidance = self.guidance_proj(torch.zeros_like(timestep, dtype=torch.int64)).to(timestep.dtype)
    modulation = self.mod_proj.to(time.dtype).repeat(batch, 1, 1)
    return torch.cat([torch.cat([time, guidance], dim=1).unsqueeze(1).repeat(1, length, 1), modulation], dim=-1)


REPLACEMENTS: dict[str, Callable[..., Any]] = {"ChromaCombinedTimestepTextProjEmbeddings": chroma_timestep}
"""Class → its `forward` while it is traced."""


@contextlib.contextmanager
def replaced(model: nn.Module) -> Iterator[None]:
    """While it lasts, submodules of the classes in `REPLACEMENTS` run what stands there."""
    parts = [part for part in model.modules() if type(part).__name__ in REPLACEMENTS]
    for part in parts:
        part.forward = types.MethodType(REPLACEMENTS[type(part).__name__], part)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for part in parts:
            del part.forward
