"""Weights that are stored in another dtype than they are loaded in: a copy of the model's folder that diffusers maps.

diffusers casts such weights into memory of their own, all of them. Here they are cast one by one into files, from which
they are loaded as any (`mapped`). The values are the same.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ..workspace.disk import locked_part_folder, name_full_disk, remove_leftovers
from ..workspace.workspace import ELSEWHERE, make_folder
from .files import WEIGHTS, files_in, weight_files
from .mapped_weights import give_back_all

_STORED = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NAMES = {dtype: name for name, dtype in _STORED.items()}


@contextlib.contextmanager
def recast_folder(folder: Path, dtype: torch.dtype, scratch: Path) -> Iterator[Path]:
    """A folder whose safetensors files are in `dtype`: the folder itself, or a copy in `scratch` that is removed
    afterwards.

    What was mapped from the copy stays readable. Outside Linux, where nothing is given back, it is the folder itself.
    Raises HostError for a scratch folder that nothing can be written to.
    """
    others = {path for path in weight_files(folder) if _dtypes(path) - {dtype}}
    if not others or not sys.platform.startswith("linux"):
        yield folder
        return
    name = folder.resolve().name
    make_folder(scratch)
    remove_leftovers(scratch, re.escape(name))
    with name_full_disk(scratch, ELSEWHERE), locked_part_folder(scratch / name) as made:
        for path in files_in(folder):
            target = made / name / path.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            if path in others:
                _cast(path, target, dtype)
            elif path.suffix == WEIGHTS:
                target.symlink_to(path.resolve())
            else:
                shutil.copyfile(path, target)
        yield made / name


def _dtypes(path: Path) -> set[torch.dtype]:
    """Of a file's floating-point tensors."""
    with safe_open(path, "pt") as file:
        found = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 (it is no dict)
    return {_STORED[name] for name in found if name in _STORED}


def _cast(source: Path, target: Path, dtype: torch.dtype) -> None:
    """Write a safetensors file with its floating-point tensors in `dtype`, one after the other."""
    header: dict[str, Any] = {}
    end = 0
    with safe_open(source, "pt") as file, open(target, "wb") as out:
        names = list(file.keys())
        for name in names:
            stored, shape = file.get_slice(name).get_dtype(), file.get_slice(name).get_shape()
            size = math.prod(shape) * (dtype if stored in _STORED else file.get_tensor(name).dtype).itemsize
            kind = _NAMES[dtype] if stored in _STORED else stored
            header[name] = {"dtype": kind, "shape": shape, "data_offsets": [end, end + size]}
            end += size
        text = json.dumps({"__metadata__": file.metadata() or {}, **header}).encode()
        text += b" " * (-len(text) % 8)
        out.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            tensor = file.get_tensor(name)
            made = tensor.to(dtype) if tensor.is_floating_point() else tensor
            out.write(made.contiguous().reshape(-1).view(torch.uint8).numpy().data)
            give_back_all([tensor])
        out.flush()
        os.fsync(out.fileno())  # what is not on the disk cannot be given back
