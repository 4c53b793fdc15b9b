"""Where a pipeline's components are while it is calibrated: the device, what leaves it in between, and how many samples
it takes at once.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from otcache.schemas.errors import HostError, UsageError

from ..models.offloading import hooks_by_weight

Offload = Literal["none", "model", "group"]
LARGEST_MICRO_BATCH = 8
"""Of `--micro-batch auto`: beyond it a device gains little, and an interrupted pass loses more."""
SHARE = 0.6
"""Of the free memory that a micro-batch's activations may take: an allocator needs room beside them."""


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where the model is evaluated, and in what."""

    device: torch.device
    precision: torch.dtype
    offload: Offload = "none"
    """What leaves the device between calls: nothing, whole components, or parts of them."""

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
        float(torch.ones(1, device=device))  # which a device without memory of its own, such as meta, cannot answer
    except (RuntimeError, NotImplementedError, AssertionError) as error:
        raise HostError(f"--device is {name}: torch cannot use it here: give cpu, or run where it is") from error
    return device


def check_placement(placement: Placement) -> None:
    """Raises UsageError for offloading without a device to offload from, HostError for a precision that it lacks."""
    device, precision = placement.device, placement.precision
    if placement.offload != "none" and device.type == "cpu":
        raise UsageError(
            f"--offload {placement.offload} gives a device's memory back, and the model is evaluated on the CPU: leave "
            "it out"
        )
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
        elif offload == "model":
            pipeline.enable_model_cpu_offload(device=device)
        else:
            pipeline.enable_group_offload(
                onload_device=device, offload_device=torch.device("cpu"), offload_type="leaf_level"
            )
    except torch.OutOfMemoryError as error:
        raise HostError(
            f"{type(pipeline).__name__} does not fit on {device}: give --offload model or group, or --precision "
            "bfloat16"
        ) from error


def placement_of(pipeline: Any, transformer: Any) -> Placement:
    """Where a pipeline that is in memory is, offloaded or not, and in what it computes."""
    device = torch.device(getattr(pipeline, "_execution_device", "cpu"))
    modules = [each for each in pipeline.components.values() if isinstance(each, torch.nn.Module)]
    hooks = {hook for module in modules for hook in hooks_by_weight(module).values()}
    grouped = bool(hooks - {"CpuOffload"})
    offload: Offload = "group" if grouped else "model" if hooks or getattr(pipeline, "_all_hooks", None) else "none"
    return Placement(device=device, precision=_precision_of(transformer), offload=offload)


def _precision_of(transformer: Any) -> torch.dtype:
    """The dtype in which a transformer computes: that of most of its floating-point elements, as diffusers keeps some
    layers in float32; of one whose weights are all packed what it says itself.
    """
    counts: dict[torch.dtype, int] = {}
    for each in transformer.parameters():
        if each.is_floating_point() and each.dtype.itemsize > 1:
            counts[each.dtype] = counts.get(each.dtype, 0) + each.numel()
    if counts:
        return max(counts, key=lambda dtype: counts[dtype])
    stated = getattr(transformer, "dtype", None)
    return stated if isinstance(stated, torch.dtype) and stated.is_floating_point else torch.float32


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
    if device.type != "cpu":
        told = getattr(getattr(torch, device.type, None), "mem_get_info", None)
        return None if told is None else int(told(device)[0])
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            lines = dict(line.split(":", 1) for line in file)
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None


def size_text(count: int) -> str:
    """Bytes as people read them: GB, or MB of less than 0.1 GB."""
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.2g} MB"


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
            f"one sample's evaluation takes about {size_text(sample_bytes)} beside the model, and {size_text(free)} "
            "are free: give a smaller --height and --width, --offload model or group, or --precision bfloat16"
        )
    return size
