"""Rewrites: equal forms of what cannot be captured or what ONNX cannot express. Pass `cut` applies them all.

Each has a name and a reason, and is proven where it is applied: `cut` compares the stages with the model as it was.
`REWRITES` match patterns of operators in a captured graph, whatever the model, and say whether values may now be rounded
otherwise; without that the comparison is bit for bit. `REPLACEMENTS` are for Python that cannot be traced: they stand in for
one method of one class of diffusers while it is traced. `SizesAsTensors` keeps sizes symbolic that models turn into tensors.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

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


class SizesAsTensors(TorchFunctionMode):
    """While it lasts, `torch.tensor` and `torch.as_tensor` of a symbolic size stay symbolic: they would read it as a number (Qwen-Image)."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in (torch.tensor, torch.as_tensor) and args and isinstance(args[0], torch.SymInt):
            return torch.scalar_tensor(args[0], **{"dtype": torch.int64, **kwargs})  # type: ignore[arg-type]
        return function(*args, **kwargs)


def chroma_timestep(self: Any, timestep: Tensor) -> Tensor:
    """`ChromaCombinedTimestepTextProjEmbeddings.forward` with zeros of the batch's size for a Python list of them."""
    batch, length = timestep.shape[0], self.mod_proj.shape[0]
    time = self.time_proj(timestep).to(timestep.dtype)
    guidance = self.guidance_proj(torch.zeros_like(timestep, dtype=torch.int64)).to(timestep.dtype)
    modulation = self.mod_proj.to(time.dtype).repeat(batch, 1, 1)
    return torch.cat([torch.cat([time, guidance], dim=1).unsqueeze(1).repeat(1, length, 1), modulation], dim=-1)


def mochi_attention(
    self: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, attention_mask: Tensor, image_rotary_emb: Any
) -> tuple[Tensor, Tensor]:
    """`MochiAttention.forward` with padded text hidden by a mask, where the processor cuts each sample's off in a loop.

    The padding follows the text, as Mochi's tokenizer makes it; what the processor fills up with zeros is zero here too.
    """
    cos, sin = image_rotary_emb

    def split(value: Tensor) -> Tensor:
        return value.unflatten(2, (self.heads, -1))

    def rotated(value: Tensor) -> Tensor:
        even, odd = value[..., 0::2].float(), value[..., 1::2].float()
        pairs = (even * cos - odd * sin).to(value.dtype), (even * sin + odd * cos).to(value.dtype)
        return torch.stack(pairs, dim=-1).flatten(-2)

    query = rotated(self.norm_q(split(self.to_q(hidden_states))))
    key = rotated(self.norm_k(split(self.to_k(hidden_states))))
    text_query = self.norm_added_q(split(self.add_q_proj(encoder_hidden_states)))
    text_key = self.norm_added_k(split(self.add_k_proj(encoder_hidden_states)))
    value, text_value = split(self.to_v(hidden_states)), split(self.add_v_proj(encoder_hidden_states))
    queries, keys, values = (
        torch.cat(pair, dim=1).transpose(1, 2) for pair in ((query, text_query), (key, text_key), (value, text_value))
    )
    visible = attention_mask.bool()
    mask = torch.cat([torch.ones_like(hidden_states[..., 0], dtype=torch.bool), visible], dim=1)
    found = nn.functional.scaled_dot_product_attention(queries, keys, values, attn_mask=mask[:, None, None, :])
    picture, text = (
        found.transpose(1, 2).flatten(2, 3).split((hidden_states.shape[1], encoder_hidden_states.shape[1]), dim=1)
    )
    text = text * visible[..., None].to(text.dtype)
    return self.to_out[1](self.to_out[0](picture)), self.to_add_out(text) if hasattr(self, "to_add_out") else text


def lumina_2(
    self: Any,
    hidden_states: Tensor,
    timestep: Tensor,
    encoder_hidden_states: Tensor,
    encoder_attention_mask: Tensor,
    attention_kwargs: Any = None,
    return_dict: bool = True,
) -> tuple[Tensor]:
    """`Lumina2Transformer2DModel.forward` with padded text hidden by a mask, where each sample's picture is moved up to its text.

    Attention does not depend on the order of its keys, and the rotary positions are the same: text is at (i, 0, 0), the picture
    at (length of the text, row, column). The tables of rotations are rounded from float64 to float32, which engines compute in.
    """
    size, (batch, channels, height, width) = self.config.patch_size, hidden_states.shape
    rows, columns, length = height // size, width // size, encoder_hidden_states.shape[1]
    temb, text = self.time_caption_embed(hidden_states, timestep, encoder_hidden_states)
    patches = hidden_states.view(batch, channels, rows, size, columns, size).permute(0, 2, 4, 3, 5, 1)
    picture = self.x_embedder(patches.flatten(3).flatten(1, 2))

    tables = [torch.view_as_real(table).float() for table in self.rope_embedder.freqs_cis]
    row, column = (axis.flatten() for axis in torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"))
    after = tables[0][encoder_attention_mask.sum(1)][:, None].expand(-1, rows * columns, -1, -1)
    grid = torch.cat([tables[1][row], tables[2][column]], dim=1)[None].expand(batch, -1, -1, -1)
    start = torch.zeros(length, dtype=torch.int64)
    words = torch.cat([tables[0][:length], tables[1][start], tables[2][start]], dim=1)[None].expand(batch, -1, -1, -1)
    pairs = words, torch.cat([after, grid], dim=2)

    for layer in self.context_refiner:
        text = layer(text, encoder_attention_mask, torch.view_as_complex(pairs[0].contiguous()))
    for layer in self.noise_refiner:
        picture = layer(picture, None, torch.view_as_complex(pairs[1]), temb)
    joint, rotation = torch.cat([text, picture], dim=1), torch.view_as_complex(torch.cat(pairs, dim=1))
    mask = torch.cat([encoder_attention_mask.bool(), torch.ones_like(picture[..., 0], dtype=torch.bool)], dim=1)
    for layer in self.layers:
        joint = layer(joint, mask, rotation, temb)
    made = self.norm_out(joint[:, length:], temb).reshape(batch, rows, columns, size, size, self.out_channels)
    return (made.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3),)


def hunyuan_video_15(
    self: Any,
    hidden_states: Tensor,
    timestep: Tensor,
    encoder_hidden_states: Tensor,
    encoder_attention_mask: Tensor,
    encoder_hidden_states_2: Tensor,
    encoder_attention_mask_2: Tensor,
    image_embeds: Tensor,
    timestep_r: Tensor | None = None,
    attention_kwargs: Any = None,
    return_dict: bool = True,
) -> tuple[Tensor]:
    """`HunyuanVideo15Transformer3DModel.forward` for text alone, with padded text hidden by a mask where each sample's is moved to the end.

    Attention does not depend on the order of its keys, and text has no positions. Without a picture (`image_embeds` are zeros) its
    tokens are hidden as well: they are left out.
    """
    size, depth, (batch, _, frames, height, width) = (
        self.config.patch_size,
        self.config.patch_size_t,
        hidden_states.shape,
    )
    rotary, temb = self.rope(hidden_states), self.time_embed(timestep, timestep_r=timestep_r)
    picture = self.x_embedder(hidden_states)
    words = (
        self.context_embedder(encoder_hidden_states, timestep, encoder_attention_mask) + self.cond_type_embed.weight[0]
    )
    letters = self.context_embedder_2(encoder_hidden_states_2) + self.cond_type_embed.weight[1]
    mask = torch.cat([encoder_attention_mask_2, encoder_attention_mask], dim=1).bool()
    text = torch.cat([letters, words], dim=1).masked_fill(~mask[..., None], 0.0)
    for block in self.transformer_blocks:
        picture, text = block(picture, text, temb, mask, rotary)
        text = text.masked_fill(~mask[..., None], 0.0)  # what sees nothing is nothing in torch, and no number in ONNX
    made = self.proj_out(self.norm_out(picture, temb))
    made = made.reshape(batch, frames // depth, height // size, width // size, -1, depth, size, size)
    return (made.permute(0, 4, 1, 5, 2, 6, 3, 7).flatten(6, 7).flatten(4, 5).flatten(2, 3),)


@dataclass(frozen=True)
class Replacement:
    """What stands in for `forward` while a class is traced."""

    forward: Callable[..., Any]
    rounds: bool = False
    """Values may be rounded otherwise."""


REPLACEMENTS = {
    "ChromaCombinedTimestepTextProjEmbeddings": Replacement(chroma_timestep),
    "MochiAttention": Replacement(mochi_attention, rounds=True),
    "Lumina2Transformer2DModel": Replacement(lumina_2, rounds=True),
    "HunyuanVideo15Transformer3DModel": Replacement(hunyuan_video_15, rounds=True),
}
"""By the class of diffusers."""


@contextlib.contextmanager
def replaced(model: nn.Module) -> Iterator[bool]:
    """While it lasts, the model and its submodules of the classes in `REPLACEMENTS` run what stands there; whether it rounds otherwise."""
    parts = {part: REPLACEMENTS[name] for part in model.modules() if (name := type(part).__name__) in REPLACEMENTS}
    for part, replacement in parts.items():
        part.forward = types.MethodType(replacement.forward, part)  # type: ignore[method-assign]
    try:
        yield any(replacement.rounds for replacement in parts.values())
    finally:
        for part in parts:
            del part.forward
