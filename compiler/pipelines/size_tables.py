"""Tables: what parts of a model make of the size alone, such as rotary embeddings. Found by running the model; nothing
is declared.

A pipeline may say the size in Python numbers (`img_shapes`, `height`), which no graph takes as inputs, and a part may
count in ways that cannot be traced. Where such a part has no weights and makes the same of other latents, times and
conditioning, that is a constant of the size: an input of the graph, in the part's place.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .arguments import InPlaceOf, PerSample, arguments, batch_of, repeat_row, tensor_of


@dataclass(frozen=True, kw_only=True)
class Table:
    """One tensor that a part makes at one size."""

    place: InPlaceOf
    value: Tensor | PerSample
    """Complex numbers as pairs along one axis more."""


@torch.no_grad()
def tables_of(
    module: nn.Module, inputs: Mapping[str, Tensor], constants: Mapping[str, Any], changing: Collection[str]
) -> dict[str, Table]:
    """The tables of a model at one size, by names for the inputs that they may become.

    inputs: two samples or more along dimension 0. changing: latents and time, which are other numbers at each step.
    """
    others = {name: value.flip(0)[1:] * (0.5 if name in changing else 1) for name, value in inputs.items()}
    first, second = (_made(module, arguments(each, constants)) for each in (inputs, others))
    found: dict[str, Table] = {}
    for path, made in first.items():
        tensors, again = (each if isinstance(each, tuple) else (each,) for each in (made, second.get(path, ())))
        values = [_constant(*pair) for pair in zip(tensors, again, strict=False)]
        if len(values) < len(tensors) or any(value is None for value in values):
            continue
        for position, (tensor, value) in enumerate(zip(tensors, values, strict=True)):
            place = InPlaceOf(
                part=path,
                position=position if isinstance(made, tuple) else None,
                spread=isinstance(value, PerSample),
                pairs=tensor.is_complex(),
            )
            found[f"{path.replace('.', '_')}_{position}"] = Table(place=place, value=value)  # type: ignore[arg-type]
    return found


def following(tables: Sequence[Mapping[str, Table]]) -> tuple[str, ...]:
    """Names of the tables that are others from size to size, with all tables of the same part."""
    own, *others = tables
    shared = [name for name in own if all(name in each for each in others)]
    parts = {
        own[name].place.part
        for name in shared
        if not all(_equal(tensor_of(own[name].value), tensor_of(each[name].value)) for each in others)
    }
    return tuple(name for name in shared if own[name].place.part in parts)


@contextlib.contextmanager
def standing_in(module: nn.Module, inputs: Mapping[str, Tensor], constants: Mapping[str, Any]) -> Iterator[None]:
    """While it lasts, parts whose tables are among the inputs make those."""
    made: dict[str, Any] = {}
    for name, place in constants.items():
        if isinstance(place, InPlaceOf):
            value = repeat_row(inputs[name], batch_of(inputs)) if place.spread else inputs[name]
            value = torch.view_as_complex(value) if place.pairs else value
            made[place.part] = value if place.position is None else (*made.get(place.part, ()), value)
    parts = {module.get_submodule(path): value for path, value in made.items()}
    for part, value in parts.items():
        part.forward = lambda *_, value=value, **__: value  # type: ignore[method-assign, misc]
    try:
        yield
    finally:
        for part in parts:
            del part.forward


def _made(module: nn.Module, kwargs: Mapping[str, Any]) -> dict[str, Tensor | tuple[Tensor, ...]]:
    """What parts without weights make in one run, outside of lists of blocks; without those that run more than once."""
    lists = tuple(f"{path}." for path, part in module.named_modules() if isinstance(part, nn.ModuleList))
    runs: dict[str, list[Any]] = {}
    with contextlib.ExitStack() as hooks:
        for path, part in module.named_modules():
            if path and not f"{path}.".startswith(lists) and not any(True for _ in part.parameters()):
                keep = runs.setdefault(path, []).append
                handle = part.register_forward_hook(lambda _, __, output, keep=keep: keep(output))
                hooks.callback(handle.remove)
        module(**kwargs)
    once = {path: outputs[0] for path, outputs in runs.items() if len(outputs) == 1}
    return {
        path: made
        for path, made in once.items()
        if all(isinstance(each, Tensor) for each in (made if isinstance(made, tuple) else (made,)))
    }


def _constant(first: Tensor, second: Tensor) -> Tensor | PerSample | None:
    """What a part made for all samples, then for one less, as a constant; None where it is none."""
    if _equal(first, second):
        return _real(first)
    row = first[:1]
    if row.ndim and _equal(first[1:], second) and _equal(first, row.expand_as(first)):
        return PerSample(_real(row))
    return None


def _equal(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and torch.equal(first, second)


def _real(value: Tensor) -> Tensor:
    return (torch.view_as_real(value) if value.is_complex() else value).contiguous()
