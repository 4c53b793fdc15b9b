"""A second device, `alt`, whose memory is the host's: operators run on the CPU, and refuse tensors of two devices.

As on a GPU, a tensor of one number from the host may meet tensors of the device, indices may be the host's, and
everything else raises. `install` registers it with torch for the rest of the process.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._pytree import tree_iter, tree_map

NAME = "alt"
DEVICE = "alt:0"
COPIES = ("copy_", "_to_copy", "_copy_from", "_copy_from_and_resize")
"""Operators whose business is to take values from one device to another."""
MULTIPLIES = ("addmm", "mm", "bmm", "linear", "matmul")
"""Operators that are not there for a precision that the device lacks (`ALT_LACKS=torch.bfloat16`)."""
INDEXED = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index")
"""Operators that take indices of the host."""


class AltTensor(torch.Tensor):
    """A tensor of the device; `host` holds its values."""

    host: torch.Tensor

    @staticmethod
    def __new__(cls, host: torch.Tensor) -> AltTensor:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            host.shape,
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            device=DEVICE,
            requires_grad=False,
        )
        made.host = host
        return made

    def tolist(self) -> Any:
        return self.host.tolist()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"AltTensor({self.host!r})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:  # its choice of kernels is for devices of torch's
            return run(func, args, kwargs or {})
        with (
            torch._C.DisableTorchFunctionSubclass()
        ):  # else what comes back to the host is called a tensor of the device
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class Tensors(TorchFunctionMode):
    """While it lasts, `torch.tensor` makes tensors of the device as well: its own way there knows torch's alone."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if func is torch.tensor and device is not None and torch.device(device).type == NAME:
            return func(*args, **{**kwargs, "device": None}).to(device)
        return func(*args, **kwargs)


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operator on the values, after a check that its tensors are of one device."""
    name = getattr(getattr(func, "overloadpacket", func), "__name__", str(func))
    tensors = [value for value in tree_iter((args, kwargs)) if isinstance(value, torch.Tensor)]
    alt = [value for value in tensors if isinstance(value, AltTensor)]
    if name not in COPIES:
        checked = tensors[:1] if name in INDEXED else tensors
        if alt and any(not isinstance(value, AltTensor) and value.ndim for value in checked):
            raise RuntimeError(f"Expected all tensors to be on the same device, but found {DEVICE} and cpu, in {func}")
    if alt and name in MULTIPLIES and any(str(value.dtype) == os.environ.get("ALT_LACKS") for value in alt):
        raise NotImplementedError(f'"{name}" not implemented for {alt[0].dtype} on {DEVICE}')
    device = kwargs.get("device")
    stays = bool(alt) if device is None else torch.device(device).type == NAME
    if device is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    if kwargs.get("pin_memory"):
        kwargs = {**kwargs, "pin_memory": False}
    result = func(*tree_map(_host, args), **tree_map(_host, kwargs))
    if name in ("copy_", "_copy_from", "_copy_from_and_resize"):
        return args[1] if name.startswith("_copy_from") else args[0]
    known = {id(value.host): value for value in alt}
    return tree_map(lambda value: _wrapped(value, known) if stays else value, result)


def _host(value: Any) -> Any:
    return value.host if isinstance(value, AltTensor) else value


def _wrapped(value: Any, known: dict[int, AltTensor]) -> Any:
    """An operator's result on the device: one of its own arguments where it works in place."""
    if not isinstance(value, torch.Tensor) or isinstance(value, AltTensor):
        return value
    return known[id(value)] if id(value) in known else AltTensor(value)


class Module(backend_registration._DummyBackendModule):
    """`torch.alt`, as `torch.cuda` is for a GPU. `ALT_FREE_BYTES` says how much memory is free, of several numbers one
    each time that somebody asks, and then the last.
    """

    def __init__(self) -> None:
        super().__init__()
        self.free = [int(each) for each in os.environ.get("ALT_FREE_BYTES", str(1 << 40)).split(",")]

    def mem_get_info(self, device: Any = None) -> tuple[int, int]:
        free = self.free.pop(0) if len(self.free) > 1 else self.free[0]
        return free, free

    def empty_cache(self) -> None:
        pass


@functools.cache
def install() -> None:
    """Make the device known to torch."""
    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=Module())
    library = torch.library.Library("_", "IMPL")

    def fallback(func: Any, *args: Any, **kwargs: Any) -> Any:
        return run(func, args, kwargs)

    library.fallback(fallback, "PrivateUse1")
    install.library = library  # type: ignore[attr-defined]


if __name__ == "__main__":  # the command line, where the device is known
    from otcache.runtime.cli.main import main

    install()
    with Tensors():
        main()
