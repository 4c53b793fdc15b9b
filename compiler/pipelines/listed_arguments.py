"""Arguments that a pipeline passes as lists of one tensor a sample, as the tensors that stages take (Z-Image).

A list of the latents is one tensor, perhaps without an axis of size one. Any other list is one because its entries
differ in length (captions): they are padded to the longest one, with a mask that says which rows there are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .arguments import Listed


def lists_of(call: Mapping[str, Any], sample: Tensor) -> dict[str, Listed]:
    """The arguments of a call that list one tensor for each sample. sample: the scheduler's latents (n, …)."""
    counts = (len(sample), 2 * len(sample))  # of one branch of guidance, or of both
    return {
        name: _listed(name, value, sample)
        for name, value in call.items()
        if isinstance(value, list) and len(value) in counts and all(isinstance(each, Tensor) for each in value)
    }


def as_tensors(call: Mapping[str, Any], listed: Mapping[str, Listed]) -> dict[str, Any]:
    """The call with its lists as tensors (n, …), and the masks int64 (n, longest) of those that are padded."""
    made = dict(call)
    for name, how in listed.items():
        rows: list[Tensor] = call[name]
        if how.mask is None:
            made[name] = torch.stack(rows if how.axis is None else [row.squeeze(how.axis) for row in rows])
        else:
            made[name] = pad_sequence(rows, batch_first=True)
            made[how.mask] = pad_sequence([row.new_ones(len(row), dtype=torch.int64) for row in rows], batch_first=True)
    return made


def extra_axis(shape: Sequence[int], other: Sequence[int]) -> int | None:
    """The first axis of size one without which `shape` is `other`."""
    axes = (axis for axis, size in enumerate(shape) if size == 1 and (*shape[:axis], *shape[axis + 1 :]) == (*other,))
    return next(axes, None)


def _listed(name: str, rows: Sequence[Tensor], sample: Tensor) -> Listed:
    shape, latents = tuple(rows[0].shape), tuple(sample.shape[1:])
    if shape == latents:
        return Listed()
    axis = extra_axis(shape, latents)
    return Listed(mask=f"{name}_mask") if axis is None else Listed(axis=axis)
