"""Pass `fit`: schedule + calibration set → Program, with coefficients that correct drift as it appears.

The program is walked on the calibration set. At each computed step the coefficients are those with which the step lands
closest to the full run's latents at the next computed step, starting from where the program itself has come to. Means
over a sample's positions are weighed apart from what is around them. From the second step on coefficients follow each
sample: guided outputs that change more than others' from step to step are stiffer, and want other weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from otcache.schemas.program import FARTHEST, Means, Payload, Program, Slopes, Step, position_axes

from ..pipelines.trajectory import Trajectory
from ..programs.arrays import float64_from_array
from ..programs.update import log_change, mean

FloatArray = NDArray[np.float64]
Prior = Callable[[Sequence[int], int], tuple[float, FloatArray]]
"""(computed step indices, next step index) → coefficients of the latents and of those steps' outputs, newest last."""

STRAY = 2.0
"""Times the median distance from the full run, from which on a sample counts less."""
FEWEST = 8
"""Samples for slopes and means: straight lines through fewer are lines through noise."""
SLOPE_PENALTY = 1e-3
"""Relative to the size of what a slope multiplies."""


@dataclass(frozen=True)
class Places:
    """Where each sample stands among all in how much its output has changed."""

    centre: float
    spread: float
    values: FloatArray
    """(n,), in spreads from the centre."""


@dataclass(frozen=True)
class FittedStep:
    """Coefficients of one step's r regressors, and of f features of a sample: 1, and its place."""

    coefs: FloatArray
    """(f, r), fitted to all samples."""
    crossed: FloatArray
    """(n, f, r): for each sample those that are fitted to all the others; with one sample, `coefs`."""


def ridge_step(
    target: ArrayLike,
    regressors: Sequence[ArrayLike],
    prior: ArrayLike,
    penalty: float,
    weights: FloatArray | None = None,
    places: FloatArray | None = None,
) -> FittedStep:
    """The update that lands closest to a target, drawn towards a prior.

    min Σ_n s_n ‖target_n − Σ_r (c_r + p_n d_r) u_rn‖² + Σ_r G_rr (penalty (c_r − c_r⁰)² + SLOPE_PENALTY d_r²), with u
    the regressors, c and d their coefficients and slopes, p the samples' places, and G the Gram matrix of what each of
    them multiplies under the samples' weights s.

    Args:
        target: float (n, …); an array, or a tensor of any dtype and device.
        regressors: r of them, likewise: latents and outputs, newest last, and what else the step weighs.
        prior: c⁰ (r,).
        penalty: relative to each regressor's size; 0 for least squares.
        weights: s (n,); all 1 if there are none.
        places: p (n,); there are no slopes if there are none.
    """
    rows = np.stack([_rows(value) for value in regressors], axis=1)
    n, count, _ = rows.shape
    features = np.stack([np.ones(n)] if places is None else [np.ones(n), places], axis=1)
    centre = np.zeros((features.shape[1], count))
    centre[0] = np.asarray(prior, dtype=np.float64)
    remainders = _rows(target) - centre[0] @ rows
    weighed = features if weights is None else features * weights[:, None]
    grams = np.einsum("nf,ng,nrs->nfrgs", weighed, features, rows @ rows.transpose(0, 2, 1))
    crosses = np.einsum("nf,nr->nfr", weighed, (rows @ remainders[..., None])[..., 0])
    grams, crosses = grams.reshape(n, centre.size, -1), crosses.reshape(n, -1)
    penalties = np.repeat([penalty, SLOPE_PENALTY][: len(centre)], count)

    def solved(gram: FloatArray, cross: FloatArray) -> FloatArray:
        weight = np.diag(np.maximum(penalties * np.diag(gram), 1e-300))
        change = np.asarray(np.linalg.lstsq(gram + weight, cross, rcond=1e-15)[0], dtype=np.float64)
        return centre + change.reshape(centre.shape)

    gram, cross = grams.sum(axis=0), crosses.sum(axis=0)
    coefs = solved(gram, cross)
    others = [coefs] if n == 1 else [solved(gram - g, cross - c) for g, c in zip(grams, crosses, strict=True)]
    return FittedStep(coefs=coefs, crossed=np.stack(others))


def sample_weights(latents: ArrayLike, references: ArrayLike) -> FloatArray:
    """(n,) in (0, 1]: 1 for samples near their full run, less for those further from it than `STRAY` times the median
    distance.

    Weighed so, a stray adds no more to a sum of squares than a sample at that distance.
    """
    distances = np.linalg.norm(_rows(latents) - _rows(references), axis=1)
    near = STRAY * np.median(distances)
    return np.square(near / np.maximum(distances, near)) if near else np.ones(len(distances))


def sample_places(outputs: Sequence[Tensor]) -> Places | None:
    """Of samples with these outputs (n, …), newest last; None for too few of either, or where all change alike."""
    if len(outputs) < 2 or len(outputs[-1]) < FEWEST:
        return None
    change = log_change(outputs[-2], outputs[-1]).double().cpu().numpy()
    centre, spread = float(change.mean()), float(change.std())
    if spread < 1e-6:
        return None
    return Places(centre=centre, spread=spread, values=np.clip((change - centre) / spread, -FARTHEST, FARTHEST))


def fit_output_program(
    denoise: Callable[[Tensor, int], Tensor],
    trajectory: Trajectory,
    schedule: Sequence[int],
    prior: Prior,
    *,
    timesteps: ArrayLike,
    input_scales: ArrayLike,
    memory: int = 4,
    penalty: float = 1e-5,
) -> tuple[Program, Tensor]:
    """A program of outputs for a schedule, and where it ends on the calibration set, latents (n, …).

    Each sample is walked with coefficients that are fitted to the others, as a prompt that calibration has not seen
    will be: the errors that later steps learn to correct, and the latents that are returned, are then those of new
    prompts. Samples that go astray on the way count less.

    Args:
        denoise: guided output at latents (n, …) and a step index; a tensor of the latents' type.
        trajectory: the full runs; targets are its latents.
        schedule: increasing step indices, the first 0.
        prior: what the ridge draws towards; its weights of outputs beyond `memory` are folded into the newest one.
        timesteps, input_scales: of the full sampler's steps, (T,).
        memory: outputs that a step weighs.
        penalty: see `ridge_step`.
    """
    times, scales = np.asarray(timesteps, dtype=np.float64), np.asarray(input_scales, dtype=np.float64)
    total = trajectory.latents.shape[0] - 1
    latents = trajectory.latents[0]
    outputs: list[Tensor] = []
    steps = []
    for position, step_index in enumerate(schedule):
        following = schedule[position + 1] if position + 1 < len(schedule) else total
        outputs = [*outputs, denoise(latents, step_index)][-memory:]
        latent_prior, output_prior = prior(schedule[: position + 1], following)
        centre = [latent_prior, *_recent(output_prior, len(outputs))]
        weights = sample_weights(latents, trajectory.latents[step_index])
        places = sample_places(outputs)
        values = None if places is None else places.values
        terms = [latents, *outputs]
        apart = len(latents) >= FEWEST and len(position_axes(latents.ndim)) > 0
        if apart:
            terms += [mean(value).expand_as(value) for value in terms]
            centre += [0.0] * len(centre)
        fitted = ridge_step(trajectory.latents[following], terms, centre, penalty, weights, values)
        count = 1 + len(outputs)
        steps.append(
            Step(
                step_index=int(step_index),
                timestep=float(times[step_index]),
                input_scale=float(scales[step_index]),
                latent_coef=float(fitted.coefs[0, 0]),
                output_coefs=_floats(fitted.coefs[0, 1:count]),
                slopes=None if places is None else _slopes(places, fitted.coefs[1, :count]),
                means=_means(fitted.coefs[:, count:]) if apart else None,
            )
        )
        latents = _combined(fitted.crossed, values, terms)
    return Program(payload=_payload(steps), steps=tuple(steps)), latents


def _payload(steps: Sequence[Step]) -> Payload:
    """The plainest one that holds these steps."""
    if any(step.means for step in steps):
        return "banded"
    return "adaptive" if any(step.slopes for step in steps) else "output"


def _means(coefs: FloatArray) -> Means:
    """From (f, 1 + outputs), the latents' first."""
    slopes = coefs[1] if len(coefs) > 1 else None
    return Means(
        latent_coef=float(coefs[0, 0]),
        output_coefs=_floats(coefs[0, 1:]),
        latent_slope=0.0 if slopes is None else float(slopes[0]),
        output_slopes=() if slopes is None else _floats(slopes[1:]),
    )


def _slopes(places: Places, slopes: FloatArray) -> Slopes:
    return Slopes(
        centre=places.centre,
        spread=places.spread,
        latent_coef=float(slopes[0]),
        output_coefs=_floats(slopes[1:]),
    )


def _floats(values: FloatArray) -> tuple[float, ...]:
    return tuple(float(value) for value in values)


def _combined(coefs: FloatArray, places: FloatArray | None, values: Sequence[Tensor]) -> Tensor:
    """Every sample of the values (n, …) by its own coefficients and slopes (n or 1, f, len(values))."""
    each = coefs[:, 0] if places is None else coefs[:, 0] + places[:, None] * coefs[:, 1]
    weights = torch.from_numpy(each).to(values[0])
    shape = (-1, *[1] * (values[0].ndim - 1))
    terms = [weight.reshape(shape) * value for weight, value in zip(weights.unbind(dim=1), values, strict=True)]
    return torch.stack(terms).sum(dim=0)


def _rows(value: Any) -> FloatArray:
    """(n, …) → float64 (n, d)."""
    array = float64_from_array(value)
    return array.reshape(len(array), -1)


def _recent(coefs: ArrayLike, count: int) -> FloatArray:
    """The last `count` coefficients, with the sum of the older ones added to the newest."""
    values = np.asarray(coefs, dtype=np.float64)
    recent = values[-count:].copy()
    recent[-1] += values[:-count].sum() if len(values) > count else 0.0
    return recent
