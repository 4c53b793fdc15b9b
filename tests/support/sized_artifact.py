"""The small artifact for several sizes: its graphs take any number of tokens, and here say so."""

from __future__ import annotations

import onnx
from small_artifact import TOKENS, WIDTH, read_manifest, write_manifest

from otcache.schemas.digest import digest_of_bytes


def term(factor, *axes):
    return {"factor": factor, "axes": list(axes)}


def shapes(**changes):
    return {
        "axes": [
            {"name": "height", "minimum": 2, "maximum": 12, "step": 2},
            {"name": "width", "minimum": 4, "maximum": 8, "step": 4},
        ],
        "symbols": [
            {"name": "tokens", "terms": [term(1, "height", "width")], "divisor": 4},
            {"name": "rows", "terms": [term(1, "height")], "divisor": 2},
            {"name": "columns", "terms": [term(1, "width")], "divisor": 2},
            {"name": "h", "terms": [term(1, "height")], "divisor": 1},
            {"name": "w", "terms": [term(1, "width")], "divisor": 1},
        ],
        **changes,
    }


LATENTS = {
    "noise_symbols": [None, "h", "w"],
    "split_symbols": [None, "rows", None, "columns", None],
    "shape_symbols": ["tokens", None],
}


def with_sizes(folder, value=None):
    """The small artifact, whose graphs of embed, blocks and head take any number of tokens, made to say so."""
    manifest = read_manifest(folder)
    manifest["shapes"] = shapes() if value is None else value
    manifest["latents"] |= LATENTS
    for stage in manifest["stages"]:
        for tensor in (*stage["inputs"], *stage["outputs"]):
            if tensor["shape"] == ["batch", TOKENS, WIDTH] and stage["kind"] != "decoder":
                tensor["symbols"] = [None, "tokens", None]
        if stage["kind"] in ("embed", "block", "head"):
            _take_any_number(folder, stage["onnx"], manifest)
    write_manifest(folder, manifest)
    return folder


def _take_any_number(folder, path, manifest):
    """Declare the tokens in an ONNX file as a symbol."""
    model = onnx.load(folder / path)
    for value in (*model.graph.input, *model.graph.output):
        if len(value.type.tensor_type.shape.dim) == 3:
            value.type.tensor_type.shape.dim[1].dim_param = "tokens"
    data = model.SerializeToString()
    (folder / path).write_bytes(data)
    entry = next(entry for entry in manifest["files"] if entry["path"] == path)
    entry |= {"size_bytes": len(data), "digest": digest_of_bytes(data)}


def listed(folder, programs=()):
    """For 4x4 and 8x4 alone, the latter with programs of its own if there are any."""
    sizes = [{"size": {"height": 4, "width": 4}}, {"size": {"height": 8, "width": 4}, "programs": list(programs)}]
    axes = [
        {"name": "height", "minimum": 4, "maximum": 8, "step": 4},
        {"name": "width", "minimum": 4, "maximum": 4, "step": 1},
    ]
    return with_sizes(folder, shapes(axes=axes, sizes=sizes))
