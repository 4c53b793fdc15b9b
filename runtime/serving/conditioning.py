"""Conditioning from a file: what `otc encode` made of prompts on a host with torch. Reads safetensors with numpy alone.

The file is from outside, so it is read as the format's specification says, in this order: size, length of the header,
JSON without duplicate keys, types and shapes, and offsets that cover the data exactly once without a gap.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from otcache.schemas.errors import ArtifactError, RequestError
from otcache.schemas.manifest import Manifest
from otcache.schemas.messages import one_line
from otcache.schemas.strict_json import parse_object

from ..loop.backend import Array

MAX_BYTES = 1 << 32
MAX_HEADER_BYTES = 1 << 20
DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "I64": np.int64,
    "I32": np.int32,
    "BOOL": np.bool_,
    "BF16": np.uint16,
}
"""Types by their names in the format; `BF16` is read as its bits and widened to float32."""


def read_conditioning(path: Path, manifest: Manifest) -> dict[str, Array]:
    """The tensors that the artifact takes, each (branches, n, …), as `Sampler.sample` takes them. Raises RequestError.

    Tensors that the artifact does not take are left out: `otc encode` writes what the pipeline passes, used or not.
    """
    tensors = _read(path)
    wanted = [tensor.name for tensor in manifest.conditioning]
    missing = [name for name in wanted if name not in tensors or tensors[name].ndim < 2]
    if missing:
        raise _refused(path, f"{sorted(tensors)}", f"{missing[0]} of shape (branches, n, …) among them")
    return {name: tensors[name] for name in wanted}


def _read(path: Path) -> dict[str, Array]:
    """All tensors of the file."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise _refused(path, f"{path.stat().st_size} bytes", f"at most {MAX_BYTES}")
        data = path.read_bytes()
    except OSError as error:
        raise _refused(path, error.strerror or error, "a file that can be read") from None
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > min(MAX_HEADER_BYTES, len(data) - 8):
        raise _refused(path, f"a header of {length} bytes", "a safetensors file")
    try:
        header = parse_object(data[8 : 8 + length], str(path))
    except ArtifactError as error:
        raise _refused(path, error, "a safetensors file") from None
    header.pop("__metadata__", None)
    body, end, tensors = memoryview(data)[8 + length :], 0, {}
    for name, entry in sorted(header.items(), key=lambda item: _start(item[1])):
        tensors[name], end = _tensor(path, name, entry, body, end)
    if end != len(body):
        raise _refused(path, f"{len(body)} bytes of data", f"{end}")
    return tensors


def _start(entry: Any) -> int:
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    return offsets[0] if isinstance(offsets, list) and offsets and isinstance(offsets[0], int) else -1


def _tensor(path: Path, name: str, entry: Any, body: memoryview, end: int) -> tuple[Array, int]:
    """The tensor whose data begin at `end`, and where they end."""
    fields: dict[str, Any] = entry if isinstance(entry, dict) else {}
    shape, kind, offsets = fields.get("shape"), fields.get("dtype"), fields.get("data_offsets")
    known = DTYPES.get(kind) if isinstance(kind, str) else None
    plain = isinstance(shape, list) and len(shape) <= 8
    if known is None or not plain or not all(type(size) is int and 0 <= size < 1 << 32 for size in shape or ()):
        raise _refused(path, f"{name} of type {kind!r} and shape {shape!r}", f"one of {', '.join(DTYPES)}")
    dtype, shape = np.dtype(known), tuple(shape or ())
    size = math.prod(shape) * dtype.itemsize
    if offsets != [end, end + size] or end + size > len(body):
        raise _refused(path, f"{name} at {offsets!r}", f"[{end}, {end + size}]")
    array = np.frombuffer(body[end : end + size], dtype.newbyteorder("<")).reshape(shape)
    if kind == "BF16":
        array = (array.astype(np.uint32) << 16).view(np.float32)
    return array, end + size


def _refused(path: Path, found: object, expected: str) -> RequestError:
    return RequestError(
        f"--conditioning {one_line(path)}: found {one_line(found, 200)}: expected {expected}: make it again with otc encode"
    )
