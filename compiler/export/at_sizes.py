"""What several sizes mean for an artifact: at which ones its parts are exported, what is stored, what is declared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from otcache.schemas import manifest as schema
from otcache.schemas.arithmetic import noise_from_latents
from otcache.schemas.digest import digest_of_bytes
from otcache.schemas.errors import ModelError
from otcache.schemas.shapes import Symbol, describe_size

from ..pipelines.arguments import tensor_of
from ..pipelines.decode import decode_latents
from ..pipelines.interface import Interface
from ..sizes.served import Seen, Sizes
from .decoder import make_noise_order_decoder, unpacked_shape
from .onnx_stages import OtherSizes
from .text_encoders import Encoders, make_text_encoders


def trunk_at(sizes: Sizes) -> OtherSizes:
    """The sizes at which the trunk's stages are exported."""
    return OtherSizes(book=sizes.book, inputs=tuple(sizes.inputs()), constants=sizes.constants)


def encoders_at(pipeline: Any, sizes: Sizes) -> tuple[list[Encoders], OtherSizes]:
    """The text encoders at each size that was seen, and the sizes at which they are exported."""
    found = [
        encoders
        for seen in sizes.seen
        if (encoders := make_text_encoders(pipeline, seen.call.max_sequence_length or 0))
    ]
    return found, OtherSizes(book=sizes.book, inputs=tuple(encoders.example for encoders in found))


def decoder_at(pipeline: Any, sizes: Sizes) -> tuple[nn.Module | None, OtherSizes]:
    """A decoder for every size that was seen, if there is one, and examples of latents in the order of the noise."""
    examples = []
    for seen in sizes.seen:
        interface, call = seen.interface, seen.call
        latents = torch.randn(2, *interface.latents_shape, generator=torch.Generator().manual_seed(0))
        unpacked = unpacked_shape(pipeline, latents, call.height, call.width)
        arranged = latents if unpacked is None else _as_noise(latents, interface).reshape(2, *unpacked)
        examples.append((arranged, decode_latents(pipeline, call, latents)))
    decoder = (
        make_noise_order_decoder(pipeline, examples) if hasattr(getattr(pipeline, "vae", None), "decode") else None
    )
    return decoder, OtherSizes(book=sizes.book, inputs=tuple({"latents": latents} for latents, _ in examples))


def _as_noise(latents: Tensor, interface: Interface) -> Tensor:
    """Latents (n, …) with their elements in the order in which noise is drawn, (n, elements)."""
    noise: Tensor = noise_from_latents(latents, interface.noise_split, interface.noise_permutation)
    return noise


def constant_files(sizes: Sizes) -> dict[str, bytes]:
    """Path in the artifact → content of every constant at every size that is served."""
    return {
        path: content
        for seen in sizes.served()
        for path, content in (_constant(seen, name) for name in sizes.constants)
    }


def _constant(seen: Seen, name: str) -> tuple[str, bytes]:
    array = tensor_of(seen.interface.held[name]).contiguous().numpy()
    content = array.astype(array.dtype.newbyteorder("<")).tobytes()
    return f"sizes/{name}-{digest_of_bytes(content)[7:19]}.bin", content


def layout_symbols(sizes: Sizes, name: str) -> dict[str, Any]:
    """Say what the manifest's latents follow at other sizes, by the manifest's fields.

    Args:
        sizes: what is served.
        name: of the pipeline, for messages.

    Raises:
        ModelError: noise is arranged otherwise at other sizes.
    """
    layouts = [seen.interface for seen in sizes.seen]
    if len({layout.noise_permutation for layout in layouts}) > 1:
        raise ModelError(f"{name} arranges noise otherwise at other sizes: leave --sizes out")
    if not layouts:
        return {}
    return {
        "noise_symbols": sizes.book.shape([layout.noise_shape for layout in layouts], "the noise's shape"),
        "split_symbols": sizes.book.shape([layout.noise_split for layout in layouts], "the noise's split"),
        "shape_symbols": sizes.book.shape([layout.latents_shape for layout in layouts], "the latents' shape"),
    }


def manifest_shapes(
    sizes: Sizes, symbols: Sequence[Symbol], programs: Mapping[str, list[schema.BudgetProgram]]
) -> schema.Shapes | None:
    """Say what the manifest says of sizes; None where it serves its own alone and nothing was given up.

    Args:
        sizes: what is served.
        symbols: those of all stages.
        programs: of sizes that have their own, by what `described` says of the size.
    """
    if not sizes.wanted.axes and not sizes.fixed:
        return None
    listed = []
    for seen in sizes.served():
        size = {axis.name: seen.point[axis.name] for axis in sizes.wanted.axes}
        constants = {name: _constant(seen, name)[0] for name in sizes.constants}
        own = tuple(programs.get(describe_size(seen.point), ()))
        listed.append(schema.ServedSize(size=size, constants=constants, programs=own))
    return schema.Shapes(
        axes=sizes.wanted.axes,
        symbols=tuple(symbols),
        constants=sizes.constants,
        sizes=tuple(listed),
        fixed=sizes.fixed,
    )
