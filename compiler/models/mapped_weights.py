"""Weights that are mapped from files: given back after use, so that a large model is never in memory whole.

diffusers maps a safetensors file into memory where the weights have the wanted dtype, so that each is read when it is
first touched (`widen` sees to the dtype). Weights that are made rather than loaded are put into files here. Passes
`cut` and `export` touch one module or stage after the other, and give its memory back.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_MADV_PAGEOUT = 21
"""Linux 5.4 (madvise(2)). Pages of a file are dropped, and others stay: unlike MADV_DONTNEED it loses no change."""
_ALIGNMENT = 64
"""Bytes; as an allocator would place a tensor."""


def give_back(module: nn.Module) -> None:
    """Drop the memory of a module's mapped weights; what is touched again is read again.

    Without effect outside Linux.
    """
    give_back_all(module.parameters())


def give_back_all(weights: Iterable[Tensor]) -> None:
    """`give_back`, of weights one by one."""
    if not sys.platform.startswith("linux"):
        return
    advise, page = ctypes.CDLL(None).madvise, mmap.PAGESIZE
    for weight in weights:
        start = -(-weight.data_ptr() // page) * page
        size = (weight.data_ptr() + weight.nbytes - start) // page * page
        if size > 0:
            advise(ctypes.c_void_p(start), ctypes.c_size_t(size), _MADV_PAGEOUT)


@contextlib.contextmanager
def given_back_in_turn(module: nn.Module) -> Iterator[None]:
    """While it lasts, every submodule that is called gives back the memory of its own weights."""

    def after(part: nn.Module, *_: Any) -> None:
        give_back_all(part.parameters(recurse=False))

    parts = (part for part in module.modules() if any(True for _ in part.parameters(recurse=False)))
    handles = [part.register_forward_hook(after) for part in parts]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def in_file(tensors: Iterable[Tensor], folder: Path) -> list[Tensor]:
    """The same tensors, mapped from a file of the folder that has no name and is gone with them.

    They are drawn one by one, so that those which are computed on the way are never in memory together. Changes stay in
    memory.
    """
    folder.mkdir(parents=True, exist_ok=True)
    places: list[tuple[int, torch.dtype, torch.Size]] = []
    with tempfile.TemporaryFile(dir=folder) as file:
        for tensor in tensors:
            places.append((file.tell(), tensor.dtype, tensor.shape))
            file.write(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            file.write(bytes(-file.tell() % _ALIGNMENT))
        file.flush()
        os.fsync(file.fileno())  # what is not on the disk cannot be given back
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) if file.tell() else None
    return [
        torch.frombuffer(mapped, dtype=dtype, count=shape.numel(), offset=start).view(shape)
        if mapped is not None and shape.numel()
        else torch.empty(shape, dtype=dtype)
        for start, dtype, shape in places
    ]


def move_to_file(module: nn.Module, folder: Path) -> None:
    """Put a module's weights into a file (`in_file`), where they were changed in memory."""
    weights = list(module.parameters())
    for weight, mapped in zip(weights, in_file(weights, folder), strict=True):
        weight.data = mapped
