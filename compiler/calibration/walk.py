"""A schedule walked by the samples of one device, each with coefficients of its own.

What the fit needs of a step are inner products (`StepStatistics`); they are summed in float64 over blocks of a sample's
elements, the prior's part subtracted before anything can cancel. The means over a sample's positions are not written
out: the product of two that are spread over P positions is P times that of the means.

Shapes: n samples, latents (n, …) float32; regressors are latents and outputs, newest last, and then the means of each.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from otcache.schemas.program import position_axes

from ..programs.update import log_change, mean
from .batch import Batch
from .runs import GRAM_ELEMENTS, FloatArray
from .samples import LocalSamples, Rows, StepStatistics
from .scoring import scores_from_latents


class LocalWalk:
    """See `samples.Walk`."""

    def __init__(self, samples: LocalSamples, memory: int) -> None:
        self.samples, self.memory = samples, memory
        self.file, self.latents = samples.array((samples.count, *samples.runs.latents_shape))
        for rows, values in samples.batches(lambda batch: samples.runs.latents(batch.rows, 0)):
            self.latents[rows] = values
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
            self.latents[row : row + 1] = combined(weights[row], values).numpy()
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


def combined(weights: NDArray[np.float32], values: Sequence[Tensor]) -> Tensor:
    """Σ w_r u_r, and where there are twice as many weights as values the means of values after them.

    Args:
        weights: (r,) or (2r,).
        values: latents and outputs of one sample, (1, …) each.
    """
    terms = [*values, *(map(mean, values) if len(weights) > len(values) else ())]
    total = torch.zeros_like(terms[0])
    for weight, term in zip(weights, terms, strict=True):
        total.add_(term, alpha=float(weight))
    return total


def step_statistics(
    latents: NDArray[np.float32],
    outputs: Sequence[NDArray[np.float32]],
    here: NDArray[np.float32],
    target: NDArray[np.float32],
    prior: FloatArray,
) -> tuple[FloatArray, FloatArray, float, float]:
    """Gram matrix (r, r), products with the remainder (r,), ‖x − X‖ and ‖X‖ of one sample.

    Args:
        latents: x, where the sample is; (…).
        outputs: v, newest last; (…) each.
        here: X_i, where the full run is.
        target: X_j, where the full run goes.
        prior: coefficients (1 + outputs,); the remainder is X_j − Σ prior · u.
    """
    values = np.stack([latents, *outputs]).reshape(1 + len(outputs), -1)
    goal = target.reshape(-1)
    count = len(values)
    gram, cross, distance, size = np.zeros((count, count)), np.zeros(count), 0.0, 0.0
    for start in range(0, values.shape[1], GRAM_ELEMENTS):
        part = slice(start, start + GRAM_ELEMENTS)
        block = values[:, part].astype(np.float64)
        gram += block @ block.T
        cross += block @ (goal[part] - prior @ block)
        reference = here.reshape(-1)[part].astype(np.float64)
        distance += float(np.square(block[0] - reference).sum())
        size += float(np.square(reference).sum())
    axes = tuple(axis - 1 for axis in position_axes(latents.ndim + 1))
    if axes:
        positions = int(np.prod([latents.shape[axis] for axis in axes]))
        means = np.stack([_mean(value, axes) for value in (latents, *outputs)])
        remainder = _mean(target, axes) - prior @ means
        products, leftover = positions * means @ means.T, positions * means @ remainder
        gram = np.block([[gram, products], [products, products]])
        cross = np.concatenate([cross, leftover])
    return gram, cross, float(np.sqrt(distance)), float(np.sqrt(size))


def _mean(value: NDArray[np.float32], axes: tuple[int, ...]) -> FloatArray:
    """Over positions, flattened float64: the float32 mean that a program takes."""
    return mean(torch.from_numpy(np.asarray(value))[None])[0].double().numpy().reshape(-1)
