"""How many samples are evaluated at once, and what happens where the device has no memory for them."""

from __future__ import annotations

from collections.abc import Callable

import torch

from otcache.schemas.errors import HostError

Notify = Callable[[str], None]


class MicroBatch:
    """How many samples are evaluated at once; halved, with a note, where the device has no memory for them."""

    def __init__(self, size: int, note: Notify = lambda text: None) -> None:
        self.size, self.note = size, note

    def halve(self, error: Exception) -> None:
        """Raises HostError where not even one sample fits."""
        if self.size == 1:
            raise HostError(
                f"out of memory with one sample at a time ({first_line(error)}): expected more free memory on the device: "
                "give a smaller --height and --width, --offload model or group, or a smaller --precision"
            ) from error
        self.size = max(1, self.size // 2)
        self.note(f"out of memory on the device: going on with {self.size} samples at a time")


def first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)[:160]


def is_out_of_memory(error: Exception) -> bool:
    """Whether a device, or the host's allocator, had no memory for what was asked."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)


def release(device: torch.device) -> None:
    """Give cached memory of a device back to it."""
    module = getattr(torch, device.type, None)
    if module is not None and hasattr(module, "empty_cache"):
        module.empty_cache()
