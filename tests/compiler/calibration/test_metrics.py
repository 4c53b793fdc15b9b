"""Metrics against numpy and scikit-image."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from equations import equation_evaluator, normal, write_chunk
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from otcache.compiler.calibration.batch import Batch
from otcache.compiler.calibration.local import LocalSamples
from otcache.compiler.calibration.metrics import Quality, psnr, relative_latent_error, ssim
from otcache.compiler.calibration.micro_batch import MicroBatch
from otcache.compiler.calibration.runs import Runs
from otcache.compiler.calibration.samples import Rows
from otcache.compiler.calibration.scoring import scores_from_latents
from otcache.schemas.errors import UsageError

GENERATOR = np.random.default_rng(0)


def images(*shape: int) -> tuple[np.ndarray, np.ndarray]:
    references = GENERATOR.uniform(size=shape).astype(np.float32)
    noisy = references + 0.1 * GENERATOR.normal(size=shape)
    return np.clip(noisy, 0, 1).astype(np.float32), references


def test_psnr_is_that_of_skimage() -> None:
    found, expected = images(4, 16, 20, 3)
    oracle = [
        peak_signal_noise_ratio(b.astype(float), a.astype(float), data_range=1.0)
        for a, b in zip(found, expected, strict=True)
    ]
    result = psnr(found, expected)
    assert result.shape == (4,) and result.dtype == np.float64
    np.testing.assert_allclose(result, oracle)


def test_psnr_by_hand() -> None:
    references = np.zeros((1, 4, 4, 3))
    assert psnr(references + 0.1, references) == pytest.approx(20.0)
    assert psnr(references + 1.0, references) == pytest.approx(0.0)


def test_identical_images() -> None:
    found, _ = images(2, 12, 12, 3)
    np.testing.assert_array_equal(psnr(found, found), 100.0)
    np.testing.assert_array_equal(psnr(found, found + 1e-7), 100.0)
    np.testing.assert_allclose(ssim(found, found), 1.0)
    np.testing.assert_array_equal(relative_latent_error(found, found), 0.0)


def test_ssim_is_that_of_skimage() -> None:
    found, expected = images(3, 17, 24, 3)
    oracle = [
        structural_similarity(
            a.astype(float),
            b.astype(float),
            channel_axis=-1,
            data_range=1.0,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        for a, b in zip(found, expected, strict=True)
    ]
    result = ssim(found, expected)
    assert result.shape == (3,) and result.dtype == np.float64
    np.testing.assert_allclose(result, oracle, rtol=1e-12)


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (8, 8), (10, 30)])
def test_ssim_of_tiny_images(size: tuple[int, int]) -> None:
    found, expected = images(2, *size, 3)
    result = ssim(found, expected)
    assert result.shape == (2,) and np.isfinite(result).all() and (result < 1.0).all()
    np.testing.assert_allclose(ssim(expected, expected), 1.0)


def test_videos_count_as_one_sample() -> None:
    found, expected = images(2, 3, 12, 12, 3)
    np.testing.assert_allclose(ssim(found, expected), [ssim(a, b).mean() for a, b in zip(found, expected, strict=True)])
    mse = np.square(found.astype(float) - expected).mean(axis=(1, 2, 3, 4))
    np.testing.assert_allclose(psnr(found, expected), -10 * np.log10(mse))


def frames_from_latents(latents: torch.Tensor) -> np.ndarray:
    """Latents (m, channels, frames, height, width) → videos (m, frames, height, width, 3)."""
    return torch.sigmoid(latents[:, :3].permute(0, 2, 3, 4, 1)).contiguous().numpy()


def test_videos_are_scored_sample_by_sample(tmp_path: Path) -> None:
    """Through a batch of samples, of which one at a time is decoded: frames are not taken for samples."""

    def rate(x: torch.Tensor, step: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return -k * x

    shape, k = (3, 4, 12, 12), torch.linspace(0.5, 2.0, 3)
    chunk = write_chunk(tmp_path / "runs", normal(3, *shape), rate, k=k, decode=frames_from_latents)
    evaluator = replace(equation_evaluator(rate, shape), decode=frames_from_latents)
    samples = LocalSamples(Runs([chunk]), evaluator, MicroBatch(1), tmp_path / "scratch")
    moved = normal(3, *shape, seed=1) * 0.1

    def score(batch: Batch) -> Rows:
        return scores_from_latents(batch, batch.latents(-1) + moved[batch.rows])

    found = samples.map(score)
    videos, references = (
        frames_from_latents(torch.from_numpy(chunk.latents[:, -1].copy()) + each) for each in (moved, 0.0)
    )
    mse = np.square(videos.astype(float) - references).mean(axis=(1, 2, 3, 4))
    np.testing.assert_allclose(found["psnr_db"], -10 * np.log10(mse), rtol=1e-5)
    oracle = [
        np.mean(
            [
                structural_similarity(
                    a.astype(float),
                    b.astype(float),
                    channel_axis=-1,
                    data_range=1.0,
                    gaussian_weights=True,
                    sigma=1.5,
                    use_sample_covariance=False,
                )
                for a, b in zip(video, reference, strict=True)
            ]
        )
        for video, reference in zip(videos, references, strict=True)
    ]
    np.testing.assert_allclose(found["ssim"], oracle, rtol=1e-5)
    final = chunk.latents[:, -1].reshape(3, -1)
    np.testing.assert_allclose(
        found["latent_error"],
        np.linalg.norm(moved.flatten(1).numpy(), axis=1) / np.linalg.norm(final, axis=1),
        rtol=1e-5,
    )


def test_tensors_are_images_too() -> None:
    found, expected = images(2, 12, 12, 3)
    np.testing.assert_array_equal(psnr(torch.from_numpy(found), torch.from_numpy(expected)), psnr(found, expected))
    half = torch.from_numpy(found).to(torch.bfloat16)
    assert psnr(half, found).min() > 40.0


@pytest.mark.parametrize("metric", [psnr, ssim])
@pytest.mark.parametrize(
    ("shape", "other", "scale", "message"),
    [
        ((2, 8, 8, 3), (2, 8, 9, 3), 1.0, "expected the same shape"),
        ((8, 8, 3), (8, 8, 3), 1.0, r"\(n, height, width, 3\)"),
        ((2, 3, 8, 8), (2, 3, 8, 8), 1.0, r"\(n, height, width, 3\)"),
        ((0, 8, 8, 3), (0, 8, 8, 3), 1.0, r"\(n, height, width, 3\)"),
        ((2, 8, 8, 3), (2, 8, 8, 3), 255.0, "Divide 8-bit images by 255"),
        ((2, 8, 8, 3), (2, 8, 8, 3), -1.0, r"expected finite values in \[0, 1\]"),
        ((2, 8, 8, 3), (2, 8, 8, 3), np.nan, r"expected finite values in \[0, 1\]"),
    ],
)
def test_images_that_are_none_are_refused(metric, shape, other, scale, message) -> None:
    with pytest.raises(UsageError, match=message):
        metric(np.ones(shape) * scale, np.ones(other))


def test_relative_latent_error() -> None:
    references = GENERATOR.normal(size=(3, 4, 5, 6))
    latents = references * np.array([1.0, 1.1, 0.5])[:, None, None, None]
    np.testing.assert_allclose(relative_latent_error(latents, references), [0.0, 0.1, 0.5], atol=1e-12)
    assert relative_latent_error(np.ones((1, 2)), np.zeros((1, 2)))[0] == np.inf
    with pytest.raises(UsageError, match="same shape"):
        relative_latent_error(latents, references[:2])


def test_quality_summary() -> None:
    assert Quality.from_values([1.0, 2.0, 3.0]) == Quality(mean=2.0, std=pytest.approx((2 / 3) ** 0.5), worst=1.0)
    assert Quality.from_values([1.0, 2.0, 3.0], higher_is_better=False).worst == 3.0
    with pytest.raises(UsageError, match="at least one sample"):
        Quality.from_values([])


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_a_video_is_weighed_frame_by_frame(metric: Callable[..., np.ndarray]) -> None:
    """A video takes the memory of a frame, and its value is the mean over frames of what a picture's is."""
    found, expected = images(1, 60, 32, 40, 3)
    tracemalloc.start()
    value = metric(found, expected)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < found.astype(np.float64).nbytes / 2
    if metric is ssim:
        assert value == pytest.approx(metric(found[0], expected[0]).mean(), rel=1e-12)
    else:
        assert 10 ** (-value / 10) == pytest.approx((10 ** (-metric(found[0], expected[0]) / 10)).mean(), rel=1e-12)
