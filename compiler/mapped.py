"""Weights that are mapped from their files: given back after use, so that a large model is never in memory whole.

diffusers maps a safetensors file into memory where the weights have the wanted dtype, so that each is read when it is first
touched. Passes `cut` and `export` touch one stage after the other, and give its memory back here.
"""

from __future__ import annotations

import ctypes
import mmap
import sys

from torch import nn

_MADV_PAGEOUT = 21
"""Linux 5.4 (madvise(2)). Pages of a file are dropped, and others stay: unlike MADV_DONTNEED it loses no change."""


def give_back(module: nn.Module) -> None:
    """Drop the memory of a module's mapped weights; what is touched again is read again. Without effect outside Linux."""
    if not sys.platform.startswith("linux"):
        return
    advise, page = ctypes.CDLL(None).madvise, mmap.PAGESIZE
    for weight in module.parameters():
        start = -(-weight.data_ptr() // page) * page
        size = (weight.data_ptr() + weight.nbytes - start) // page * page
        if size > 0:
            advise(ctypes.c_void_p(start), ctypes.c_size_t(size), _MADV_PAGEOUT)
