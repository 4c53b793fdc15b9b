"""Where a pipeline's components are while it is calibrated: the device, what leaves it in between, and how many samples
it takes at once.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from otcache.schemas.errors import HostError, UsageError

LARGEST_MICRO_BATCH = 8
"""Of `--micro-batch auto`: beyond it a device gains little, and an interrupted pass loses more."""
SHARE = 0.6
"""Of the free memory that a micro-batch's activations may take: an allocator needs room beside them."""


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where the model is evaluated, and in what."""

    device: torch.device
    precision: torch.dtype
    offload: str = "none"
    """none, model or group."""

    @property
    def exportable(self) -> bool:
        """Whether stages can be exported from the model as it is placed: in float32 on the CPU."""
        return self.device.type == "cpu" and self.precision == torch.float32 and self.offload == "none"


def device_from_name(name: str) -> torch.device:
    """auto: the first CUDA device if there is one, else the CPU.

    Raises UsageError for what is no device, HostError for one that is not there.
    """
    if name == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(
            f"--device is {name!r}: expected auto, cpu, cuda, cuda:1 or another that torch knows"
        ) from error
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise HostError(f"--device is {name}: this host has {count} CUDA devices: give cpu, or run on a GPU host")
        return torch.device("cuda", device.index or 0)
    try:
        torch.empty(1, device=device)
    except (RuntimeError, NotImplementedError, AssertionError) as error:
        raise HostError(f"--device is {name}: torch cannot use it here: give cpu, or run where it is") from error
    return device


def check_precision(device: torch.device, precision: torch.dtype) -> None:
    """Raises HostError for a precision that the device lacks."""
    if device.type == "cuda" and precision == torch.bfloat16 and not torch.cuda.is_bf16_supported():
        raise HostError(f"--precision is bfloat16, which {device} lacks: give float16 or float32")
    try:
        ones = torch.ones(2, 2, dtype=precision, device=device)
        torch.nn.functional.linear(ones, ones)
    except (RuntimeError, NotImplementedError) as error:
        name = str(precision).removeprefix("torch.")
        raise HostError(f"--precision is {name}, which {device} lacks: give float32") from error


def place(pipeline: Any, placement: Placement) -> None:
    """Bring a loaded pipeline to its device, with diffusers' own offloading where that is asked for.

    Raises HostError where the device has no room for it.
    """
    device, offload = placement.device, placement.offload
    try:
        if offload == "none":
            pipeline.to(device)
        elif device.type == "cpu":
            raise UsageError(f"--offload {offload} gives a device's memory back, and --device is cpu: leave it out")
        elif offload == "model":
            pipeline.enable_model_cpu_offload(device=device)
        else:
            pipeline.enable_group_offload(
                onload_device=device, offload_device=torch.device("cpu"), offload_type="leaf_level"
            )
    except torch.OutOfMemoryError as error:
        raise HostError(
            f"{type(pipeline).__name__} does not fit on {device}: give --offload model or group, or "
            "--precision bfloat16"
        ) from error


def placement_of(pipeline: Any, transformer: Any) -> Placement:
    """Where a pipeline that is in memory is, offloaded or not, and in what it computes."""
    device = torch.device(getattr(pipeline, "_execution_device", "cpu"))
    hooked = bool(getattr(pipeline, "_all_hooks", None)) or any(
        getattr(component, "_hf_hook", None) is not None for component in pipeline.components.values()
    )
    floating = [each.dtype for each in transformer.parameters() if each.is_floating_point()]
    return Placement(
        device=device, precision=floating[0] if floating else torch.float32, offload="model" if hooked else "none"
    )


class PeakBytes(TorchDispatchMode):
    """While it lasts, counts the memory of tensors that are made, on any device: `peak` bytes at most at once.

    known: tensors that are there already, such as weights.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known = [tensor.untyped_storage() for tensor in known if type(tensor) in (Tensor, torch.nn.Parameter)]
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet(self._known)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self._count(value)
        return result

    def _count(self, value: Tensor) -> None:
        try:
            storage = value.untyped_storage()
        except (RuntimeError, NotImplementedError):
            return
        if storage in self._seen:
            return
        self._seen.add(storage)
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, size)

    def _drop(self, size: int) -> None:
        self.live -= size


def free_bytes(device: torch.device) -> int | None:
    """Free memory of a device; None where it is not known."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type != "cpu":
        return None
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            lines = dict(line.split(":", 1) for line in file)
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None


def choose_micro_batch(sample_bytes: int, free: int | None) -> int:
    """A power of two up to `LARGEST_MICRO_BATCH` whose activations fit. Raises HostError where one sample's do not.

    Args:
        sample_bytes: activations of one sample's evaluation, all branches.
        free: memory of the device; None where it is not known.

    >>> choose_micro_batch(1 << 30, 10 << 30)
    4
    """
    if free is None:
        return LARGEST_MICRO_BATCH
    size = LARGEST_MICRO_BATCH
    while size > 1 and size * sample_bytes > SHARE * free:
        size //= 2
    if sample_bytes > free:
        raise HostError(
            f"one sample's evaluation takes about {sample_bytes / 1e9:.1f} GB beside the model, and "
            f"{free / 1e9:.1f} GB are free: give a smaller --height and --width, --offload model or group, or "
            "--precision bfloat16"
        )
    return size
