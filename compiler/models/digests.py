"""Digests of pipelines and transformers as they are in memory, rather than of the files that they came from.

`denoiser_digest` is written into manifests and compared by hosts that run the model in torch (`hosts`); its definition
is in `schemas/README.md`, "Digests". The other two identify a live pipeline to `compile`.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from otcache.schemas.digest import FLOAT, digest_of_bytes, digest_of_value, with_named_floats
from otcache.schemas.errors import ModelError

from .offloading import weights_in_place

SAMPLED = 8
"""Elements of each tensor that `weights_sample` reads."""


def denoiser_digest(module: nn.Module, dtype: torch.dtype = torch.bfloat16) -> str:
    """Digest of a transformer's class, options and tensors, each rounded to `dtype` first.

    In bfloat16 it is the same for a model that is held in float32 and one that was cast to bfloat16; in float16
    likewise. What was rounded to one of the two cannot be compared in the other. LoRA adapters that are not fused have
    no say. Weights that hooks keep elsewhere between calls are put in place for it; of quantised ones the packed parts
    are taken, so that a quantised model has a digest of its own.

    Raises ModelError where the tensors are not in memory.
    """
    with weights_in_place(module):
        tensors = {name: _tensor(module, name, value, dtype) for name, value in _own_state(module)}
    return digest_of_value({"class": type(module).__name__, "config": own_options(module), "tensors": tensors})


def own_options(module: Any) -> dict[str, Any]:
    """The options of a diffusers component that differ from its class's defaults, as JSON values.

    A later diffusers with a new option leaves them as they are; options of a folder that a later diffusers has saved,
    and those of another class, which `from_config` keeps without effect, are none.
    """
    defaults = {
        name: parameter.default for name, parameter in inspect.signature(type(module).__init__).parameters.items()
    }
    options = {name: _plain(value) for name, value in module.config.items() if name in defaults}
    return {name: value for name, value in options.items() if value != _plain(defaults[name])}


def plain_options(component: Any) -> dict[str, Any]:
    """The options of a diffusers component that a manifest can hold: None, truth values, text, numbers, lists of these.

    Numbers that JSON does not have are named; `options_from_plain` reads them.
    """
    return {
        name: with_named_floats(value)
        for name, value in component.config.items()
        if not name.startswith("_") and all(map(_is_plain, value if isinstance(value, list | tuple) else [value]))
    }


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | str | float)


def options_from_plain(options: Mapping[str, Any]) -> dict[str, Any]:
    """What `plain_options` made, as the component's class takes it.

    >>> options_from_plain({"lambda_min_clipped": {"__float__": "-Infinity"}, "shift": 3.0})
    {'lambda_min_clipped': -inf, 'shift': 3.0}
    """
    return {
        name: float(value[FLOAT]) if isinstance(value, dict) and FLOAT in value else value
        for name, value in options.items()
    }


def config_digest(pipeline: Any) -> str:
    """Digest of the classes and options of a pipeline's components, and of its tokenizers' vocabularies."""
    return digest_of_value({name: _described(component) for name, component in pipeline.components.items()})


def weights_digest(pipeline: Any) -> str:
    """Digest of every tensor of a pipeline's components, to the last bit. Raises ModelError as `denoiser_digest`."""
    tensors: dict[str, list[Any]] = {}
    for component, module in pipeline.components.items():
        if isinstance(module, nn.Module):
            with weights_in_place(module):
                for name, value in _state(module):
                    tensors[f"{component}.{name}"] = [str(value.dtype), *_tensor(module, name, value)]
    return digest_of_value(tensors)


def _state(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [(name, value) for name, value in module.state_dict().items() if isinstance(value, Tensor)]


def _own_state(module: nn.Module) -> list[tuple[str, Tensor]]:
    """The state as it was before LoRA layers were put around its own, with what is fused into them."""
    tuned = {name for name, layer in module.named_modules() if _is_tuned(layer)}
    found = []
    for name, value in _state(module):
        parts = name.split(".")
        inside = next((i for i in range(len(parts) - 1, 0, -1) if ".".join(parts[:i]) in tuned), None)
        if inside is None:
            found.append((name, value))
        elif parts[inside] == "base_layer":
            found.append((".".join(parts[:inside] + parts[inside + 1 :]), value))
    return found


def _is_tuned(layer: nn.Module) -> bool:
    """Whether peft has put a LoRA, or another adapter, around a layer."""
    return hasattr(layer, "base_layer") and hasattr(layer, "adapter_layer_names")


def _tensor(module: nn.Module, name: str, value: Tensor, dtype: torch.dtype | None = None) -> list[Any]:
    """[shape, digest of the elements], rounded to a floating-point type where there is one."""
    if value.is_meta:
        raise ModelError(
            f"{type(module).__name__}: {name} is on the meta device: expected weights in memory: take its digest "
            "before anything moves them away"
        )
    if hasattr(value, "__tensor_flatten__"):
        return [list(value.shape), type(value).__name__, _parts(module, name, value)]
    rounded = value.to(dtype) if dtype is not None and value.is_floating_point() else value
    elements = rounded.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return [list(value.shape), digest_of_bytes(elements.numpy().data)]


def _parts(module: nn.Module, name: str, value: Any) -> dict[str, list[Any]]:
    """Digests of the tensors that a tensor subclass is made of, such as packed integers and their scales."""
    found = {part: getattr(value, part) for part in value.__tensor_flatten__()[0]}
    return {part: [str(each.dtype), *_tensor(module, f"{name}.{part}", each)] for part, each in found.items()}


def _described(component: Any) -> Any:
    found: dict[str, Any] = {"class": type(component).__name__}
    if hasattr(component, "get_vocab"):
        found |= {"vocabulary": digest_of_value(component.get_vocab()), "length": component.model_max_length}
    config = getattr(component, "config", None)
    if config is not None:
        options = config.to_dict() if hasattr(config, "to_dict") else config
        found["config"] = {key: _plain(value) for key, value in options.items() if not key.startswith("_")}
    return found


def _plain(value: Any) -> Any:
    """The value as JSON reads it back: tuples are lists, keys are text, what JSON does not know is its text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return json.loads(json.dumps(value, default=str))


def loaded_adapters(component: nn.Module) -> list[str]:
    """Names of LoRA adapters whose layers are in a component, whatever they do there."""
    return sorted(getattr(component, "peft_config", None) or {})


def active_adapters(transformer: nn.Module) -> list[str]:
    """Names of LoRA adapters that have a say beside the weights: not fused into them, switched off or scaled by 0."""
    found: set[str] = set()
    for layer in filter(_is_tuned, transformer.modules()):
        found.update(_active_in(layer))
    return sorted(found)


def _active_in(layer: Any) -> list[str]:
    """Of one layer that peft has put around another."""
    if layer.disable_adapters or layer.merged:
        return []
    scales, kept = getattr(layer, "scaling", {}), [getattr(layer, kind) for kind in layer.adapter_layer_names]
    return [name for name in layer.active_adapters if scales.get(name, 1.0) and any(name in each for each in kept)]


def weights_sample(module: nn.Module) -> str | None:
    """Digest of a few elements of every tensor, of a LoRA's as well: cheap enough for every request, it changes when
    other weights are loaded or a LoRA is fused. None where weights are moved away, or of a kind that cannot be looked
    into.
    """
    parts: dict[torch.device, list[Tensor]] = {}
    for _, value in _state(module):
        if value.is_meta or type(value) not in (Tensor, nn.Parameter):
            return None
        if value.numel():
            few = value.detach().reshape(-1)[:: max(1, value.numel() // SAMPLED)][:SAMPLED]
            parts.setdefault(value.device, []).append(few.float())
    return digest_of_value([digest_of_bytes(torch.cat(few).cpu().numpy().data) for few in parts.values()])
