"""Conditioning from a file: what `otc encode` made of prompts on a host with torch.

The file is from outside. Its size, the length of its header and the header's JSON (no duplicate keys) are checked here;
safetensors then checks types, shapes and that offsets cover the data exactly once without a gap. It holds numbers only:
nothing in it is executed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
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
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "BOOL": np.bool_,
}
"""Types by their names in the format."""


def read_conditioning(path: Path, manifest: Manifest) -> dict[str, Array]:
    """The tensors that the artifact takes, each (branches, n, …), as `Sampler.sample` takes them. Raises RequestError.

    Tensors that the artifact does not take are left out: `otc encode` writes what the pipeline passes, used or not.
    bfloat16 is widened to float32.
    """
    tensors = _read(path)
    wanted = [tensor.name for tensor in manifest.conditioning]
    missing = [name for name in wanted if name not in tensors or tensors[name].ndim < 2]
    if missing:
        raise _refusal(path, f"{sorted(tensors)}", f"{missing[0]} of shape (branches, n, …) among them")
    return {name: tensors[name] for name in wanted}


def _read(path: Path) -> dict[str, Array]:
    """All tensors of the file."""
    from safetensors import SafetensorError, deserialize

    data = _read_bytes(path)
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > min(MAX_HEADER_BYTES, len(data) - 8):
        raise _refusal(path, f"a header of {length} bytes", "a safetensors file")
    try:
        parse_object(data[8 : 8 + length], str(path))
        entries = deserialize(data)
    except (ArtifactError, SafetensorError) as error:
        raise _refusal(path, error, "a safetensors file") from None
    return {name: _array_from_entry(path, name, entry) for name, entry in entries}


def _read_bytes(path: Path) -> bytes:
    try:
        size_bytes = path.stat().st_size
        if size_bytes > MAX_BYTES:
            raise _refusal(path, f"{size_bytes} bytes", f"at most {MAX_BYTES}")
        return path.read_bytes()
    except OSError as error:
        raise _refusal(path, error.strerror or error, "a file that can be read") from None


def _array_from_entry(path: Path, name: str, entry: dict[str, Any]) -> Array:
    """A tensor, from its type, its shape and its bytes."""
    dtype = DTYPES.get(entry["dtype"])
    if dtype is None:
        raise _refusal(path, f"{name} of type {entry['dtype']}", f"one of {', '.join(DTYPES)}")
    array = np.frombuffer(entry["data"], np.dtype(dtype).newbyteorder("<")).reshape(entry["shape"])
    return array.astype(np.float32) if dtype is ml_dtypes.bfloat16 else array


def _refusal(path: Path, found: object, expected: str) -> RequestError:
    return RequestError(
        f"--conditioning {one_line(path)}: found {one_line(found, 200)}: expected {expected}: make it again with otc "
        "encode"
    )
