"""Pass `fit`: schedule + calibration set → Program, with coefficients that correct drift as it appears.

The program is walked on the calibration set. At each computed step the coefficients are those with which the step lands
closest to the full run's latents at the next computed step, starting from where the program itself has come to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from otcache.schemas.program import Program, Step

from .capture import Trajectory

FloatArray = NDArray[np.float64]
Prior = Callable[[Sequence[int], int], tuple[float, FloatArray]]
"""(computed step indices, next step index) → coefficients of the latents and of those steps' outputs, newest last."""


def ridge_step(
    target: ArrayLike, latents: ArrayLike, outputs: Sequence[ArrayLike], prior: tuple[float, ArrayLike], penalty: float
) -> tuple[float, FloatArray]:
    """The update that lands closest to a target, drawn towards a prior.

    min ‖target − a·x − Σ w_m v_m‖² + penalty · Σ_r G_rr (c_r − c_r⁰)², with c = (a, w) and G the regressors' Gram matrix.

    Args:
        target, latents: float (n, …); arrays, or tensors of any dtype and device.
        outputs: float (n, …) each, newest last.
        prior: a⁰ and w⁰ (len(outputs),).
        penalty: relative to each regressor's size; 0 for least squares.

    Returns a and w (len(outputs),).
    """
    regressors = np.stack([_float64(value).ravel() for value in (latents, *outputs)])
    centre = np.concatenate([[prior[0]], np.asarray(prior[1], dtype=np.float64)])
    gram = regressors @ regressors.T
    remainder = _float64(target).ravel() - centre @ regressors
    weight = np.diag(np.maximum(penalty * np.diag(gram), 1e-300))
    change = np.linalg.lstsq(gram + weight, regressors @ remainder, rcond=1e-15)[0]
    found = centre + change
    return float(found[0]), found[1:]


def fit_output_program(
    denoise: Callable[[Any, int], Any],
    trajectory: Trajectory,
    schedule: Sequence[int],
    prior: Prior,
    *,
    timesteps: ArrayLike,
    input_scales: ArrayLike,
    memory: int = 4,
    penalty: float = 1e-5,
) -> tuple[Program, Any]:
    """An `output` program for a schedule, and the latents (n, …) that it ends in on the calibration set.

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
    outputs: list[Any] = []
    steps = []
    for position, step_index in enumerate(schedule):
        following = schedule[position + 1] if position + 1 < len(schedule) else total
        outputs = [*outputs, denoise(latents, step_index)][-memory:]
        latent_prior, output_prior = prior(schedule[: position + 1], following)
        latent_coef, output_coefs = ridge_step(
            trajectory.latents[following],
            latents,
            outputs,
            (latent_prior, _recent(output_prior, len(outputs))),
            penalty,
        )
        steps.append(
            Step(
                step_index=int(step_index),
                timestep=float(times[step_index]),
                input_scale=float(scales[step_index]),
                latent_coef=latent_coef,
                output_coefs=tuple(float(coef) for coef in output_coefs),
            )
        )
        latents = latent_coef * latents + sum(float(c) * v for c, v in zip(output_coefs, outputs, strict=True))
    return Program(payload="output", steps=tuple(steps)), latents


def _float64(value: Any) -> FloatArray:
    """An array or a torch tensor as float64; numpy itself reads no bfloat16, no gradients and no GPU."""
    if hasattr(value, "detach"):
        value = value.detach().double().cpu().numpy()
    return np.asarray(value, dtype=np.float64)


def _recent(coefs: ArrayLike, count: int) -> FloatArray:
    """The last `count` coefficients, with the sum of the older ones added to the newest."""
    values = np.asarray(coefs, dtype=np.float64)
    recent = values[-count:].copy()
    recent[-1] += values[:-count].sum() if len(values) > count else 0.0
    return recent


def forecast_coefs(computed: Sequence[int], step_index: int, order: int) -> tuple[float, ...]:
    """Weights of the last `order` + 1 computed values in their polynomial at `step_index`, newest last.

    Order 0 reuses the newest value; order k is exact for polynomials of degree k in the step index (TaylorSeer,
    arXiv 2503.06923, in Lagrange's form). Fewer values give a lower order.
    """
    nodes = [float(node) for node in computed[-(order + 1) :]]
    weights = []
    for i, node in enumerate(nodes):
        others = [other for j, other in enumerate(nodes) if j != i]
        weights.append(float(np.prod([(step_index - other) / (node - other) for other in others])))
    return tuple(weights)
