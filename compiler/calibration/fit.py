"""Pass `fit`: schedule + samples → Program, with coefficients that correct drift as it appears.

The program is walked on the calibration set. At each computed step the coefficients are those with which the step lands
closest to the full run's latents at the next computed step, starting from where the program itself has come to. Means
over a sample's positions are weighed apart from what is around them. From the second step on coefficients follow each
sample: guided outputs that change more than others' from step to step are stiffer, and want other weights.

Everything here is numbers of samples: inner products come from a `Walk`, which has the tensors.

Shapes: n samples; r regressors of a step: latents and outputs, newest last, and then the means of each; f features of a
sample: 1, and its place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from otcache.schemas.program import FARTHEST, Means, Payload, Program, Slopes, Step

from ..programs.solver_table import SolverTable
from .samples import Rows, Samples, StepStatistics

FloatArray = NDArray[np.float64]
Prior = Callable[[Sequence[int], int], tuple[float, FloatArray]]
"""(computed step indices, next step index) → coefficients of the latents and of those steps' outputs, newest last."""
Stop = Callable[[int, float], bool]
"""(position in the schedule, mean relative error of the latents there) → whether to give the walk up."""

STRAY = 2.0
"""Times the median distance from the full run, from which on a sample counts less."""
FEWEST = 8
"""Samples for slopes and means: straight lines through fewer are lines through noise."""
SLOPE_PENALTY = 1e-3
"""Relative to the size of what a slope multiplies."""


class Stopped(Exception):
    """A walk was given up: it had drifted too far."""

    def __init__(self, evaluations: int) -> None:
        super().__init__(f"given up after {evaluations} evaluations")
        self.evaluations = evaluations


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


@dataclass(frozen=True, kw_only=True)
class FittedProgram:
    """A program with what it came to on the samples, each walked with coefficients that were fitted to the others."""

    program: Program
    scores: Rows
    evaluations: int
    """That were made, of one sample each."""
    drifts: tuple[float, ...]
    """Mean relative error of the latents at each computed step, and of the final ones."""


def ridge_step(
    grams: FloatArray,
    crosses: FloatArray,
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
        grams: inner products of each sample's regressors (n, r, r).
        crosses: (n, r) of them with what the prior leaves of the target, target − Σ c⁰ u.
        prior: c⁰ (r,).
        penalty: relative to each regressor's size; 0 for least squares.
        weights: s (n,); all 1 if there are none.
        places: p (n,); there are no slopes if there are none.

    >>> step = ridge_step(np.array([[[4.0]]]), np.array([[2.0]]), [1.0], 0.0)
    >>> step.coefs  # 1, and a correction of 2 / 4
    array([[1.5]])
    """
    n, count = crosses.shape
    features = np.stack([np.ones(n)] if places is None else [np.ones(n), places], axis=1)
    centre = np.zeros((features.shape[1], count))
    centre[0] = np.asarray(prior, dtype=np.float64)
    weighed = features if weights is None else features * weights[:, None]
    whole_grams = np.einsum("nf,ng,nrs->nfrgs", weighed, features, grams).reshape(n, centre.size, -1)
    whole_crosses = np.einsum("nf,nr->nfr", weighed, crosses).reshape(n, -1)
    penalties = np.repeat([penalty, SLOPE_PENALTY][: len(centre)], count)

    def solve(gram: FloatArray, cross: FloatArray) -> FloatArray:
        weight = np.diag(np.maximum(penalties * np.diag(gram), 1e-300))
        change = np.asarray(np.linalg.lstsq(gram + weight, cross, rcond=1e-15)[0], dtype=np.float64)
        return centre + change.reshape(centre.shape)

    gram, cross = whole_grams.sum(axis=0), whole_crosses.sum(axis=0)
    coefs = solve(gram, cross)
    others = (
        [coefs] if n == 1 else [solve(gram - g, cross - c) for g, c in zip(whole_grams, whole_crosses, strict=True)]
    )
    return FittedStep(coefs=coefs, crossed=np.stack(others))


def sample_weights(distances: FloatArray) -> FloatArray:
    """(n,) in (0, 1]: 1 for samples near their full run, less for those further from it than `STRAY` times the median
    distance.

    Weighed so, a stray adds no more to a sum of squares than a sample at that distance.

    >>> sample_weights(np.array([1.0, 1.0, 4.0]))
    array([1.  , 1.  , 0.25])
    """
    near = STRAY * np.median(distances)
    return np.square(near / np.maximum(distances, near)) if near else np.ones(len(distances))


def sample_places(change: FloatArray | None) -> Places | None:
    """Of samples whose outputs changed so much (n,); None for too few, or where all change alike."""
    if change is None or len(change) < FEWEST:
        return None
    centre, spread = float(change.mean()), float(change.std())
    if spread < 1e-6:
        return None
    return Places(centre=centre, spread=spread, values=np.clip((change - centre) / spread, -FARTHEST, FARTHEST))


def fit_output_program(
    samples: Samples,
    schedule: Sequence[int],
    prior: Prior,
    table: SolverTable,
    *,
    memory: int = 4,
    penalty: float = 1e-5,
    stop: Stop = lambda position, drift: False,
) -> FittedProgram:
    """A program of outputs for a schedule, and what it comes to on the samples.

    Each sample is walked with coefficients that are fitted to the others, as a prompt that calibration has not seen
    will be: the errors that later steps learn to correct, and the scores, are then those of new prompts. Samples that
    go astray on the way count less.

    Args:
        samples: with their full runs, whose latents are the targets.
        schedule: increasing step indices, the first 0.
        prior: what the ridge draws towards; its weights of outputs beyond `memory` are folded into the newest one.
        table: the full sampler.
        memory: outputs that a step weighs.
        penalty: see `ridge_step`.
        stop: asked at every computed step. Raises Stopped once it says so.
    """
    walk = samples.walk(memory)
    steps: list[Step] = []
    evaluations, drifts = 0, list[float]()
    for position, step_index in enumerate(schedule):
        following = schedule[position + 1] if position + 1 < len(schedule) else table.num_inference_steps
        latent_prior, output_prior = prior(schedule[: position + 1], following)
        centre = np.array([latent_prior, *_recent(output_prior, min(position + 1, memory))])
        found = walk.compute(step_index, following, centre)
        evaluations += found.evaluations
        drifts.append(float(np.mean(found.distance / np.maximum(found.size, 1e-30))))
        step, coefs = fit_step(found, int(step_index), centre, penalty, table)
        steps.append(step)
        if stop(position, drifts[-1]):
            walk.close()
            raise Stopped(evaluations)
        walk.advance(coefs)
    program = Program(payload=_payload(steps), steps=tuple(steps))
    scores = walk.finish()
    drifts.append(float(np.mean(scores["latent_error"])))
    return FittedProgram(program=program, scores=scores, evaluations=evaluations, drifts=tuple(drifts))


def fit_step(
    found: StepStatistics, step_index: int, prior: FloatArray, penalty: float, table: SolverTable
) -> tuple[Step, FloatArray]:
    """The step of a program, fitted to all samples, and each sample's own coefficients (n, r), fitted to the others."""
    count = len(prior)
    apart = len(found.cross) >= FEWEST and found.cross.shape[1] > count
    used = found.cross.shape[1] if apart else count
    centre = np.concatenate([prior, np.zeros(used - count)])
    weights, places = sample_weights(found.distance), sample_places(found.change)
    values = None if places is None else places.values
    fitted = ridge_step(found.gram[:, :used, :used], found.cross[:, :used], centre, penalty, weights, values)
    step = Step(
        step_index=step_index,
        timestep=float(table.timesteps[step_index]),
        input_scale=float(table.input_scales[step_index]),
        latent_coef=float(fitted.coefs[0, 0]),
        output_coefs=_floats(fitted.coefs[0, 1:count]),
        slopes=None if places is None else _slopes(places, fitted.coefs[1, :count]),
        means=_means(fitted.coefs[:, count:]) if apart else None,
    )
    crossed = np.broadcast_to(fitted.crossed, (len(found.cross), *fitted.crossed.shape[1:]))
    return step, crossed[:, 0] if values is None else crossed[:, 0] + values[:, None] * crossed[:, 1]


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


def _recent(coefs: ArrayLike, count: int) -> FloatArray:
    """The last `count` coefficients, with the sum of the older ones added to the newest.

    >>> _recent([0.1, 0.2, 1.0], 2)
    array([0.2, 1.1])
    """
    values = np.asarray(coefs, dtype=np.float64)
    recent = values[-count:].copy()
    recent[-1] += values[:-count].sum() if len(values) > count else 0.0
    return recent
