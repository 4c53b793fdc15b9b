"""What devices and hosts without memory raise, and how that is said."""

from __future__ import annotations

import torch

from otcache.schemas.errors import HostError


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether a device, or the host's allocator, had no memory for what was asked; also where that was said since
    (`error_without_memory`).
    """
    if isinstance(error, HostError):
        return is_out_of_memory(error.__cause__)
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)


def error_without_memory(subject: str, error: Exception) -> HostError:
    """One line about what ran out of memory, to be raised from `error`.

    >>> str(error_without_memory("FluxPipeline", torch.OutOfMemoryError("tried to allocate 2 GiB")))[:70]
    'FluxPipeline: out of memory (tried to allocate 2 GiB): expected more f'
    """
    said = next(iter(str(error).splitlines()), type(error).__name__)[:160]
    return HostError(
        f"{subject}: out of memory ({said}): expected more free memory on the device: give a smaller --height and "
        "--width, --offload model or group, or a smaller --precision"
    )


def release(device: torch.device) -> None:
    """Give cached memory of a device back to it."""
    module = getattr(torch, device.type, None)
    if module is not None and hasattr(module, "empty_cache"):
        module.empty_cache()
