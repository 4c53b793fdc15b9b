"""Sets of samples without a diffusion model: the full runs are those of an ordinary differential equation.

x' = rate(x, i; k),        in Euler's steps of 1 / T, with the step index i and a number k of each sample's own
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from otcache.compiler.calibration.batch import Decode, Evaluator
from otcache.compiler.calibration.local import OUTPUT_BYTES, LocalSamples
from otcache.compiler.calibration.micro_batch import MicroBatch
from otcache.compiler.calibration.runs import PICTURES, Chunk, Runs, RunWriter, new_array
from otcache.compiler.pipelines.interface import Interface
from otcache.compiler.programs.solver_table import SolverTable

Rate = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(latents (m, …), step index of each (m, 1, …), k of each (m, 1, …)) → (m, …)."""
TOTAL = 12
"""T."""


def euler_table(total: int = TOTAL) -> SolverTable:
    """Euler's method with T equal steps over a time of 1; a step's time is its index."""
    return SolverTable(
        timesteps=np.arange(total),
        input_scales=np.ones(total),
        initial_scale=1.0,
        latent_coefs=np.ones(total),
        output_coefs=np.eye(total) / total,
    )


class Equation:
    """What stands where the transformer does: it knows the rate, and counts what it was asked for.

    It runs out of memory where it is given more samples than `room`.
    """

    def __init__(self, rate: Rate, room: int | None = None) -> None:
        self.rate, self.room = rate, room
        self.batches: list[int] = []
        """Samples of each call."""

    def __call__(self, latents: Tensor, timestep: Tensor, k: Tensor) -> Tensor:
        """The rate at latents (m, …)."""
        if self.room is not None and len(latents) > self.room:
            raise torch.OutOfMemoryError(f"out of memory: {len(latents)} samples\nand a second line")
        self.batches.append(len(latents))
        shape = (-1, *[1] * (latents.ndim - 1))
        return self.rate(latents, timestep.view(shape), k.view(shape))

    @property
    def evaluations(self) -> int:
        """Of one sample each."""
        return sum(self.batches)


def pictures_from_latents(latents: Tensor) -> np.ndarray:
    """Latents (m, …) → grey pictures float32 (m, 1, elements, 3) in (0, 1).

    Each on its own: how a sample is rounded depends on no other.
    """
    grey = torch.stack([torch.sigmoid(row) for row in latents.flatten(1)])[:, None, :, None]
    return grey.expand(-1, -1, -1, 3).numpy()


def write_chunk(
    folder: Path,
    start: Tensor,
    rate: Rate,
    *,
    full_rate: Rate | None = None,
    k: Tensor | None = None,
    total: int = TOTAL,
    decode: Decode = pictures_from_latents,
) -> Chunk:
    """Full runs from `start` (n, …), float32, each made on its own, in a new folder.

    full_rate: of the full runs, if it is not what programs are made with.
    """
    folder.mkdir(parents=True)
    count = len(start)
    k = torch.ones(count) if k is None else k
    writer = RunWriter(folder, count, total, start.shape[1:])
    equation = Equation(full_rate or rate)
    final = []
    for row in range(count):
        latents = start[row : row + 1]
        for index in range(total):
            output = equation(latents, torch.tensor([float(index)]), k[row : row + 1])
            after = latents + output / total
            writer.write_step([row], index, float(index), latents, output, after)
            latents = after
        final.append(latents)
    writer.finish({"k": k[None].clone()}, [1.0] * count)
    pictures = decode(torch.cat(final))
    new_array(folder / PICTURES, pictures.shape)[:] = pictures
    return Chunk(folder)


def samples_from_equation(
    folder: Path,
    start: Tensor,
    rate: Rate,
    *,
    full_rate: Rate | None = None,
    k: Tensor | None = None,
    total: int = TOTAL,
    micro_batch: int | MicroBatch = 64,
    room: int | None = None,
    output_bytes: int = OUTPUT_BYTES,
) -> LocalSamples:
    """Samples from `start` (n, …) with their full runs; `evaluator.transformer` is the `Equation`.

    Args:
        folder: where the full runs are written.
        start: (n, …) float32.
        rate: of the equation.
        full_rate: see `write_chunk`.
        k: of each sample, (n,).
        total: T.
        micro_batch: samples that are evaluated at once.
        room: see `Equation`.
        output_bytes: see `LocalSamples`.
    """
    chunk = write_chunk(folder / "runs", start, rate, full_rate=full_rate, k=k, total=total)
    sizes = micro_batch if isinstance(micro_batch, MicroBatch) else MicroBatch(micro_batch)
    return LocalSamples(
        Runs([chunk]), equation_evaluator(rate, start.shape[1:], total, room), sizes, folder / "scratch", output_bytes
    )


def equation_evaluator(
    rate: Rate, shape: tuple[int, ...], total: int = TOTAL, room: int | None = None, **more: Any
) -> Evaluator:
    """An equation with Euler's method as its full sampler, on the CPU."""
    interface = Interface(
        latents_input="latents",
        timestep_input="timestep",
        timestep_scale=1.0,
        conditioning=("k",),
        constants={},
        guided=False,
        stacked=False,
        positive_first=False,
        noise_shape=tuple(shape),
        noise_split=tuple(shape),
        noise_permutation=tuple(range(len(shape))),
        latents_shape=tuple(shape),
    )
    return Evaluator(
        transformer=Equation(rate, room),
        interface=interface,
        device=torch.device("cpu"),
        decode=pictures_from_latents,
        table=euler_table(total),
        **more,
    )


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers, float32."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
