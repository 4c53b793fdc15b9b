"""Fidelity to the uncached sampler: PSNR, SSIM, LPIPS, and the error of latents. Used by `evaluate` and the searches.

Images are float arrays (n, height, width, 3) in [0, 1]; videos (n, frames, height, width, 3) count as one sample each.
Every metric is per sample, float64 (n,). Numbers are comparable within one run only: papers differ in range, rounding
and windows (some square differences of uint8, which wrap around).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from skimage.metrics import structural_similarity

from otcache.schemas.errors import UsageError

from ..programs.arrays import float64_from_array
from . import lpips

FloatArray = NDArray[np.float64]
Metric = Callable[[ArrayLike, ArrayLike], FloatArray]

PSNR_CAP = 100.0
"""dB of identical images, and the largest value there is."""
_SSIM_WINDOW = 11
"""Gaussian window of Wang et al. 2004: sigma 1.5, 11 × 11."""
_RANGE_SLACK = 1e-3
"""How far outside [0, 1] rounding in float16 may take an image."""


@dataclass(frozen=True)
class Quality:
    """Summary of one metric over samples."""

    mean: float
    std: float
    """Standard deviation of the population (ddof 0)."""
    worst: float
    """The minimum, or the maximum of a metric where lower is better."""

    @classmethod
    def from_values(cls, values: ArrayLike, *, higher_is_better: bool = True) -> Quality:
        """Summary of (n,) values, n ≥ 1."""
        array = np.asarray(values, dtype=np.float64)
        if array.ndim != 1 or not array.size:
            raise UsageError(f"quality values have shape {array.shape}, expected (n,) with at least one sample")
        worst = array.min() if higher_is_better else array.max()
        return cls(mean=float(array.mean()), std=float(array.std()), worst=float(worst))


def psnr(images: ArrayLike, references: ArrayLike) -> FloatArray:
    """Peak signal-to-noise ratio in dB, 10 · log10(1 / MSE), at most `PSNR_CAP`; (n,), higher is better."""
    mse = _mean_over_frames(images, references, lambda found, expected: float(np.square(found - expected).mean()))
    return np.minimum(-10.0 * np.log10(np.maximum(mse, 1e-300)), PSNR_CAP)


def ssim(images: ArrayLike, references: ArrayLike) -> FloatArray:
    """Structural similarity (Gaussian window, sigma 1.5), mean over channels and frames; (n,), higher is better.

    Images smaller than the window are averaged over a border as wide as they allow.
    """

    def score(image: FloatArray, reference: FloatArray) -> float:
        smallest = min(image.shape[:2])
        window = min(_SSIM_WINDOW, smallest if smallest % 2 else smallest - 1)
        value = structural_similarity(
            image,
            reference,
            win_size=window,
            data_range=1.0,
            channel_axis=-1,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        return float(value)

    return _mean_over_frames(images, references, score)


def relative_latent_error(latents: ArrayLike, references: ArrayLike) -> FloatArray:
    """‖latents − references‖ / ‖references‖ per sample, of arrays (n, …); (n,), lower is better."""
    found, expected = float64_from_array(latents), float64_from_array(references)
    if found.shape != expected.shape or found.ndim < 2:
        raise UsageError(
            f"latents of shape {found.shape} against references of shape {expected.shape}: expected two arrays of the "
            f"same shape (n, …)"
        )
    difference = np.linalg.norm((found - expected).reshape(len(found), -1), axis=1)
    norm = np.linalg.norm(expected.reshape(len(expected), -1), axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(difference == 0.0, 0.0, difference / norm)


def lpips_metric() -> Metric:
    """LPIPS (arXiv 1801.03924) as a function of (images, references) → (n,), lower is better.

    Nothing is downloaded: `OTC_LPIPS` names the weights (`calibration.lpips`).

    Raises HostError where the weights are absent; the message says how to get them. The metric raises UsageError for
    images that are too small for the weights' network.
    """
    model = lpips.given_lpips()

    def score(image: FloatArray, reference: FloatArray) -> float:
        lpips.check_size(*image.shape[:2])
        found, expected = (
            torch.from_numpy(each.astype(np.float32)).movedim(-1, 0)[None] * 2.0 - 1.0 for each in (image, reference)
        )
        return float(model.distance(found, expected))

    return lambda images, references: _mean_over_frames(images, references, score)


def _mean_over_frames(images: Any, references: Any, score: Callable[[FloatArray, FloatArray], float]) -> FloatArray:
    """Mean score (n,) of each sample's frames. One frame at a time is in float64: a whole video would be gigabytes.

    Args:
        images: (n, [frames,] height, width, 3) in [0, 1].
        references: of the same shape.
        score: of a frame and its reference, float64 (height, width, 3) each.

    Raises UsageError for other shapes and values.
    """
    found, expected = (each if hasattr(each, "detach") else np.asarray(each) for each in (images, references))
    shape = tuple(found.shape)
    if shape != tuple(expected.shape):
        raise UsageError(
            f"images of shape {shape} against references of shape {tuple(expected.shape)}: expected the same shape"
        )
    if len(shape) not in (4, 5) or shape[-1] != 3 or 0 in shape:
        raise UsageError(f"images have shape {shape}, expected (n, height, width, 3) or (n, frames, height, width, 3)")

    def frames(array: Any, row: int, name: str) -> Iterator[FloatArray]:
        for index in range(shape[1]) if len(shape) == 5 else [...]:
            frame = float64_from_array(array[row][index])
            _check_range(frame, name)
            yield frame

    def mean(row: int) -> float:
        pairs = zip(frames(found, row, "images"), frames(expected, row, "references"), strict=True)
        return float(np.mean([score(*pair) for pair in pairs]))

    return np.array([mean(row) for row in range(shape[0])], dtype=np.float64)


def _check_range(frame: FloatArray, name: str) -> None:
    low, high = float(frame.min()), float(frame.max())
    if not (low >= -_RANGE_SLACK and high <= 1.0 + _RANGE_SLACK):  # false for NaN as well
        raise UsageError(
            f"{name} span {low:g} … {high:g}, expected finite values in [0, 1]. Divide 8-bit images by 255; map "
            f"[-1, 1] with x / 2 + 0.5; clip."
        )
