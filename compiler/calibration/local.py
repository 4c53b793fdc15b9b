"""Samples of one device: tensors in mapped files, micro-batches, and evaluations that are made once.

Shapes: n samples, latents (n, …) float32; regressors are latents and outputs, newest last, and then the means of each.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from otcache.schemas.arithmetic import log_change
from otcache.schemas.digest import digest_of_value

from ..workspace.disk import locked_part_folder
from .batch import Batch, Evaluator, batch_from_rows
from .micro_batch import MicroBatch
from .runs import FloatArray, Runs, new_array
from .samples import Rows, StepStatistics
from .scoring import scores_from_latents
from .step_statistics import combine, step_statistics

OUTPUT_BYTES = 4 << 30
"""Of evaluated outputs that are kept on the disk, so that walks which share their first steps share those."""


class LocalSamples:
    """Samples on one device. Everything large is in mapped files of a scratch folder, which goes with this object."""

    def __init__(
        self,
        runs: Runs,
        evaluator: Evaluator,
        micro_batch: MicroBatch,
        folder: Path,
        output_bytes: int = OUTPUT_BYTES,
        first: int = 0,
    ) -> None:
        """`folder`: of the workspace, where the scratch folder is made. `first`: see `Batch`."""
        self.runs, self.evaluator, self.micro_batch, self.first = runs, evaluator, micro_batch, first
        folder.mkdir(parents=True, exist_ok=True)
        stack = contextlib.ExitStack()
        self.scratch = stack.enter_context(locked_part_folder(folder / "samples"))
        self._finalizer = weakref.finalize(self, stack.close)
        self._outputs = OutputStore(self.scratch, output_bytes)
        self._names = 0

    def close(self) -> None:
        """Remove the scratch folder; nothing can be asked afterwards."""
        self._finalizer()

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

        def compute(part: slice) -> Any:
            return function(batch_from_rows(self.runs, self.evaluator, part, self.scratch, self.first))

        return self.micro_batch.run(slice(start, stop), compute, self.evaluator.device)

    def walk(self, memory: int) -> LocalWalk:
        """See `Samples`."""
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
            array = self._outputs.new(key, (self.count, *self.runs.latents_shape))
            for row in range(self.count):
                array[row] = self.runs.first_output(slice(row, row + 1))[0]
            self._outputs.keep(key, array)
            return Output(array, 0)
        array = self._outputs.new(key, (self.count, *self.runs.latents_shape))
        for rows, values in self.batches(evaluate):
            array[rows] = values
        self._outputs.keep(key, array)
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
        """A new array to fill, not known by its key until it is kept. Those that make room for it stay readable for
        who holds them.
        """
        array = new_array(self.folder / f"{key}.npy", shape)
        total = array.nbytes + sum(each.nbytes for each in self._arrays.values())
        while total > self.limit_bytes and self._arrays:
            old, dropped = self._arrays.popitem(last=False)
            total -= dropped.nbytes
            (self.folder / f"{old}.npy").unlink(missing_ok=True)
        return array

    def keep(self, key: str, array: NDArray[np.float32]) -> None:
        """Know an array that was filled by its key."""
        self._arrays[key] = array


class LocalWalk:
    """See `samples.Walk`."""

    def __init__(self, samples: LocalSamples, memory: int) -> None:
        self.samples, self.memory = samples, memory
        self.file, self.latents = samples.array((samples.count, *samples.runs.latents_shape))
        for row in range(samples.count):
            self.latents[row] = samples.runs.latents(slice(row, row + 1), 0)[0]
        self.outputs: list[NDArray[np.float32]] = []
        self.path = ""

    def compute(self, step_index: int, following: int, prior: FloatArray) -> StepStatistics:
        """See `samples.Walk`."""
        runs = self.samples.runs
        table = self.samples.evaluator.table
        timestep, scale = float(table.timesteps[step_index]), float(table.input_scales[step_index])

        def evaluate(batch: Batch) -> NDArray[np.float32]:
            found = batch.denoiser(batch.tensor(self.latents[batch.rows]), timestep, scale)
            return found.float().cpu().numpy()

        output = self.samples.outputs(self.path, step_index, evaluate)
        self.outputs = [*self.outputs, output.array][-self.memory :]
        self.step_index = step_index
        found = [
            step_statistics(
                self.latents[row],
                [each[row] for each in self.outputs],
                runs.latents(slice(row, row + 1), step_index)[0],
                runs.latents(slice(row, row + 1), following)[0],
                prior,
            )
            for row in range(self.samples.count)
        ]
        gram, cross, distance, size = (np.stack(values) for values in zip(*found, strict=True))
        return StepStatistics(
            gram=gram,
            cross=cross,
            distance=distance,
            size=size,
            change=self._change(),
            evaluations=output.evaluations,
        )

    def _change(self) -> FloatArray | None:
        if len(self.outputs) < 2:
            return None
        before, newest = self.outputs[-2:]
        parts = [
            log_change(torch.from_numpy(before[row : row + 1]), torch.from_numpy(newest[row : row + 1]))
            for row in range(self.samples.count)
        ]
        return torch.cat(parts).double().numpy()

    def advance(self, coefs: FloatArray) -> None:
        """See `samples.Walk`."""
        weights = coefs.astype(np.float32)
        for row in range(self.samples.count):
            values = [torch.from_numpy(np.asarray(each[row : row + 1])) for each in (self.latents, *self.outputs)]
            self.latents[row : row + 1] = combine(weights[row], values).numpy()
        taken = coefs.astype(np.float64).tobytes()
        self.path = hashlib.sha256(f"{self.path} {self.step_index} ".encode() + taken).hexdigest()

    def finish(self) -> Rows:
        """See `samples.Walk`."""
        found = self.samples.map(lambda batch: scores_from_latents(batch, batch.tensor(self.latents[batch.rows])))
        self.close()
        return found

    def close(self) -> None:
        """See `samples.Walk`."""
        self.outputs = []
        self.file.unlink(missing_ok=True)
