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


def denoiser_digest(module: nn.Module) -> str:
    """Digest of a transformer's class, options and tensors, the same in float32, bfloat16 and, but for ties, float16.

    Raises ModelError where the tensors are not in memory.
    """
    return digest_of_value(
        {
            "class": type(module).__name__,
            "config": own_options(module),
            "tensors": {name: _tensor(module, name, value, round_to_bfloat16=True) for name, value in _state(module)},
        }
    )


def own_options(module: Any) -> dict[str, Any]:
    """The options of a diffusers component that differ from its class's defaults, as JSON values.

    A later diffusers with a new option leaves them as they are.
    """
    defaults = {
        name: parameter.default for name, parameter in inspect.signature(type(module).__init__).parameters.items()
    }
    options = {name: _plain(value) for name, value in module.config.items() if not name.startswith("_")}
    return {
        name: value for name, value in options.items() if value != _plain(defaults.get(name, inspect.Parameter.empty))
    }


def plain_options(component: Any) -> dict[str, Any]:
    """The options of a diffusers component that a manifest can hold: None, truth values, text and numbers.

    Numbers that JSON does not have are named; `options_from_plain` reads them.
    """
    return {
        name: with_named_floats(value)
        for name, value in component.config.items()
        if not name.startswith("_") and (value is None or isinstance(value, bool | int | str | float))
    }


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
    return digest_of_value(
        {
            f"{component}.{name}": [str(value.dtype), *_tensor(module, name, value, round_to_bfloat16=False)]
            for component, module in pipeline.components.items()
            if isinstance(module, nn.Module)
            for name, value in _state(module)
        }
    )


def _state(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [(name, value) for name, value in module.state_dict().items() if isinstance(value, Tensor)]


def _tensor(module: nn.Module, name: str, value: Tensor, *, round_to_bfloat16: bool) -> list[Any]:
    """[shape, digest of the elements]."""
    if value.is_meta:
        raise ModelError(
            f"{type(module).__name__}: {name} is on the meta device: expected weights in memory: take its digest before "
            "enable_sequential_cpu_offload and the like move them away"
        )
    rounded = value.bfloat16() if round_to_bfloat16 and value.is_floating_point() else value
    elements = rounded.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return [list(value.shape), digest_of_bytes(elements.numpy().data)]


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


def active_adapters(transformer: Any) -> list[str]:
    """Names of LoRA adapters that are loaded and not fused."""
    return sorted(getattr(transformer, "peft_config", None) or {})
