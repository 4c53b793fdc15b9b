"""What the loop asks of a backend: load, bind, run, close."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from otcache.schemas.combinations import Combination
from otcache.schemas.manifest import Manifest, Stage, TensorInfo
from otcache.schemas.program import Program

from ..artifact.reader import Artifact
from .timing import Timer

Array = NDArray[Any]

DTYPES: dict[str, Any] = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "int64": np.int64,
    "int32": np.int32,
    "bool": np.bool_,
}
"""numpy's types of the manifest's."""


class Tensor(Protocol):
    """A buffer on the backend's device."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def write(self, array: Array) -> None:
        """Copy an array of the same shape in, converting its type."""

    def read(self) -> Array:
        """The content as an array of the tensor's type; valid until the buffer is written again."""


class Engine(Protocol):
    """A stage, ready to run. Safe to bind and run from several threads."""

    def bind(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> Callable[[], None]:
        """A function that reads `inputs` and fills `outputs`, both by tensor name. It raises HostError."""

    def close(self) -> None:
        """Free what the engine holds; it cannot run afterwards."""


@dataclass(frozen=True)
class Part:
    """What a backend loads: a stage, or a combination between stages, and the file of the artifact that holds it."""

    name: str
    """Of the stage, or @ and that of the combination."""
    contract: Stage | Combination
    file: str


@dataclass(frozen=True, kw_only=True)
class Run:
    """What is to be sampled, checked."""

    manifest: Manifest
    """For the request's size."""
    budget: str
    program: Program
    latents: NDArray[np.float32]
    """The first ones, (n, …)."""
    inputs: Mapping[str, Array]
    """Conditioning and constants of the size: with a batch (g, n, …), others as the manifest has them."""
    guidance_weights: Sequence[float]
    timer: Timer
    step_done: Callable[[int, int], None]
    """Called with the number of finished steps and of all."""
    watched: bool
    """Whether each step has to have ended when `step_done` is called; else the device may be behind."""


@dataclass(frozen=True)
class Origin:
    """Where the first number that is not finite was written."""

    engine: str
    """Name of a stage, of blocks in one engine, or @ and that of a combination between stages."""
    step: int
    """0-based, of the program's steps."""


class Denoiser(Protocol):
    """Runs programs on a device."""

    def __call__(self, run: Run) -> NDArray[np.float32]:
        """The final latents of a request, (n, …)."""

    def origin_of_spoilt(self, run: Run) -> Origin | None:
        """Run a request again, and say where its first number that is not finite is written; None if there is none."""

    def close(self) -> None:
        """Free what it has allocated."""


class Backend(Protocol):
    """A device and a way to run stages on it."""

    name: str

    def parts(self, manifest: Manifest) -> tuple[Part, ...]:
        """What has to be loaded, stages first."""

    def load(self, part: Part, artifact: Artifact) -> Engine:
        """The part's engine, from its verified file. Raises ArtifactError if the file does not hold it, HostError."""

    def empty(self, shape: Sequence[int], dtype: str) -> Tensor:
        """A new tensor, content undefined. Raises HostError if the device has no room or no such type."""

    def denoiser(self, manifest: Manifest, engines: Mapping[str, Any]) -> Denoiser:
        """The loop over this backend's engines, by the parts' names."""

    def check(self, samples: int, manifest: Manifest) -> None:
        """Raise RequestError if engines do not serve so many samples at once, or not at the size of `manifest`."""


MOST_THREADS = 1024
"""CPU threads of a stage that may be asked for: more than the largest hosts have cores. Each costs memory."""
MOST_SAMPLES = 4096
"""Pictures that one request may ask for: beyond what any device holds at once, so that a slip of the finger is told at
once rather than when memory is gone."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a backend shall run."""

    threads: int | None = None
    """CPU threads of a stage; None takes one for each core."""
    cuda_graph: bool = False
    """Record each program once and replay it as a whole, where the backend keeps everything on a GPU."""
    request: Mapping[str, int] = field(default_factory=dict)
    """`batch` and axes of a request that shall be served: a backend whose plans do not cover it is passed over."""


def shape_of(tensor: TensorInfo, batch: int) -> tuple[int, ...]:
    """Shape with the batch put in."""
    return tuple(batch if isinstance(size, str) else size for size in tensor.shape)
