"""Weights that hooks keep elsewhere between calls, and the same put in place for tracing.

accelerate (`enable_model_cpu_offload`, `enable_sequential_cpu_offload`) and diffusers (group offloading) move weights
inside of `forward`, which a graph must not do: while `weights_in_place` lasts they are where parameters should be, and
afterwards they are offloaded again. Neither package is imported to find hooks: their classes' names tell.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

GROUP_OFFLOADING = "group_offloading"
"""Name of diffusers' hook that moves groups of weights (`diffusers.hooks`)."""


def describe_offloading(module: nn.Module) -> str | None:
    """Say which weights hooks keep elsewhere between calls, in one line; None where all are in place."""
    name, kept, count = type(module).__name__, hooks_by_weight(module), len(list(module.parameters()))
    if not kept:
        return None
    return (
        f"{name} has {len(kept)} of {count} weights offloaded ({' and '.join(dict.fromkeys(kept.values()))}, the first "
        f"{next(iter(kept))}): for engines all are put in place, which takes memory for the whole of it"
    )


@contextlib.contextmanager
def weights_in_place(module: nn.Module) -> Iterator[None]:
    """While it lasts, the module has all its weights and no hooks of accelerate's or diffusers' offloading.

    Afterwards the same hooks are on it again. Tracing needs it: hooks move weights inside of `forward`, which a graph
    must not do. Weights of the CPU come back without a copy; those on a disk are read.
    """
    parts: list[Any] = list(module.modules())
    hooked = [(part, part._hf_hook) for part in parts if hasattr(part, "_hf_hook")]
    registries = [part._diffusers_hook for part in parts if hasattr(part, "_diffusers_hook")]
    grouped = [(registry, hook) for registry in registries if (hook := registry.get_hook(GROUP_OFFLOADING)) is not None]
    for _, hook in grouped:
        if hook.group.offload_to_disk_path is not None:
            hook.group.onload_()
    for registry, _ in grouped:
        registry.remove_hook(GROUP_OFFLOADING, recurse=False)
    if hooked:
        from accelerate.hooks import add_hook_to_module, remove_hook_from_module

        for part, _ in hooked:
            remove_hook_from_module(part)
    try:
        yield
    finally:
        for part, hook in hooked:
            add_hook_to_module(part, hook)
        for registry, hook in grouped:
            registry.register_hook(hook, GROUP_OFFLOADING)


def hooks_by_weight(module: nn.Module) -> dict[str, str]:
    """Path of each weight that a hook keeps elsewhere between calls → name of the hook's class."""
    kept: dict[str, str] = {}
    for path, part in module.named_modules():
        prefix = f"{path}." if path else ""
        for hook in _flat(getattr(part, "_hf_hook", None)):
            if getattr(hook, "offload", False) is True:
                deep = bool(getattr(hook, "place_submodules", False))
                own = [name for name, value in part.named_parameters(recurse=deep) if value.is_meta]
                kept |= {prefix + name: type(hook).__name__ for name in own}
            elif type(hook).__name__ == "CpuOffload":
                kept |= {prefix + name: type(hook).__name__ for name, _ in part.named_parameters()}
        registry: Any = getattr(part, "_diffusers_hook", None)
        if registry is not None and (hook := registry.get_hook(GROUP_OFFLOADING)) is not None:
            kept |= {prefix + name: type(hook).__name__ for name, _ in part.named_parameters()}
    return {path: kept[path] for path, _ in module.named_parameters() if path in kept}


def _flat(hook: Any) -> list[Any]:
    """accelerate's hooks of a module: one, several in a chain, or none."""
    if hook is None:
        return []
    return [each for inner in getattr(hook, "hooks", ()) for each in _flat(inner)] or [hook]
