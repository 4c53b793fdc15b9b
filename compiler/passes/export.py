"""Pass `export`: a prepared model → the ONNX files of its trunk, text encoders and decoder, and what the manifest says
of them.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from otcache.schemas import manifest as schema
from otcache.schemas.shapes import Symbol

from ..export.at_sizes import decoder_at, encoders_at, trunk_at
from ..export.onnx_stages import (
    NONE,
    ExportedStage,
    OtherSizes,
    TensorInfo,
    end_to_end_error,
    export_module,
    export_stages,
)
from ..export.precision import Served, stages_in
from ..export.text_encoders import Encoders
from ..graph.dimensions import SpecialisedError
from ..graph.stages import Stages, run_in_turn
from ..sizes.served import Sizes
from ..sizes.symbols import SymbolBook
from .session import Session

ENGINES = "engines/onnx"
EXPORTS = ("export", "export-text", "export-decoder")
"""What is exported and kept one by one: the transformer's stages, text encoders with tokenizers, decoder."""
DESCRIPTION = "stages.json"
"""Beside exported stages in the workspace."""


@dataclass(frozen=True, kw_only=True)
class Exported:
    """Files of the artifact's stages in folders of the workspace, and what the manifest says of them."""

    folders: list[Path]
    """Each beside its files with a `DESCRIPTION`, which is no part of the artifact."""
    stages: list[schema.Stage]
    max_relative_error: float
    """Of embed, blocks and head one after the other, against torch."""
    tokenizers: list[schema.Tokenizer]
    symbols: list[Symbol]
    """Of all dimensions that follow a request's size."""
    decoded_as: Literal["latents", "noise"]


@dataclass(frozen=True, kw_only=True)
class Exportable:
    """A model on the CPU in float32, cut: what engines are exported from, whatever device the calibration was on."""

    session: Session
    stages: Stages
    sizes: Sizes
    """Those of the session's that the stages take."""
    example: dict[str, Tensor]
    """Inputs of the transformer at the own size, with a batch of 2 · branches."""

    @property
    def inputs(self) -> dict[str, Tensor]:
        """Inputs of the float32 stages at the own size, constants of the size among them."""
        return {**self.example, **self.sizes.constants_at(0)}


def serve_trunk(source: Exportable) -> Served:
    """The transformer as it is exported: as it was cut, or in the artifact's own dtype."""
    session, sizes = source.session, source.sizes
    if session.options.dtype == "float32":
        elsewhere = tuple(sizes.inputs())
        return Served(stages=source.stages, example=source.inputs, elsewhere=elsewhere, dtype=torch.float32, kept=())
    dtype, scratch = getattr(torch, session.options.dtype), session.workspace.folder
    return stages_in(dtype, session.model.transformer, session.interface, source.inputs, sizes, scratch)


def export_parts(source: Exportable, trunk_of: Callable[[], Served]) -> Exported:
    """Export the trunk, text encoders and decoder to ONNX, each checked against torch at every size.

    Args:
        source: the model.
        trunk_of: `serve_trunk`, asked only where the trunk is not in the workspace.
    """
    session, sizes = source.session, source.sizes
    encoders = session.encoders
    encoders_there, text_sizes = encoders_at(session.model.pipeline if encoders is not None else None, sizes)
    parts: dict[str, Callable[[Path], None]] = {"export": partial(_export_trunk, source, trunk_of)}
    if encoders is not None:
        parts["export-text"] = partial(_export_text, source, encoders, text_sizes)
    if session.decoder is not None:
        parts["export-decoder"] = partial(_export_decoder, source, session.decoder)
    folders = [session.workspace.tree(name, export_key(session, name), compute) for name, compute in parts.items()]
    written = [json.loads((folder / DESCRIPTION).read_text(encoding="utf-8")) for folder in folders]
    found = [schema.Stage.model_validate(value) for part in written for value in part["stages"]]
    tokenizers = [
        schema.Tokenizer(
            input_name=value.input_name,
            path=f"tokenizers/{value.input_name}.json",
            length=value.length,
            pad_id=value.pad_id,
            template=value.template,
            steps=value.steps,
            length_symbol=_length_symbol([each.tokenizers[position].length for each in encoders_there], sizes),
        )
        for position, value in enumerate(encoders.tokenizers if encoders else ())
    ]
    symbols = {value["name"]: Symbol.model_validate(value) for part in written for value in part["symbols"]}
    as_noise = bool(found[-1].inputs[0].symbols) and found[-1].kind == "decoder"
    return Exported(
        folders=folders,
        stages=found,
        max_relative_error=written[0]["chain"],
        tokenizers=tokenizers,
        symbols=list(symbols.values()),
        decoded_as="noise" if as_noise else "latents",
    )


def _export_trunk(source: Exportable, trunk_of: Callable[[], Served], folder: Path) -> None:
    """Embed, blocks and head, one by one and one after the other."""
    session, stages, sizes = source.session, source.stages, source.sizes
    session.model.give_back()  # what the searches have read
    with session.reporter.on("export", f"{len(stages.stages)} stages of the transformer") as advance:
        served = trunk_of()
        others = replace(trunk_at(sizes), inputs=served.elsewhere)
        written = list(export_stages(served.stages, served.example, folder / ENGINES, progress=advance, others=others))
        expected = run_in_turn(stages, source.inputs)[stages.output]
        chain = end_to_end_error(written, served.example, expected)
        _describe(folder, written, sizes.book, chain)


def _export_text(source: Exportable, encoders: Encoders, text_sizes: OtherSizes, folder: Path) -> None:
    """Text encoders, with their tokenizers' files."""
    (folder / "tokenizers").mkdir()
    for specification in encoders.tokenizers:
        path = folder / "tokenizers" / f"{specification.input_name}.json"
        path.write_text(specification.tokenizer_json, encoding="utf-8")
    path = folder / ENGINES / "text_encoder.onnx"
    with source.session.reporter.on("export", "text encoders"):
        written = export_module(
            encoders.module, encoders.example, encoders.output_names, path, kind="text_encoder", others=text_sizes
        )
        _describe(folder, [written], source.sizes.book)


def _export_decoder(source: Exportable, decoder: torch.nn.Module, folder: Path) -> None:
    """The decoder, for all sizes where it can follow them, else for its own."""
    session, sizes = source.session, source.sizes
    path = folder / ENGINES / "vae_decoder.onnx"
    general, others = decoder_at(session.model.pipeline, sizes) if sizes.pictures > 1 else (None, NONE)
    with session.reporter.on("export", "decoder"):
        if general is not None:
            with contextlib.suppress(SpecialisedError):
                example = dict(others.inputs[0])
                written = export_module(general, example, ("images",), path, kind="decoder", others=others)
                _describe(folder, [written], sizes.book)
                return
        if sizes.pictures > 1:
            session.reporter.note("the decoder knows one size: other sizes give latents")
        written = export_module(decoder, session.decoder_example, ("images",), path, kind="decoder")
        _describe(folder, [written], sizes.book)


def _length_symbol(lengths: Sequence[int], sizes: Sizes) -> str | None:
    symbol = sizes.book.of(lengths, "a tokenizer's length") if lengths else None
    return symbol.name if symbol else None


def export_key(session: Session, name: str) -> Any:
    """What exported stages (one of `EXPORTS`) depend on, for the workspace."""
    dtype = session.options.dtype if name == EXPORTS[0] else "float32"
    return [session.key, session.call.height, session.call.width, dtype, repr(session.wanted)]


def _describe(folder: Path, written: Sequence[ExportedStage], book: SymbolBook, chain: float | None = None) -> None:
    """Write what the manifest says of exported stages; `chain` is the error of all of them one after the other."""
    value = {
        "stages": [stage_fields(stage) for stage in written],
        "chain": chain,
        "symbols": [symbol.model_dump() for symbol in book.symbols],
    }
    (folder / DESCRIPTION).write_text(json.dumps(value), encoding="utf-8")


def stage_fields(stage: ExportedStage) -> dict[str, Any]:
    """What the manifest says of an exported stage."""
    return {
        "name": stage.name,
        "kind": stage.kind,
        "onnx": f"{ENGINES}/{stage.path.name}",
        "max_relative_error": stage.max_relative_error,
        "inputs": _tensors(stage.inputs),
        "outputs": _tensors(stage.outputs),
    }


def _tensors(tensors: Sequence[TensorInfo]) -> list[dict[str, Any]]:
    return [
        {"name": tensor.name, "dtype": tensor.dtype, "shape": list(tensor.shape), "symbols": list(tensor.symbols)}
        for tensor in tensors
    ]
