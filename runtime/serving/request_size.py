"""The size of a request: which one it is, whether the artifact serves it, and the manifest for it.

Consumes what a request gives of `height`, `width`, `num_frames` and `max_sequence_length`; what it leaves out is as
compiled. Sizes that were asked for before are kept, so that a server pays for the checks once.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import get_args

import numpy as np

from otcache.schemas.errors import ArtifactError, RequestError
from otcache.schemas.manifest import Manifest
from otcache.schemas.messages import damage_error, one_line
from otcache.schemas.shapes import AxisName, describe_size
from otcache.schemas.sized import manifest_at, own_size, served_size

from ..artifact.reader import Artifact
from ..loop.backend import DTYPES, Array, shape_of
from ..messages import OPTIONS

KEPT = 64
"""Sizes whose manifests are kept."""
Given = Mapping[str, int | None]
"""What a request says of its size, None for what it leaves to the artifact."""


@dataclass(frozen=True, eq=False)
class AtSize:
    """An artifact at one size."""

    manifest: Manifest
    """With the shapes and programs that hold there."""
    constants: Mapping[str, Array]
    """The trunk's inputs that follow from the size alone, by name."""


class Sizes:
    """The sizes of one artifact. Safe to use from several threads."""

    def __init__(self, artifact: Artifact) -> None:
        self._artifact = artifact
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, AtSize] = OrderedDict()

    def at(self, given: Given) -> AtSize:
        """The artifact at a request's size. Raises RequestError for one that is not served, ArtifactError."""
        size = parse_size(self._artifact.manifest, given)
        key = describe_size(size)
        with self._lock:
            if key not in self._kept:
                self._kept[key] = self._make(size)
                while len(self._kept) > KEPT:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(key)
            return self._kept[key]

    def _make(self, size: dict[AxisName, int]) -> AtSize:
        try:
            manifest = manifest_at(self._artifact.manifest, size)
        except ValueError as error:
            raise ArtifactError(
                f"artifact is damaged: manifest.json: at {describe_size(size)}: {one_line(error)}: compile it again"
            ) from None
        entry = served_size(self._artifact.manifest, size)
        inputs = {tensor.name: tensor for tensor in manifest.steady_inputs}
        constants = {}
        for name, path in (entry.constants if entry else {}).items():
            dtype, shape = np.dtype(DTYPES[inputs[name].dtype]).newbyteorder("<"), shape_of(inputs[name], 1)
            expected = math.prod(shape) * dtype.itemsize
            data = self._artifact.read(path, expected)
            if len(data) != expected:
                raise damage_error(path, f"{len(data)} bytes", f"{expected} bytes for {name} at {describe_size(size)}")
            constants[name] = np.frombuffer(data, dtype).reshape(shape)
        return AtSize(manifest, constants)


def parse_size(manifest: Manifest, given: Given) -> dict[AxisName, int]:
    """A value for each axis. Raises RequestError, with the range, for what the artifact does not serve."""
    shapes, conditions = manifest.shapes, manifest.conditions
    axes = {axis.name: axis for axis in shapes.axes} if shapes else {}
    size = own_size(manifest)
    for name in get_args(AxisName):
        value = given.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | np.integer):
            raise RequestError(f"{name} is {one_line(repr(value), 40)}: expected a whole number")
        own = getattr(conditions, name)
        if name not in axes and value != own:
            why = f" ({shapes.fixed[name]})" if shapes and name in shapes.fixed else ""
            expected = (
                "none, because the artifact draws pictures" if own is None else f"{own}, the only one it serves{why}"
            )
            raise RequestError(f"{name} is {value}: expected {expected}: compile with {OPTIONS[name]}")
        if name in axes:
            if value not in axes[name]:
                raise RequestError(
                    f"{name} is {value}: expected {axes[name]}: compile with {OPTIONS[name]} that hold it"
                )
            size[name] = int(value)
    if shapes and shapes.sizes and served_size(manifest, size) is None:
        listed = "; ".join(describe_size(entry.size) for entry in shapes.sizes)
        raise RequestError(
            f"size is {describe_size(size)}: expected one of {listed}: compile with --sizes that list it"
        )
    return size
