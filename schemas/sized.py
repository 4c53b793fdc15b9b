"""An artifact's manifest for another size than its own (`manifest_at`), so that readers know fixed shapes only.

What a request's size changes: dimensions that follow symbols, the layout of the noise, lengths of tokens, `conditions`,
and where a listed size has programs of its own, those. A decoder or text encoder that is fixed to the artifact's own
size is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar, get_args

from . import consistency
from .shapes import AxisName, Request, Symbols, corners, describe_size
from .structure import Latents, ServedSize, Shapes, Stage, Structure, TensorInfo

M = TypeVar("M", bound=Structure)
"""The kind of manifest that goes in comes out."""

Shape = tuple[Any, ...]


def own_size(manifest: Structure) -> dict[AxisName, int]:
    """The size that the artifact was compiled at, on the axes that it has."""
    axes = manifest.shapes.axes if manifest.shapes else ()
    return {axis.name: getattr(manifest.conditions, axis.name) for axis in axes}


def whole_size(manifest: Structure) -> dict[AxisName, int]:
    """The size in a manifest's conditions, axes that stay among them."""
    names: tuple[AxisName, ...] = get_args(AxisName)
    return {name: size for name in names if (size := getattr(manifest.conditions, name)) is not None}


def served_size(manifest: Structure, request: Request) -> ServedSize | None:
    """The entry of the listed sizes that a request is for."""
    listed = manifest.shapes.sizes if manifest.shapes else ()
    return next((entry for entry in listed if all(request[name] == value for name, value in entry.size.items())), None)


def manifest_at(manifest: M, request: Request) -> M:
    """The manifest as it would be had the artifact been compiled for `request`, a value for each axis.

    Raises ValueError where shapes do not fit together at that size.
    """
    shapes = manifest.shapes
    if shapes is None:
        return manifest
    sizes = {symbol.name: symbol.size(request) for symbol in shapes.symbols}
    entry = served_size(manifest, request)
    found = manifest.model_copy(
        update={
            "conditions": manifest.conditions.model_copy(update={str(name): value for name, value in request.items()}),
            "latents": _latents(manifest.latents, sizes),
            "stages": tuple(_stage(stage, sizes) for stage in manifest.stages),
            "tokenizers": tuple(
                entry.model_copy(update={"length": sizes[entry.length_symbol]}) if entry.length_symbol else entry
                for entry in manifest.tokenizers
            ),
            "programs": entry.programs if entry and entry.programs else manifest.programs,
        }
    )
    if dict(request) != own_size(manifest):
        found = _without_fixed(found)
    consistency.check_wiring(found)
    return found


def _without_fixed(manifest: M) -> M:
    """Without the decoder and text encoder where they do not follow to this size."""
    dropped, tokenizers = set(), manifest.tokenizers
    try:
        consistency.check_decoder(manifest)
    except ValueError:
        dropped.add("decoder")
    try:
        consistency.check_encoder(manifest)
    except ValueError:
        dropped.add("text_encoder")
        tokenizers = ()
    if not dropped:
        return manifest
    stages = tuple(stage for stage in manifest.stages if stage.kind not in dropped)
    return manifest.model_copy(update={"stages": stages, "tokenizers": tokenizers})


def _latents(latents: Latents, sizes: Mapping[str, int]) -> Latents:
    changed = {
        "noise_shape": _shape(latents.noise_shape, latents.noise_symbols, sizes),
        "split": _shape(latents.split, latents.split_symbols, sizes),
        "shape": _shape(latents.shape, latents.shape_symbols, sizes),
    }
    return type(latents).model_validate({**dict(latents), **changed})


def _stage(stage: Stage, sizes: Mapping[str, int]) -> Stage:
    sides = {side: tuple(tensor_at(tensor, sizes) for tensor in getattr(stage, side)) for side in ("inputs", "outputs")}
    return stage.model_copy(update=sides)


def tensor_at(tensor: TensorInfo, sizes: Mapping[str, int]) -> TensorInfo:
    """The tensor where its symbols have these sizes. Raises ValueError for one that is missing."""
    return tensor.model_copy(update={"shape": _shape(tensor.shape, tensor.symbols, sizes)})


def _shape(shape: Shape, symbols: Symbols, sizes: Mapping[str, int]) -> Shape:
    if not symbols:
        return shape
    if len(symbols) != len(shape) or any(name is not None and name not in sizes for name in symbols):
        raise ValueError(
            f"a shape {shape} has symbols {symbols}: expected one of {sorted(sizes)} or none for each dimension"
        )
    return tuple(size if name is None else sizes[name] for size, name in zip(shape, symbols, strict=True))


def check_shapes(manifest: Structure) -> None:
    """Check that dimensions follow from every size that is served, among them the artifact's own, and fit together."""
    shapes, own = manifest.shapes, own_size(manifest)
    if shapes is None:
        if any(tensor.symbols for stage in manifest.stages for tensor in (*stage.inputs, *stage.outputs)):
            raise ValueError("stages: dimensions follow symbols, but there are no shapes")
        return
    for what, names in (("axes", [axis.name for axis in shapes.axes]), ("symbols", [s.name for s in shapes.symbols])):
        if len(set(names)) != len(names):
            raise ValueError(f"shapes.{what}: two have the same name")
    for axis in shapes.axes:
        if own[axis.name] is None or own[axis.name] not in axis:
            raise ValueError(f"shapes.axes: {axis.name} is {own[axis.name]} in conditions: expected {axis}")
    for symbol in shapes.symbols:
        if odd := {axis for term in symbol.terms for axis in term.axes} - set(own):
            raise ValueError(f"shapes.symbols: {symbol.name} follows {min(odd)}, which is no axis")
    same = manifest_at(manifest, own)
    if (same.latents, same.stages, same.tokenizers) != (manifest.latents, manifest.stages, manifest.tokenizers):
        raise ValueError(f"shapes: dimensions at {describe_size(own)} are not those of the artifact: compile it again")
    if not shapes.sizes:
        if shapes.constants:
            raise ValueError("shapes.constants: there are no sizes that they belong to")
        for corner in corners(shapes.axes):
            manifest_at(manifest, corner)
    else:
        _check_sizes(manifest, shapes, own)


def _check_sizes(manifest: Structure, shapes: Shapes, own: Request) -> None:
    """Check of sizes that are listed one by one that each is within the ranges, with its constants' files.

    Whether dimensions fit together there is checked when one is served: there can be a thousand.
    """
    axes = {axis.name: axis for axis in shapes.axes}
    held = {tensor.name: tensor for tensor in manifest.steady_inputs}
    if odd := sorted(set(shapes.constants) - set(held)):
        raise ValueError(f"shapes.constants: {odd[0]} is no input of the model that stays for all steps")
    seen = set()
    for entry in shapes.sizes:
        if set(entry.size) != set(axes) or any(value not in axes[name] for name, value in entry.size.items()):
            raise ValueError(f"shapes.sizes: {describe_size(entry.size)} is not within the ranges of {', '.join(axes)}")
        if set(entry.constants) != set(shapes.constants):
            raise ValueError(f"shapes.sizes: {describe_size(entry.size)} has other constants than {shapes.constants}")
        seen.add(describe_size(entry.size))
    if len(seen) != len(shapes.sizes) or served_size(manifest, own) is None:
        raise ValueError("shapes.sizes: expected each size once, and the artifact's own among them")
