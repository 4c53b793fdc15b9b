"""The size of a request: which one it is, whether the artifact serves it, and the manifest for it.

Consumes what a request gives of `height`, `width`, `num_frames` and `max_sequence_length`; what it leaves out is as
compiled. Sizes that were asked for before are kept, so that a server pays for the checks once.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Mapping
from typing import get_args

import numpy as np

from otcache.schemas.errors import ArtifactError, RequestError
from otcache.schemas.manifest import Manifest
from otcache.schemas.messages import damaged, one_line
from otcache.schemas.shapes import AxisName, described
from otcache.schemas.sized import own_size, served_size, sized

from ..artifact.reader import Artifact
from ..loop.backend import DTYPES, Array, shape_of
from ..messages import OPTIONS

KEPT = 64
"""Sizes whose manifests are kept."""
Given = Mapping[str, int | None]
"""What a request says of its size, None for what it leaves to the artifact."""


class Sizes:
    """The sizes of one artifact. Safe to use from several threads."""

    def __init__(self, artifact: Artifact) -> None:
        self._artifact = artifact
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, tuple[Manifest, dict[str, Array]]] = OrderedDict()

    def manifest(self, given: Given) -> Manifest:
        """The manifest as it is for a request's size. Raises RequestError for a size that is not served."""
        return self._at(given)[0]

    def constants(self, given: Given) -> dict[str, Array]:
        """The trunk's inputs that follow from the size alone, by name. Raises RequestError and ArtifactError."""
        return self._at(given)[1]

    def _at(self, given: Given) -> tuple[Manifest, dict[str, Array]]:
        request = requested(self._artifact.manifest, given)
        key = described(request)
        with self._lock:
            if key not in self._kept:
                self._kept[key] = self._made(request)
                while len(self._kept) > KEPT:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(key)
            return self._kept[key]

    def _made(self, request: dict[AxisName, int]) -> tuple[Manifest, dict[str, Array]]:
        try:
            manifest = sized(self._artifact.manifest, request)
        except ValueError as error:
            raise ArtifactError(
                f"artifact is damaged: manifest.json: at {described(request)}: {one_line(error)}: compile it again"
            ) from None
        entry = served_size(self._artifact.manifest, request)
        held = {tensor.name: tensor for tensor in manifest.held}
        constants = {}
        for name, path in (entry.constants if entry else {}).items():
            data, dtype = self._artifact.read(path), np.dtype(DTYPES[held[name].dtype]).newbyteorder("<")
            shape = shape_of(held[name], 1)
            expected = math.prod(shape) * dtype.itemsize
            if len(data) != expected:
                raise damaged(path, f"{len(data)} bytes", f"{expected} bytes for {name} at {described(request)}")
            constants[name] = np.frombuffer(data, dtype).reshape(shape)
        return manifest, constants


def requested(manifest: Manifest, given: Given) -> dict[AxisName, int]:
    """A value for each axis. Raises RequestError, with the range, for what the artifact does not serve."""
    shapes, conditions = manifest.shapes, manifest.conditions
    axes = {axis.name: axis for axis in shapes.axes} if shapes else {}
    request = own_size(manifest)
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
            request[name] = int(value)
    if shapes and shapes.sizes and served_size(manifest, request) is None:
        listed = "; ".join(described(entry.size) for entry in shapes.sizes)
        raise RequestError(f"size is {described(request)}: expected one of {listed}: compile with --sizes that list it")
    return request
