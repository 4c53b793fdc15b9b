"""How good pictures are: what a program, or any other way to final latents, comes to on the samples of a batch.

Each function answers for one `Batch`, with rows for its samples, and is made to be handed to `Samples.map`.

Shapes: m samples of a batch; latents (m, …) float32; pictures float32 (m, [frames,] height, width, 3) in [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from torch import Tensor

from otcache.schemas.digest import digest_of_value
from otcache.schemas.program import Program

from . import metrics
from .batch import Batch
from .rollout import roll_out
from .samples import Rows

DECODED_BYTES = 64 << 20
"""Of pictures that are decoded at once, one sample's at least: a video of 129 frames at 720p has 1.4 GB."""


def scores_from_latents(batch: Batch, latents: Tensor) -> Rows:
    """`psnr_db`, `ssim` and `latent_error`, and `lpips` where it is asked for: float64 (m,) each."""
    parts: list[Rows] = []
    for part, pictures in decoded_parts(batch, latents):
        references = batch.references(part)
        scores = {
            "psnr_db": metrics.psnr(pictures, references),
            "ssim": metrics.ssim(pictures, references),
            "latent_error": metrics.relative_latent_error(latents[part], batch.latents(-1)[part]),
        }
        if batch.evaluator.lpips is not None:
            scores["lpips"] = batch.evaluator.lpips(pictures, references)
        parts.append(scores)
        del pictures
    return _joined(parts)


def decoded_parts(batch: Batch, latents: Tensor) -> Iterator[tuple[slice, np.ndarray]]:
    """(samples of the batch, their pictures), so many at a time as `DECODED_BYTES` holds."""
    size = max(1, DECODED_BYTES // batch.runs.picture_bytes)
    for start in range(0, batch.count, size):
        part = slice(start, min(start + size, batch.count))
        yield part, batch.decode(latents[part])


def _joined(parts: list[Rows]) -> Rows:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def final_latents(program: Program, batch: Batch) -> Tensor:
    """Where a program ends, (m, …); its first evaluation is the full run's where it is the same."""
    first = program.steps[0]
    table = batch.evaluator.table
    known = (
        program.payload != "residual"
        and first.step_index == 0
        and first.timestep == float(table.timesteps[0])
        and first.input_scale == float(table.input_scales[0])
    )
    return roll_out(
        program,
        batch.denoiser,
        batch.latents(0),
        batch.evaluator.stages,
        first_output=batch.first_output() if known else None,
    )


def scores_of(program: Program) -> Callable[[Batch], Rows]:
    """Scores of a program on a batch."""
    return lambda batch: scores_from_latents(batch, final_latents(program, batch))


@dataclass(frozen=True)
class KeptScores:
    """As `scores_of`, with the final latents kept beside the samples (`kept_pictures`)."""

    program: Program
    keeps: ClassVar[bool] = True

    def __call__(self, batch: Batch) -> Rows:
        """Of a batch."""
        latents = final_latents(self.program, batch)
        _keep(batch, self.program, latents)
        return scores_from_latents(batch, latents)


@dataclass(frozen=True)
class Measure:
    """Scores of a program, and `errors` (m, k + 1): the relative error of the latents before each of its k computed
    steps, and of the final ones. Those are kept beside the samples (`kept_latents`, `kept_pictures`).
    """

    program: Program
    keeps: ClassVar[bool] = True

    def __call__(self, batch: Batch) -> Rows:
        """Of a batch."""
        errors: list[np.ndarray] = []

        def observe(step_index: int, latents: Tensor) -> None:
            errors.append(metrics.relative_latent_error(latents, batch.latents(step_index)))

        stages = batch.evaluator.stages
        latents = roll_out(self.program, batch.denoiser, batch.latents(0), stages, observe=observe)
        observe(-1, latents)
        _keep(batch, self.program, latents)
        return {**scores_from_latents(batch, latents), "errors": np.stack(errors, axis=1)}


def kept_latents(program: Program) -> Callable[[Batch], Rows]:
    """`latents` float32 (m, …) that `Measure` has kept of a program."""
    return lambda batch: {"latents": _read(batch, program)}


def kept_pictures(program: Program) -> Callable[[Batch], Rows]:
    """`pictures` uint8 (m, height, width, 3) of what `Measure` has kept of a program."""

    def answer(batch: Batch) -> Rows:
        latents = batch.tensor(_read(batch, program))
        return _joined([{"pictures": eight_bits(pictures)} for _, pictures in decoded_parts(batch, latents)])

    return answer


def reference_pictures(batch: Batch) -> Rows:
    """`pictures` uint8 (m, height, width, 3) of the full runs."""
    return {"pictures": eight_bits(batch.references())}


def eight_bits(pictures: np.ndarray) -> np.ndarray:
    """float (m, height, width, 3) in [0, 1] → uint8; of videos (m, frames, …) the first, middle and last frame side by
    side.
    """
    if pictures.ndim == 5:
        frames = pictures.shape[1]
        pictures = np.concatenate([pictures[:, i] for i in (0, frames // 2, frames - 1)], axis=2)
    return np.round(255 * pictures).astype(np.uint8)


def _keep(batch: Batch, program: Program, latents: Tensor) -> None:
    for row, value in zip(range(batch.rows.start, batch.rows.stop), latents.float().cpu().numpy(), strict=True):
        np.save(_kept(batch, program, row), value)


def _kept(batch: Batch, program: Program, row: int) -> Path:
    name = digest_of_value(program.model_dump(mode="json"))[7:23]
    return batch.scratch / f"final-{name}-{row}.npy"


def _read(batch: Batch, program: Program) -> np.ndarray:
    rows = range(batch.rows.start, batch.rows.stop)
    return np.stack([np.load(_kept(batch, program, row), allow_pickle=False) for row in rows])
