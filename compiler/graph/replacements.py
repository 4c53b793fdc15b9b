"""Replacements: equal forms of Python in a model's class that cannot be traced. Pass `cut` alone applies them.

Each stands in for the `forward` of one class of diffusers while it is traced, takes what that takes, and is proven
where it is applied: `cut` compares the stages with the model as it was, bit for bit or, where values may be rounded
otherwise, to their last places.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..pipelines.arguments import Samples


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

    The padding follows the text, as Mochi's tokenizer makes it; what the processor fills up with zeros is zero here
    too.
    """
    cos, sin = image_rotary_emb

    def split(value: Tensor) -> Tensor:
        return value.unflatten(2, (self.heads, -1))

    def rotate(value: Tensor) -> Tensor:
        even, odd = value[..., 0::2].float(), value[..., 1::2].float()
        pairs = (even * cos - odd * sin).to(value.dtype), (even * sin + odd * cos).to(value.dtype)
        return torch.stack(pairs, dim=-1).flatten(-2)

    query = rotate(self.norm_q(split(self.to_q(hidden_states))))
    key = rotate(self.norm_k(split(self.to_k(hidden_states))))
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
    """`Lumina2Transformer2DModel.forward` with padded text hidden by a mask, where each sample's picture is moved up to
    its text.

    Attention does not depend on the order of its keys, and the rotary positions are the same: text is at (i, 0, 0), the
    picture at (length of the text, row, column). The tables of rotations are rounded from float64 to float32, which
    engines compute in.
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
    """`HunyuanVideo15Transformer3DModel.forward` for text alone, with padded text hidden by a mask where each sample's
    is moved to the end.

    Attention does not depend on the order of its keys, and text has no positions. Without a picture (`image_embeds` are
    zeros) its tokens are hidden as well: they are left out.
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


def z_image(
    self: Any,
    x: Samples,
    t: Tensor,
    cap_feats: Samples,
    return_dict: bool = True,
    joint_attention_kwargs: Any = None,
    patch_size: int = 2,
    f_patch_size: int = 1,
) -> tuple[Tensor]:
    """`ZImageTransformer2DModel.forward` for text alone, on all samples at once, where it goes through lists of them.

    Tokens of pictures and of captions are followed by learned ones up to a multiple of 32: here up to the next of the
    longest, or, where the length is symbolic, by as many as there can be; those that a sample does not have are hidden
    by a mask. Attention does not depend on the order of its keys; captions are at (1 + i, 0, 0), the picture behind,
    padding of pictures at (0, 0, 0).
    """
    (batch, channels, frames, height, width), size, depth = x.rows.shape, patch_size, f_patch_size
    grid = frames // depth, height // size, width // size
    count, length = grid[0] * grid[1] * grid[2], cap_feats.rows.shape[1]
    pads, text_pads = _padding(count), _padding(length)
    temb = self.t_embedder(t * self.t_scale).type_as(x.rows)

    patches = x.rows.reshape(batch, channels, grid[0], depth, grid[1], size, grid[2], size)
    patches = patches.permute(0, 2, 4, 6, 3, 5, 7, 1).flatten(4).flatten(1, 3)
    learned = self.x_pad_token.expand(batch, pads, -1)
    picture = torch.cat([self.all_x_embedder[f"{size}-{depth}"](patches), learned], dim=1)
    seen = torch.arange(count + pads) < count + (-count) % MULTIPLE
    seen = seen.expand(batch, -1)

    words, padded, read = _z_image_captions(self, cap_feats, text_pads)
    turns = _z_image_rotations(self, padded, grid, pads=pads, places=length + text_pads)

    for layer in self.noise_refiner:
        picture = layer(picture, seen, torch.view_as_complex(turns[0]), temb)
    for layer in self.context_refiner:
        words = layer(words, read, torch.view_as_complex(turns[1].contiguous()))
    parts = picture.split((count, pads), dim=1) if pads else (picture,)
    joint, rotation = torch.cat([*parts, words], dim=1), torch.view_as_complex(torch.cat(turns, dim=1))
    mask = torch.cat([seen, read], dim=1)
    for layer in self.layers:
        joint = layer(joint, mask, rotation, temb)
    made = self.all_final_layer[f"{size}-{depth}"](joint[:, :count], c=temb)
    made = made.reshape(batch, *grid, depth, size, size, self.out_channels)
    return (made.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(batch, -1, frames, height, width),)


def _z_image_captions(self: Any, cap_feats: Samples, pads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Embedded captions with learned tokens behind each.

    Args:
        self: the transformer.
        cap_feats: features (batch, length, width), with a mask where captions differ in length.
        pads: how many learned tokens the longest caption may need.

    Returns:
        Tokens (batch, length + pads, dim); the length of each caption with its learned tokens, int64 (batch, 1); which
        tokens are read, bool (batch, length + pads).
    """
    batch, length = cap_feats.rows.shape[:2]
    words = self.cap_embedder(cap_feats.rows)
    given = torch.ones_like(cap_feats.rows[..., 0], dtype=torch.int64) if cap_feats.mask is None else cap_feats.mask
    lengths = given.sum(1)[:, None]
    words = torch.cat([words, self.cap_pad_token.expand(batch, pads, -1)], dim=1)
    place = torch.arange(length + pads)[None]
    words = torch.where((place < lengths)[..., None], words, self.cap_pad_token)
    padded = lengths + (-lengths) % MULTIPLE
    return words, padded, place < padded


def _z_image_rotations(
    self: Any, padded: Tensor, grid: tuple[int, int, int], *, pads: int, places: int
) -> tuple[Tensor, Tensor]:
    """Rotations of picture and caption tokens, as pairs of real numbers float32 (batch, tokens, dim / 2, 2).

    Args:
        self: the transformer, whose tables are made (`z_image_tables`).
        padded: length of each caption with its learned tokens, int64 (batch, 1): the picture stands behind.
        grid: frames, rows and columns of the picture's patches.
        pads: learned tokens behind the picture.
        places: tokens of captions with theirs.
    """
    batch = padded.shape[0]
    tables = [torch.view_as_real(table) for table in self.rope_embedder.freqs_cis]
    axes = [torch.arange(steps) for steps in grid]
    frame, row, column = (axis.flatten() for axis in torch.meshgrid(*axes, indexing="ij"))
    after = tables[0][padded + 1 + frame]
    across = torch.cat([tables[1][row], tables[2][column]], dim=1)[None].expand(batch, -1, -1, -1)
    origin = torch.cat([table[:1] for table in tables], dim=1)[None].expand(batch, pads, -1, -1)
    start = torch.zeros(places, dtype=torch.int64)
    along = torch.cat([tables[0][1 : places + 1], tables[1][start], tables[2][start]], dim=1)
    return torch.cat([torch.cat([after, across], dim=2), origin], dim=1), along[None].expand(batch, -1, -1, -1)


MULTIPLE = 32
"""Tokens of Z-Image's pictures and captions are padded to a multiple of it."""


def _padding(count: int) -> int:
    """Learned tokens behind `count` others; where that is symbolic, the most that there can be.

    >>> _padding(30), _padding(64)
    (2, 0)
    """
    return (-count) % MULTIPLE if isinstance(count, int) else MULTIPLE - 1


def z_image_tables(self: Any) -> None:
    """Make the model's tables of rotations, which its first call makes and a trace must find."""
    self.rope_embedder(torch.zeros(1, len(self.axes_dims), dtype=torch.int32))


@dataclass(frozen=True)
class Replacement:
    """What stands in for `forward` while a class is traced."""

    forward: Callable[..., Any]
    rounds: bool = False
    """Values may be rounded otherwise."""
    prepare: Callable[[Any], None] | None = None
    """Called with the model beforehand, outside of the trace."""


REPLACEMENTS = {
    "ChromaCombinedTimestepTextProjEmbeddings": Replacement(chroma_timestep),
    "MochiAttention": Replacement(mochi_attention, rounds=True),
    "Lumina2Transformer2DModel": Replacement(lumina_2, rounds=True),
    "HunyuanVideo15Transformer3DModel": Replacement(hunyuan_video_15, rounds=True),
    "ZImageTransformer2DModel": Replacement(z_image, rounds=True, prepare=z_image_tables),
}
"""By the class of diffusers."""


@contextlib.contextmanager
def stand_ins(model: nn.Module) -> Iterator[bool]:
    """While it lasts, the model and its submodules of the classes in `REPLACEMENTS` run what stands there.

    Yields whether that may round otherwise.
    """
    parts = {part: REPLACEMENTS[name] for part in model.modules() if (name := type(part).__name__) in REPLACEMENTS}
    for part, replacement in parts.items():
        if replacement.prepare:
            replacement.prepare(part)
        part.forward = types.MethodType(replacement.forward, part)  # type: ignore[method-assign]
    try:
        yield any(replacement.rounds for replacement in parts.values())
    finally:
        for part in parts:
            del part.forward
