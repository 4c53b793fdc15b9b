"""How named tensors become a call of a model, as its pipeline makes it: what is bound, nested and changed on the way.

The names of tensors are dotted paths: `added_cond_kwargs.text_embeds` is an entry of the dict `added_cond_kwargs`,
`image_rotary_emb.0` of a tuple. With that, and the few values below, a pipeline's call is data, and no model needs an
adapter of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor


@dataclass(frozen=True)
class PerSample:
    """A constant argument with the samples along its first axis: one row (1, …), the same for each."""

    row: Tensor


@dataclass(frozen=True)
class Spread:
    """An argument that is the input of its name, one row (1, …), repeated for each sample."""


@dataclass(frozen=True, kw_only=True)
class InPlaceOf:
    """No argument, but a table (`tables`): the input of its name, in the place of what a part of the model makes."""

    part: str
    """Dotted path of the submodule."""
    position: int | None
    """Among the tensors that it makes; None for a tensor alone."""
    spread: bool
    """One row (1, …), repeated for each sample."""
    pairs: bool
    """Complex numbers as pairs along the last axis."""


@dataclass(frozen=True)
class Offset:
    """An argument that is the input of its name plus a number: `1 − t / 1000` is a time at scale −1/1000."""

    value: float


@dataclass(frozen=True)
class Behind:
    """An argument that is the input of its name with channels of one number each behind its own (axis 1): where a
    picture could be given.
    """

    channels: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Listed:
    """An argument that lists one tensor for each sample of the input of its name (`Samples`)."""

    axis: int | None = None
    """Where an entry has an axis of size one that the input lacks."""
    mask: str | None = None
    """The input (n, length) that says which rows of an entry there are; no argument of the model. None where all are.
    """


Adjusted = Offset | Behind | Listed
"""How an input is changed on the way to the argument of its name."""


class Samples(Sequence[Tensor]):
    """One tensor a sample, as a list has them; what stands in for a model (`replacements`) takes `rows` and `mask` as a
    whole.

    Entry i is rows[i], or its rows where mask[i] is not zero.
    """

    def __init__(self, rows: Tensor, mask: Tensor | None = None) -> None:
        self.rows, self.mask = rows, mask

    def __len__(self) -> int:
        self._check()
        return self.rows.shape[0]

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> list[Tensor]: ...
    def __getitem__(self, index: int | slice) -> Tensor | list[Tensor]:
        self._check()
        if isinstance(index, slice):
            return list(self)[index]
        return self.rows[index] if self.mask is None else self.rows[index][self.mask[index].bool()]

    def __iter__(self) -> Iterator[Tensor]:
        return (self[index] for index in range(len(self)))

    def _check(self) -> None:
        if not isinstance(self.rows.shape[0], int):
            raise TypeError("an argument lists one tensor a sample, which fixes the batch that stages are made for")


@dataclass(frozen=True)
class Output:
    """What a pipeline makes of the model's output before guidance and the scheduler's step."""

    channels: int | None = None
    """Entries of axis 1 that are kept, the first ones: predicted variances follow them."""
    scale: float = 1.0
    axis: int | None = None
    """One of size one that is left out."""

    def __call__(self, result: Any) -> Tensor:
        """The model's result (a tensor, a tuple or diffusers' output class; or a list of one tensor a sample) as one
        tensor.
        """
        output: Tensor = result if isinstance(result, Tensor) else result[0]
        if isinstance(output, list):
            output = torch.stack(output)
        if self.axis is not None:
            output = output.squeeze(self.axis)
        if self.channels is not None:
            output = output[:, : self.channels]
        return output if self.scale == 1.0 else output * self.scale


PLAIN = Output()
"""The first tensor of the result, as it is."""


def arguments(inputs: Mapping[str, Tensor], constants: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of the model: `inputs` with `constants` bound, and dotted names made nested dicts."""
    batch = batch_of(inputs)
    flat = {**constants, **inputs}
    for name, constant in constants.items():
        if isinstance(constant, PerSample):
            flat[name] = repeat_row(constant.row, batch)
        elif isinstance(constant, Spread):
            flat[name] = repeat_row(inputs[name], batch)
        elif isinstance(constant, Behind):
            flat[name] = _append_channels(inputs[name], constant.channels)
        elif isinstance(constant, InPlaceOf):
            del flat[name]
        elif isinstance(constant, Offset):
            flat[name] = inputs[name] + constant.value
        elif isinstance(constant, Listed):
            rows = inputs[name] if constant.axis is None else inputs[name].unsqueeze(1 + constant.axis)
            flat[name] = Samples(rows, flat.pop(constant.mask) if constant.mask else None)
    return _nest(flat)


def batch_of(inputs: Mapping[str, Tensor]) -> int:
    """The first of a model's inputs, its latents, has the samples along dimension 0."""
    return next((value.shape[0] for value in inputs.values()), 1)


def tensor_of(constant: Any) -> Tensor:
    """The tensor that a constant consists of, which may as well be an input: without a batch, or one row."""
    tensor: Tensor = constant.row if isinstance(constant, PerSample) else constant
    return tensor


def repeat_row(row: Tensor, batch: int) -> Tensor:
    """One row (1, …) for each of `batch` samples."""
    return row.repeat(batch, *[1] * (row.ndim - 1))  # contiguous, as pipelines make it


def _append_channels(value: Tensor, channels: tuple[float, ...]) -> Tensor:
    """(n, c, …) → (n, c + channels, …)."""
    row = value.new_tensor(channels).view(1, -1, *[1] * (value.ndim - 2))
    return torch.cat([value, row.expand(value.shape[0], -1, *value.shape[2:])], dim=1)


def flatten_values(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts, and tuples of tensors, as one dict with dotted names; an empty dict is a value."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, tuple) and value and all(isinstance(each, Tensor) for each in value):
            flat |= {f"{prefix}{key}.{position}": each for position, each in enumerate(value)}
        elif isinstance(value, dict) and value:
            flat |= flatten_values(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for name, value in flat.items():
        *path, last = name.split(".")
        place = nested
        for part in path:
            place = place.setdefault(part, {})
        place[last] = value
    return {name: _with_tuples(value) for name, value in nested.items()}


def _with_tuples(value: Any) -> Any:
    """What `flatten_values` made dicts of, as it was: positions are the names of a tuple's entries."""
    if not isinstance(value, dict) or not value:
        return value
    found = {name: _with_tuples(each) for name, each in value.items()}
    positions = [str(position) for position in range(len(found))]
    return tuple(found[position] for position in positions) if set(found) == set(positions) else found
