"""What one evaluation takes at the size that is served, on the device: `otc compile --dry-run --measure`.

Time is that of the model's forward alone, after a warm-up, for as many samples as a compile would take at once; memory
is what tensors take that are made on the way, on any device.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..calibration import metrics
from ..pipelines.call import short_call
from ..pipelines.denoiser import denoiser_of, place_constants
from ..pipelines.full_run import capture
from ..pipelines.placement import PeakBytes, free_bytes
from .session import Session

ROUNDS = 3
"""Evaluations that are timed; the median counts."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Of one sample, in a micro-batch."""

    evaluation_s: float
    evaluations: int
    """That were timed."""
    picture_s: float
    """To decode a picture and to compare it with another."""
    micro_batch: int
    """Samples at once."""
    model_bytes: int
    """Weights of the whole pipeline."""
    evaluation_bytes: int
    """At most at once beside them, for the micro-batch's evaluation."""
    picture_bytes: int
    """The same, to decode one sample."""
    free_bytes: int | None
    """Of the device; None where it is not known."""

    @property
    def peak_bytes(self) -> int:
        """With the model."""
        return self.model_bytes + max(self.evaluation_bytes, self.picture_bytes)


@torch.no_grad()
def measure(session: Session, prompts: Sequence[str]) -> Measured:
    """Evaluate the model, and decode what comes out, at the size that is served.

    Raises HostError where not even one sample fits.
    """
    pipeline, device = session.model.pipeline, session.placement.device

    def evaluate(rows: slice) -> tuple[float, int, torch.Tensor]:
        return _evaluation(session, [prompts[row % len(prompts)] for row in range(rows.stop - rows.start)])

    parts = session.micro_batch.run(slice(0, session.micro_batch.size), evaluate, device)
    rows, (seconds, evaluation_bytes, final) = next(parts)
    with PeakBytes(_weights(pipeline)) as decoded:
        picture = session.decode(final)
    count = rows.stop - rows.start
    return Measured(
        evaluation_s=seconds / count,
        evaluations=ROUNDS * count,
        picture_s=_median_seconds(lambda: _compare(session.decode(final), picture), device, rounds=1),
        micro_batch=count,
        model_bytes=sum(weight.nbytes for weight in {id(each): each for each in _weights(pipeline)}.values()),
        evaluation_bytes=evaluation_bytes,
        picture_bytes=decoded.peak,
        free_bytes=free_bytes(device),
    )


def _evaluation(session: Session, prompts: Sequence[str]) -> tuple[float, int, torch.Tensor]:
    """Seconds of one evaluation of so many samples, the bytes that it takes, and final latents of one of them."""
    pipeline, device, count = session.model.pipeline, session.placement.device, len(prompts)
    scales = [session.options.nominal_scale] * count
    few = capture(pipeline, session.interface, short_call(pipeline, session.call), prompts, range(count), scales)
    denoiser = denoiser_of(session.model.transformer, place_constants(session.interface, device), few.to(device))
    latents, timestep = few.latents[0].to(device), few.timesteps[0]
    with PeakBytes(_weights(pipeline)) as counted:
        denoiser(latents, timestep)  # the warm-up as well
    seconds = _median_seconds(lambda: denoiser(latents, timestep), device)
    return seconds, counted.peak, few.latents[-1][:1].to(device)


def _weights(pipeline: Any) -> list[torch.Tensor]:
    modules = [each for each in pipeline.components.values() if isinstance(each, torch.nn.Module)]
    return [weight for module in modules for weight in (*module.parameters(), *module.buffers())]


def _compare(picture: np.ndarray, reference: np.ndarray) -> None:
    metrics.psnr(picture, reference)
    metrics.ssim(picture, reference)


def _median_seconds(work: Callable[[], Any], device: torch.device, rounds: int = ROUNDS) -> float:
    module = getattr(torch, device.type, None)

    def wait() -> None:
        if module is not None and hasattr(module, "synchronize"):
            module.synchronize()

    seconds = []
    for _ in range(rounds):
        wait()
        start = time.perf_counter()
        work()
        wait()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)
