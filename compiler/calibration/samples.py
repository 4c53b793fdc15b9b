"""The seam between tensors and decisions: a set of samples that answers with a few numbers for each of them.

Searches, fits and comparisons see `Samples` only. Tensors stay where they were made: `LocalSamples` holds them in mapped
files and works on one micro-batch after the other on one device; a `Fleet` is several sets as one. Answers have one row
a sample, in the samples' order, so that sums over samples do not depend on who computed what.

Shapes: n samples, T steps, r regressors of a step: latents, the outputs that it weighs, and the means of each.
"""

from __future__ import annotations

import contextlib
import math
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from otcache.schemas.digest import digest_of_value
from otcache.schemas.errors import HostError

from ..workspace.whole_files import part_folder
from .batch import Batch, Evaluator, batch_from_rows
from .runs import FloatArray, Runs, new_array

Rows = dict[str, NDArray[Any]]
"""Named arrays with one row a sample."""
Notify = Callable[[str], None]

OUTPUT_BYTES = 4 << 30
"""Of evaluated outputs that are kept on the disk, so that walks which share their first steps share those."""


@dataclass(frozen=True, kw_only=True)
class StepStatistics:
    """What a fit needs to know of a computed step: inner products of what it weighs, for each sample."""

    gram: FloatArray
    """(n, r, r) of the regressors: latents and outputs, newest last, and then the means of each of them."""
    cross: FloatArray
    """(n, r) of the regressors with what the prior leaves of the target."""
    distance: FloatArray
    """(n,) ‖x − X‖ of the latents from the full run's at this step."""
    size: FloatArray
    """(n,) ‖X‖."""
    change: FloatArray | None
    """(n,) how much the output changed since the one before (`programs.update.log_change`); None at the first."""
    evaluations: int
    """Model evaluations that were made for this, of one sample each."""


class Walk(Protocol):
    """A schedule walked step by step by all samples, each with coefficients of its own."""

    def compute(self, step_index: int, following: int, prior: FloatArray) -> StepStatistics:
        """Evaluate the model where the samples are, and compare what a step to `following` can reach with the full run.

        Args:
            step_index: where the samples are.
            following: where they go, at most T.
            prior: coefficients (1 + outputs,) of latents and outputs that the step would take without a fit.
        """

    def advance(self, coefs: FloatArray) -> None:
        """Take the step, with coefficients (n, r)."""

    def finish(self) -> Rows:
        """Scores of the pictures that the samples have come to (`scoring.scores_from_latents`); the walk is closed."""

    def close(self) -> None:
        """Give back what the walk holds."""


class Samples(Protocol):
    """A set of samples with their full runs."""

    @property
    def count(self) -> int:
        """n."""

    @property
    def elements(self) -> int:
        """Numbers of one sample's latents."""

    @property
    def caches_residuals(self) -> bool:
        """Whether the model has blocks whose residuals can be cached, and was cut."""

    def trajectory_gram(self) -> FloatArray:
        """Inner products float64 (n, 2T+1, 2T+1) of X_0 … X_T, V_0 … V_{T−1}."""

    def map(self, function: Callable[[Batch], Rows], rows: slice = slice(None)) -> Rows:
        """What `function` answers for each micro-batch of the samples `rows`, one after the other."""

    def walk(self, memory: int) -> Walk:
        """A walk that starts at the full runs' first latents and weighs at most so many outputs."""


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


class LocalSamples:
    """Samples on one device. Everything large is in mapped files of a scratch folder, which goes with this object."""

    def __init__(
        self, runs: Runs, evaluator: Evaluator, micro_batch: MicroBatch, folder: Path, output_bytes: int = OUTPUT_BYTES
    ) -> None:
        """`folder`: of the workspace, where the scratch folder is made."""
        self.runs, self.evaluator, self.micro_batch = runs, evaluator, micro_batch
        folder.mkdir(parents=True, exist_ok=True)
        stack = contextlib.ExitStack()
        self.scratch = stack.enter_context(part_folder(folder / "samples"))
        weakref.finalize(self, stack.close)
        self._outputs = OutputStore(self.scratch, output_bytes)
        self._names = 0

    @property
    def count(self) -> int:
        """n."""
        return self.runs.count

    @property
    def elements(self) -> int:
        """See `Samples`."""
        return math.prod(self.runs.latents_shape)

    @property
    def caches_residuals(self) -> bool:
        """See `Samples`."""
        return self.evaluator.caches_residuals

    def trajectory_gram(self) -> FloatArray:
        """See `Samples`."""
        return self.runs.gram()

    def map(self, function: Callable[[Batch], Rows], rows: slice = slice(None)) -> Rows:
        """See `Samples`."""
        parts = [answer for _, answer in self.batches(function, rows)]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def batches(self, function: Callable[[Batch], Any], rows: slice = slice(None)) -> Iterator[tuple[slice, Any]]:
        """(samples, what `function` answers for them), one micro-batch after the other."""
        start, stop, _ = rows.indices(self.count)
        while start < stop:
            part = slice(start, min(start + self.micro_batch.size, stop))
            failure: Exception | None = None
            try:
                answer = function(batch_from_rows(self.runs, self.evaluator, part, self.scratch))
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                failure = error
            if failure is not None:  # outside of the handler, whose traceback keeps the tensors
                failure = failure.with_traceback(None)
                self.micro_batch.halve(failure)
                release(self.evaluator.device)
                continue
            yield part, answer
            start = part.stop

    def walk(self, memory: int) -> Walk:
        """See `Samples`."""
        from .walk import LocalWalk

        return LocalWalk(self, memory)

    def array(self, shape: Sequence[int], dtype: Any = np.float32) -> tuple[Path, np.memmap[Any, Any]]:
        """A new array in the scratch folder; whoever made it removes the file."""
        self._names += 1
        path = self.scratch / f"{self._names}.npy"
        return path, new_array(path, shape, dtype)

    def outputs(self, path: str, step_index: int, evaluate: Callable[[Batch], NDArray[np.float32]]) -> Output:
        """Guided outputs (n, …) at a step that walks came to by `path`; evaluated, or known from another walk."""
        key = digest_of_value([path, step_index])[7:31]
        if (known := self._outputs.get(key)) is not None:
            return Output(known, 0)
        if not path and step_index == 0:
            return Output(self._outputs.put(key, self.runs.first_output(slice(None))), 0)
        array = self._outputs.new(key, (self.count, *self.runs.latents_shape))
        for rows, values in self.batches(evaluate):
            array[rows] = values
        return Output(array, self.count)


@dataclass(frozen=True)
class Output:
    """Guided outputs (n, …) float32, and the evaluations that they took now."""

    array: NDArray[np.float32]
    evaluations: int


class OutputStore:
    """Arrays in files of a folder, by key; those that were used longest ago make room for others."""

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.folder, self.limit_bytes = folder, limit_bytes
        self._arrays: OrderedDict[str, NDArray[np.float32]] = OrderedDict()

    def get(self, key: str) -> NDArray[np.float32] | None:
        """The array, or None for one that is not there (any more)."""
        if key in self._arrays:
            self._arrays.move_to_end(key)
        return self._arrays.get(key)

    def new(self, key: str, shape: Sequence[int]) -> np.memmap[Any, Any]:
        """A new array to fill. One that has made room stays readable for those who hold it."""
        array = new_array(self.folder / f"{key}.npy", shape)
        self._arrays[key] = array
        total = sum(each.nbytes for each in self._arrays.values())
        while total > self.limit_bytes and len(self._arrays) > 1:
            old, dropped = self._arrays.popitem(last=False)
            total -= dropped.nbytes
            (self.folder / f"{old}.npy").unlink(missing_ok=True)
        return array

    def put(self, key: str, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Keep values that are known."""
        array = self.new(key, values.shape)
        array[:] = values
        return array


def release(device: torch.device) -> None:
    """Give cached memory of a device back to it."""
    module = getattr(torch, device.type, None)
    if module is not None and hasattr(module, "empty_cache"):
        module.empty_cache()


class Fleet:
    """Several sets of samples as one: their samples one after the other, in the order of the members."""

    def __init__(self, members: Sequence[Samples]) -> None:
        self.members = tuple(members)
        counts = [member.count for member in self.members]
        ends = np.cumsum(counts).tolist()
        self.parts = [slice(end - count, end) for end, count in zip(ends, counts, strict=True)]

    @property
    def count(self) -> int:
        """n, of all members."""
        return self.parts[-1].stop

    @property
    def elements(self) -> int:
        """See `Samples`."""
        return self.members[0].elements

    @property
    def caches_residuals(self) -> bool:
        """See `Samples`."""
        return all(member.caches_residuals for member in self.members)

    def trajectory_gram(self) -> FloatArray:
        """See `Samples`."""
        return np.concatenate([member.trajectory_gram() for member in self.members])

    def map(self, function: Callable[[Batch], Rows], rows: slice = slice(None)) -> Rows:
        """See `Samples`. A batch's `rows` are those of its member."""
        start, stop, _ = rows.indices(self.count)
        answers = [
            member.map(function, slice(max(start - part.start, 0), min(stop, part.stop) - part.start))
            for member, part in zip(self.members, self.parts, strict=True)
            if start < part.stop and stop > part.start
        ]
        return {name: np.concatenate([answer[name] for answer in answers]) for name in answers[0]}

    def walk(self, memory: int) -> Walk:
        """See `Samples`."""
        return FleetWalk([member.walk(memory) for member in self.members], self.parts)


class FleetWalk:
    """The walks of a fleet's members as one."""

    def __init__(self, walks: Sequence[Walk], parts: Sequence[slice]) -> None:
        self.walks, self.parts = walks, parts

    def compute(self, step_index: int, following: int, prior: FloatArray) -> StepStatistics:
        """See `Walk`."""
        found = [walk.compute(step_index, following, prior) for walk in self.walks]
        changes = [each.change for each in found if each.change is not None]
        return StepStatistics(
            gram=np.concatenate([each.gram for each in found]),
            cross=np.concatenate([each.cross for each in found]),
            distance=np.concatenate([each.distance for each in found]),
            size=np.concatenate([each.size for each in found]),
            change=np.concatenate(changes) if changes else None,
            evaluations=sum(each.evaluations for each in found),
        )

    def advance(self, coefs: FloatArray) -> None:
        """See `Walk`."""
        for walk, part in zip(self.walks, self.parts, strict=True):
            walk.advance(coefs[part])

    def finish(self) -> Rows:
        """See `Walk`."""
        found = [walk.finish() for walk in self.walks]
        return {name: np.concatenate([each[name] for each in found]) for name in found[0]}

    def close(self) -> None:
        """See `Walk`."""
        for walk in self.walks:
            walk.close()
