"""Before pass `export`: whether a transformer, or any other part of a pipeline, can be exported at all.

Quantised weights have forms of their own: packed integers with scales, read by kernels that ONNX does not have. A
transformer of them is calibrated, and served by hosts that keep torch, without engines. What is quantised is told by
the weights and layers themselves rather than by a configuration, which may be left over, and without importing any of
the packages that quantise. Some do export (weight-only torchao): where tensors pretend to be floating-point ones, a
layer of each kind is tried, which takes about a second.

Weights that hooks keep elsewhere between calls are no obstacle (`models.offloading`).
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from otcache.schemas.errors import ModelError

from ..models.offloading import hooks_by_weight, weights_in_place
from .onnx_stages import export_module

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
"""Dtypes that weights of engines may have. Weights of integers or of 8-bit floating point are stored forms."""
PACKAGES = ("auto_round", "bitsandbytes", "gguf", "modelopt", "nunchaku", "optimum", "sdnq", "torchao")
"""Where layers and weights come from that are quantised, beside `diffusers.quantizers`."""
FIX = "load it without quantization, or leave engines out with --engines none"


def unexportable(module: nn.Module) -> str | None:
    """Say why engines cannot be made of a module: one line that says what to do, or None.

    None does not promise that the model can be traced, which pass `cut` finds out. Weights that hooks keep elsewhere
    count as being there, see `weights_in_place`.

    Args:
        module: on any device, in any dtype, with or without hooks of accelerate or diffusers. It is as it was
            afterwards.

    Returns:
        The reason, such as `FluxTransformer2DModel is quantised (gguf: 24 of 42 weights are GGUFParameter, the first
        transformer_blocks.0.attn.to_q.weight): engines need …: load it without quantization, or …`.
    """
    name, weights = type(module).__name__, dict(module.named_parameters())
    found = _say_packed(module, weights) or _say_foreign(module) or _say_refused(module)
    if found is not None:
        return f"{name} is quantised ({found}): engines need weights in float32, float16 or bfloat16: {FIX}"
    kept = hooks_by_weight(module)
    if missing := [path for path, value in weights.items() if value.is_meta and path not in kept]:
        return (
            f"{name} has no values for {len(missing)} of {len(weights)} weights, the first {missing[0]}: they are on "
            "the meta device, and no hook keeps them: load it with from_pretrained"
        )
    return None


def _say_packed(module: nn.Module, weights: Mapping[str, Tensor]) -> str | None:
    """Say which weights have dtypes that no engine has; None where all are fit."""
    forms = {path: _form(value) for path, value in weights.items() if value.dtype not in DTYPES}
    return _say(module, "weights", forms, len(weights), weights[next(iter(forms))]) if forms else None


def _say_foreign(module: nn.Module) -> str | None:
    """Say which layers stand for `nn.Linear` and keep their weights in buffers, as GPTQ's do; None where none does."""
    layers = dict(module.named_modules())
    own = {path: layer for path, layer in layers.items() if _package(type(layer)) and not isinstance(layer, nn.Linear)}
    forms = {path: type(layer).__name__ for path, layer in own.items()}
    return _say(module, "modules", forms, len(layers), own[next(iter(own))]) if own else None


def _say_refused(module: nn.Module) -> str | None:
    """Say which weights pretend to be floating-point ones, where a layer of them does not export; None elsewhere."""
    forms = {path: _form(value) for path, value in module.named_parameters() if _is_wrapped(value)}
    tried: set[Any] = set()
    for path in forms:
        layer = module.get_submodule(path.rpartition(".")[0])
        weight = module.get_parameter(path)
        kind = (type(layer), type(weight), repr(getattr(weight, "__tensor_flatten__", tuple)()[1:]))
        if kind not in tried and (reason := _try(layer)) is not None:
            said = _say(module, "weights", forms, len(list(module.parameters())), weight)
            return f"{said}; {path} does not export: {reason}"
        tried.add(kind)
    return None


def _try(layer: nn.Module) -> str | None:
    """Export one layer; None where its ONNX form gives what it gives, else why not."""
    if not isinstance(layer, nn.Linear):
        return f"it is one of {type(layer).__name__}"
    dtype = layer.weight.dtype if layer.weight.dtype in DTYPES else torch.float32
    try:
        with weights_in_place(layer), tempfile.TemporaryDirectory() as folder:
            example = {"x": torch.linspace(-1, 1, 2 * layer.in_features).reshape(2, -1).to(layer.weight.device, dtype)}
            export_module(_Called(layer).eval(), example, ("y",), Path(folder) / "layer.onnx", kind="trial")
    except (ModelError, RuntimeError, AttributeError, TypeError, NotImplementedError) as error:
        return next(iter(str(error).split("; ")[0].splitlines()), type(error).__name__)
    return None


class _Called(nn.Module):
    """A layer whose input is named `x`."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layer(x)
        return result


def _is_wrapped(weight: Tensor) -> bool:
    """Whether a weight is a subclass of tensors, as those are that hold values in a form of their own."""
    return type(weight) not in (Tensor, nn.Parameter) or type(weight.data) is not Tensor


def _form(weight: Tensor) -> str:
    """Name of the class of a wrapped weight, else of the dtype."""
    if _is_wrapped(weight):
        return type(weight if type(weight) is not nn.Parameter else weight.data).__name__
    return str(weight.dtype).removeprefix("torch.")


def _say(module: nn.Module, what: str, forms: dict[str, str], count: int, first: Tensor | nn.Module) -> str:
    """`torchao: 48 of 108 weights are Int8Tensor, the first blocks.0.to_q.weight`. first: of `forms`, itself."""
    stated = getattr(module, "quantization_method", None)
    kinds = [type(first), type(first.data)] if isinstance(first, Tensor) else [type(first)]
    methods = [_package(kind) for kind in kinds]
    method = getattr(stated, "value", stated) or next(filter(None, methods), None)
    prefix = f"{method}: " if method else ""
    return f"{prefix}{len(forms)} of {count} {what} are {_list_once(forms.values())}, the first {next(iter(forms))}"


def _package(kind: type) -> str | None:
    """The one of `PACKAGES` that a class, or one that it is made from, comes from."""
    for each in kind.__mro__:
        parts = each.__module__.split(".")
        if parts[0] in PACKAGES:
            return parts[0]
        if parts[:2] == ["diffusers", "quantizers"] and len(parts) > 2:
            return parts[2]
    return None


def _list_once(kinds: Iterable[str]) -> str:
    """Every name once.

    >>> _list_once(["Int8Tensor", "Float8Tensor", "Int8Tensor"])
    'Int8Tensor and Float8Tensor'
    """
    return " and ".join(dict.fromkeys(kinds))
