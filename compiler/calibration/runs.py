"""Full runs of n samples in memory-mapped files: what everything that is calibrated or measured compares with.

A `Chunk` is a folder that holds consecutive samples and was written in one go (`RunWriter`); `Runs` are the chunks of a
set, read as one. Pages of mapped files are the system's to drop, so that a set of any size takes no memory of its own.

Shapes: T steps, n samples, one sample's latents (…) as the scheduler sees them. Latents and outputs are float32.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

FloatArray = NDArray[np.float64]
GRAM_VALUES = 1 << 21
"""Numbers whose products are summed at a time, of all rows together: 17 MB in float64, however many rows there are."""

LATENTS, OUTPUTS, FIRST_OUTPUT = "latents.npy", "outputs.npy", "first_output.npy"
GRAM, PICTURES, SCALARS, CONDITIONING = "gram.npy", "pictures.npy", "run.npz", "conditioning.safetensors"


def new_array(path: Path, shape: Sequence[int], dtype: Any = np.float32) -> np.memmap[Any, Any]:
    """A writable array in a new `.npy` file, whose room on the disk is taken at once.

    Raises OSError where the disk has no room for it: a write into a page that finds none would end the process.
    """
    array = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=tuple(shape))
    if hasattr(os, "posix_fallocate"):
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array


def map_array(path: Path) -> NDArray[Any]:
    """The array of a `.npy` file, read where it is touched."""
    array: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    return array


def gram_from_rows(rows: NDArray[np.float32], others: NDArray[np.float32] | None = None) -> FloatArray:
    """Inner products of rows (r, d), and of `others` (q, d) after them: float64 (r + q, r + q), in blocks of elements.

    >>> gram_from_rows(np.array([[1.0, 2.0], [0.0, 3.0]], np.float32))
    array([[5., 6.],
           [6., 9.]])
    """
    parts = [rows] if others is None else [rows, others]
    size = sum(len(part) for part in parts)
    gram = np.zeros((size, size))
    elements = max(1, GRAM_VALUES // max(1, size))
    for start in range(0, rows.shape[1], elements):
        block = np.concatenate([part[:, start : start + elements] for part in parts], dtype=np.float64)
        gram += block @ block.T
    return gram


class RunWriter:
    """Writes full runs of n samples into a folder while they are made, one step at a time."""

    def __init__(self, folder: Path, count: int, num_inference_steps: int, latents_shape: Sequence[int]) -> None:
        self.folder, self.count = folder, count
        self.latents = new_array(folder / LATENTS, (count, num_inference_steps + 1, *latents_shape))
        self.outputs = new_array(folder / OUTPUTS, (count, num_inference_steps, *latents_shape))
        self.timesteps = np.full(num_inference_steps, np.nan)

    def write_step(
        self, rows: Sequence[int], step_index: int, timestep: float, before: Tensor, output: Tensor, after: Tensor
    ) -> None:
        """Latents before and after a step, and the guided output between them, of some of the samples: (m, …) each."""
        self.timesteps[step_index] = timestep
        self.latents[rows, step_index] = before.float().cpu().numpy()
        self.outputs[rows, step_index] = output.float().cpu().numpy()
        if step_index == self.outputs.shape[1] - 1:
            self.latents[rows, -1] = after.float().cpu().numpy()

    def finish(self, conditioning: dict[str, Tensor], guidance: Sequence[float]) -> None:
        """Write what remains, and weigh the run; outputs after the first are not kept.

        Args:
            conditioning: by name, (branches, n, …) in the dtype that the model takes.
            guidance: scale of each sample (n,).
        """
        save_file(
            {name: value.transpose(0, 1).contiguous().cpu() for name, value in conditioning.items()},
            self.folder / CONDITIONING,
        )
        np.savez(self.folder / SCALARS, timesteps=self.timesteps, guidance=np.asarray(guidance, dtype=np.float32))
        first = new_array(self.folder / FIRST_OUTPUT, (self.count, *self.outputs.shape[2:]))
        total = self.latents.shape[1] + self.outputs.shape[1]
        gram = new_array(self.folder / GRAM, (self.count, total, total), np.float64)
        for row in range(self.count):
            first[row] = self.outputs[row, 0]
            latents, outputs = (part[row].reshape(part.shape[1], -1) for part in (self.latents, self.outputs))
            gram[row] = gram_from_rows(latents, outputs)
        first.flush()
        gram.flush()
        self.latents.flush()
        del self.outputs
        (self.folder / OUTPUTS).unlink()


@dataclass(frozen=True)
class Chunk:
    """The folder of a finished `RunWriter`."""

    folder: Path

    @cached_property
    def latents(self) -> NDArray[np.float32]:
        """X float32 (n, T+1, …)."""
        return map_array(self.folder / LATENTS)

    @cached_property
    def first_output(self) -> NDArray[np.float32]:
        """V_0 float32 (n, …)."""
        return map_array(self.folder / FIRST_OUTPUT)

    @cached_property
    def gram(self) -> FloatArray:
        """Inner products float64 (n, 2T+1, 2T+1) in the order X_0 … X_T, V_0 … V_{T−1}."""
        return map_array(self.folder / GRAM)

    @cached_property
    def pictures(self) -> NDArray[np.float32]:
        """Decoded final latents, float32 (n, [frames,] height, width, 3) in [0, 1]."""
        return map_array(self.folder / PICTURES)

    @cached_property
    def scalars(self) -> dict[str, NDArray[Any]]:
        """`timesteps` float64 (T,) and `guidance` float32 (n,)."""
        with np.load(self.folder / SCALARS, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}

    @property
    def count(self) -> int:
        return len(self.scalars["guidance"])

    def conditioning(self, rows: slice) -> dict[str, Tensor]:
        """By name, (branches, m, …) of some of the samples."""
        with safe_open(self.folder / CONDITIONING, "pt") as file:
            return {name: file.get_slice(name)[rows].transpose(0, 1) for name in file.keys()}  # noqa: SIM118

    def conditioning_shapes(self) -> dict[str, tuple[int, ...]]:
        """By name, of one sample and branch."""
        with safe_open(self.folder / CONDITIONING, "pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()[2:]) for name in file.keys()}  # noqa: SIM118


class Runs:
    """Chunks one after the other, as one set of n samples."""

    def __init__(self, chunks: Sequence[Chunk]) -> None:
        self.chunks = tuple(chunks)
        self.starts = [0, *itertools.accumulate(chunk.count for chunk in self.chunks)]

    @property
    def count(self) -> int:
        """n."""
        return self.starts[-1]

    @property
    def num_inference_steps(self) -> int:
        """T."""
        return self.chunks[0].latents.shape[1] - 1

    @property
    def latents_shape(self) -> tuple[int, ...]:
        """Of one sample."""
        return tuple(self.chunks[0].latents.shape[2:])

    @property
    def timesteps(self) -> tuple[float, ...]:
        """Of the full sampler, (T,)."""
        return tuple(self.chunks[0].scalars["timesteps"].tolist())

    def latents(self, rows: slice, step_index: int) -> NDArray[np.float32]:
        """X_i float32 (m, …) of some of the samples; −1 is the last, X_T."""
        return self._gather(rows, lambda chunk, part: chunk.latents[part, step_index])

    def first_output(self, rows: slice) -> NDArray[np.float32]:
        """V_0 float32 (m, …)."""
        return self._gather(rows, lambda chunk, part: chunk.first_output[part])

    def gram(self, rows: slice = slice(None)) -> FloatArray:
        """Float64 (m, 2T+1, 2T+1)."""
        return self._gather(rows, lambda chunk, part: chunk.gram[part])

    def pictures(self, rows: slice) -> NDArray[np.float32]:
        """Float32 (m, [frames,] height, width, 3) in [0, 1]; those of one chunk are read where they are touched."""
        return self._gather(rows, lambda chunk, part: chunk.pictures[part], copy=False)

    @property
    def picture_bytes(self) -> int:
        """Of one sample."""
        return self.chunks[0].pictures[:1].nbytes

    def guidance(self, rows: slice = slice(None)) -> NDArray[np.float32]:
        """Float32 (m,)."""
        return self._gather(rows, lambda chunk, part: chunk.scalars["guidance"][part])

    def conditioning(self, rows: slice) -> dict[str, Tensor]:
        """By name, (branches, m, …)."""
        import torch

        parts = [chunk.conditioning(part) for chunk, part in self._parts(rows)]
        return {name: torch.cat([part[name] for part in parts], dim=1) for name in parts[0]}

    def _parts(self, rows: slice) -> list[tuple[Chunk, slice]]:
        start, stop, _ = rows.indices(self.count)
        return [
            (chunk, slice(max(start - first, 0), min(stop, last) - first))
            for chunk, first, last in zip(self.chunks, self.starts, self.starts[1:], strict=False)
            if start < last and stop > first
        ]

    def _gather(self, rows: slice, read: Any, *, copy: bool = True) -> NDArray[Any]:
        parts = [np.asarray(read(chunk, part)) for chunk, part in self._parts(rows)]
        if len(parts) > 1:
            return np.concatenate(parts)
        return parts[0].copy() if copy else parts[0]
