"""Before pass `export`: whether a transformer can be exported at all, and its weights put in place for it.

Quantised weights have forms of their own: packed integers with scales, read by kernels that ONNX does not have. A
transformer of them is calibrated, and served by hosts that keep torch, without engines. What is quantised is told by
the weights and layers themselves rather than by a configuration, which may be left over, and without importing any of
the packages that quantise. Some do export (weight-only torchao): where tensors pretend to be floating-point ones, a
layer of each kind is tried, which takes about a second.

Weights that are only kept elsewhere between calls (accelerate's and diffusers' offloading) are no obstacle:
`weights_in_place` brings them back while it lasts.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from otcache.schemas.errors import ModelError

from .onnx_stages import export_module

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
"""Dtypes that weights of engines may have. Weights of integers or of 8-bit floating point are stored forms."""
PACKAGES = ("auto_round", "bitsandbytes", "gguf", "modelopt", "nunchaku", "optimum", "sdnq", "torchao")
"""Where layers and weights come from that are quantised, beside `diffusers.quantizers`."""
GROUP_OFFLOADING = "group_offloading"
"""Name of diffusers' hook that moves groups of weights (`diffusers.hooks`)."""
FIX = "load it without quantization, or leave engines out with --engines none"


def unexportable(transformer: nn.Module) -> str | None:
    """Say why engines cannot be made of a transformer: one line that says what to do, or None.

    None does not promise that the model can be traced, which pass `cut` finds out. Weights that hooks keep elsewhere
    count as being there, see `weights_in_place`.

    Args:
        transformer: on any device, in any dtype, with or without hooks of accelerate or diffusers. It is as it was
            afterwards.

    Returns:
        The reason, such as `FluxTransformer2DModel is quantised (gguf: 24 of 42 weights are GGUFParameter, the first
        transformer_blocks.0.attn.to_q.weight): engines need …: load it without quantization, or …`.
    """
    name, weights = type(transformer).__name__, dict(transformer.named_parameters())
    found = _say_packed(transformer, weights) or _say_foreign(transformer) or _say_refused(transformer)
    if found is not None:
        return f"{name} is quantised ({found}): engines need weights in float32, float16 or bfloat16: {FIX}"
    kept = _kept_elsewhere(transformer)
    if missing := [path for path, value in weights.items() if value.is_meta and path not in kept]:
        return (
            f"{name} has no values for {len(missing)} of {len(weights)} weights, the first {missing[0]}: they are on "
            "the meta device, and no hook keeps them: load it with from_pretrained"
        )
    return None


def offloaded(transformer: nn.Module) -> str | None:
    """Say which weights hooks keep elsewhere between calls, in one line; None where all are in place."""
    name, kept, count = type(transformer).__name__, _kept_elsewhere(transformer), len(list(transformer.parameters()))
    if not kept:
        return None
    return (
        f"{name} has {len(kept)} of {count} weights offloaded ({_listed(list(kept.values()))}, the first "
        f"{next(iter(kept))}): for engines all are put in place, which takes memory for the whole of it"
    )


@contextlib.contextmanager
def weights_in_place(transformer: nn.Module) -> Iterator[None]:
    """While it lasts, the transformer has all its weights and no hooks of accelerate's or diffusers' offloading.

    Afterwards the same hooks are on it again. Tracing needs it: hooks move weights inside of `forward`, which a graph
    must not do. Weights of the CPU come back without a copy; those on a disk are read.
    """
    modules: list[Any] = list(transformer.modules())
    hooked = [(module, module._hf_hook) for module in modules if hasattr(module, "_hf_hook")]
    registries = [module._diffusers_hook for module in modules if hasattr(module, "_diffusers_hook")]
    grouped = [(registry, hook) for registry in registries if (hook := registry.get_hook(GROUP_OFFLOADING)) is not None]
    for _, hook in grouped:
        if hook.group.offload_to_disk_path is not None:
            hook.group.onload_()
    for registry, _ in grouped:
        registry.remove_hook(GROUP_OFFLOADING, recurse=False)
    if hooked:
        from accelerate.hooks import add_hook_to_module, remove_hook_from_module

        for module, _ in hooked:
            remove_hook_from_module(module)
    try:
        yield
    finally:
        for module, hook in hooked:
            add_hook_to_module(module, hook)
        for registry, hook in grouped:
            registry.register_hook(hook, GROUP_OFFLOADING)


# --- what is quantised


def _say_packed(transformer: nn.Module, weights: Mapping[str, Tensor]) -> str | None:
    """Say which weights have dtypes that no engine has; None where all are fit."""
    forms = {path: _form(value) for path, value in weights.items() if value.dtype not in DTYPES}
    return _say(transformer, "weights", forms, len(weights), weights[next(iter(forms))]) if forms else None


def _say_foreign(transformer: nn.Module) -> str | None:
    """Say which layers stand for `nn.Linear` and keep their weights in buffers, as GPTQ's do; None where none does."""
    layers = dict(transformer.named_modules())
    own = {path: layer for path, layer in layers.items() if _package(type(layer)) and not isinstance(layer, nn.Linear)}
    forms = {path: type(layer).__name__ for path, layer in own.items()}
    return _say(transformer, "modules", forms, len(layers), own[next(iter(own))]) if own else None


def _say_refused(transformer: nn.Module) -> str | None:
    """Say which weights pretend to be floating-point ones, where a layer of them does not export; None elsewhere."""
    forms = {path: _form(value) for path, value in transformer.named_parameters() if _wrapped(value)}
    tried: set[Any] = set()
    for path in forms:
        layer = transformer.get_submodule(path.rpartition(".")[0])
        weight = transformer.get_parameter(path)
        kind = (type(layer), type(weight), repr(getattr(weight, "__tensor_flatten__", tuple)()[1:]))
        if kind not in tried and (reason := _try(layer)) is not None:
            said = _say(transformer, "weights", forms, len(list(transformer.parameters())), weight)
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


def _wrapped(weight: Tensor) -> bool:
    """Whether a weight is a subclass of tensors, as those are that hold values in a form of their own."""
    return type(weight) not in (Tensor, nn.Parameter) or type(weight.data) is not Tensor


def _form(weight: Tensor) -> str:
    """Name of the class of a wrapped weight, else of the dtype."""
    if _wrapped(weight):
        return type(weight if type(weight) is not nn.Parameter else weight.data).__name__
    return str(weight.dtype).removeprefix("torch.")


def _say(transformer: nn.Module, what: str, forms: dict[str, str], count: int, first: Tensor | nn.Module) -> str:
    """`torchao: 48 of 108 weights are Int8Tensor, the first blocks.0.to_q.weight`. first: of `forms`, itself."""
    stated = getattr(transformer, "quantization_method", None)
    kinds = [type(first), type(first.data)] if isinstance(first, Tensor) else [type(first)]
    methods = [_package(kind) for kind in kinds]
    method = getattr(stated, "value", stated) or next(filter(None, methods), None)
    prefix = f"{method}: " if method else ""
    return f"{prefix}{len(forms)} of {count} {what} are {_listed(list(forms.values()))}, the first {next(iter(forms))}"


def _package(kind: type) -> str | None:
    """The one of `PACKAGES` that a class, or one that it is made from, comes from."""
    for each in kind.__mro__:
        parts = each.__module__.split(".")
        if parts[0] in PACKAGES:
            return parts[0]
        if parts[:2] == ["diffusers", "quantizers"] and len(parts) > 2:
            return parts[2]
    return None


# --- what is offloaded


def _kept_elsewhere(transformer: nn.Module) -> dict[str, str]:
    """Path of each weight that a hook keeps elsewhere between calls → name of the hook's class."""
    kept: dict[str, str] = {}
    for path, module in transformer.named_modules():
        prefix = f"{path}." if path else ""
        for hook in _flat(getattr(module, "_hf_hook", None)):
            if getattr(hook, "offload", False) is True:
                deep = bool(getattr(hook, "place_submodules", False))
                own = [name for name, value in module.named_parameters(recurse=deep) if value.is_meta]
                kept |= {prefix + name: type(hook).__name__ for name in own}
            elif type(hook).__name__ == "CpuOffload":
                kept |= {prefix + name: type(hook).__name__ for name, _ in module.named_parameters()}
        registry: Any = getattr(module, "_diffusers_hook", None)
        if registry is not None and (hook := registry.get_hook(GROUP_OFFLOADING)) is not None:
            kept |= {prefix + name: type(hook).__name__ for name, _ in module.named_parameters()}
    return {path: kept[path] for path, _ in transformer.named_parameters() if path in kept}


def _flat(hook: Any) -> list[Any]:
    """accelerate's hooks of a module: one, several in a chain, or none."""
    if hook is None:
        return []
    return [each for inner in getattr(hook, "hooks", ()) for each in _flat(inner)] or [hook]


def _listed(kinds: Sequence[str]) -> str:
    """Names, the most frequent first."""
    return " and ".join(kind for kind, _ in Counter(kinds).most_common())
