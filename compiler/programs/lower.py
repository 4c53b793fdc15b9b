"""Pass `lower`: a diffusers scheduler → `SolverTable`, the sampler as linear coefficients.

Consumes a scheduler on which `set_timesteps` has been called the way its pipeline calls it. Produces, for T calls of
`scheduler.step`, with x the latents and v the (guided) model outputs,

    v_i     = model(input_scales[i] · x_i, timesteps[i])              x_0 = initial_scale · noise
    x_{i+1} = latent_coefs[i] · x_i + Σ_m output_coefs[i, m] · v_m     m ≤ i

No solver is re-implemented: basis vectors are pushed through `scheduler.step` and the coefficients read off; then the
table is compared with the scheduler on random tensors. What is not linear, or not deterministic, is refused there.

Solvers that keep latents beside outputs (DPM-Solver++ 2M and UniPC keep data predictions, PLMS and Heun the latents
before) have no finite memory in this form: eliminating a kept latent brings in the output before it, with a factor
below one. The series is cut where a coefficient falls under `DROP` of the largest one of its step.

Shapes: T steps of the full sampler, i and m run over them.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from otcache.schemas.errors import ModelError, UsageError
from otcache.schemas.program import MAX_STEPS

from .arrays import float64_from_array
from .schedulers import working_schedulers
from .solver_table import FloatArray, SolverTable, drop_vanishing

TOLERANCE = 1e-4
"""Largest relative distance to the scheduler itself, which computes in float32."""

_PROBE_SCALE = 100.0
"""Random probes are this large so that clipping and thresholding show."""
_VANISHED = 1e-10
"""Below this part of the largest coefficient, a latent no longer holds the initial noise."""


_STATE: dict[str, Any] = {
    "_step_index": None,
    "_begin_index": None,
    "counter": 0,
    "cur_model_output": 0,
    "cur_sample": None,
    "derivatives": [],
    "dt": None,
    "ets": [],
    "last_sample": None,
    "lower_order_nums": 0,
    "prev_derivative": None,
    "sample": None,
}
"""What diffusers' schedulers remember between steps, and its value before the first."""


def lower(scheduler: Any, *, step_options: Mapping[str, float] | None = None) -> SolverTable:
    """Read the linear coefficients of a scheduler off its own `step`.

    Args:
        scheduler: a diffusers scheduler after `set_timesteps`, fresh or used; it is left untouched.
        step_options: what the pipeline passes to `scheduler.step` beside the tensors, such as `{"eta": 0.0}`; those
            that this scheduler's step does not take are left out, as pipelines do.

    Raises:
        UsageError: `set_timesteps` was not called.
        ModelError: the scheduler is stochastic or not linear; the message names the option to change.
    """
    name = type(scheduler).__name__
    taken = inspect.signature(scheduler.step).parameters
    options = {name: value for name, value in (step_options or {}).items() if name in taken}
    if getattr(scheduler, "num_inference_steps", None) is None:
        raise UsageError(
            f"scheduler {name}: received one without inference steps, expected one that is ready to sample. Call "
            "set_timesteps(num_inference_steps) first, as its pipeline does."
        )
    num_steps = len(scheduler.timesteps)
    if not 1 <= num_steps <= MAX_STEPS:
        raise UsageError(
            f"scheduler {name}: received {num_steps} timesteps, expected 1 … {MAX_STEPS}. Lower num_inference_steps."
        )
    _refuse_options(scheduler, options)
    try:
        raw_latents, raw_outputs = _probe_basis(scheduler, options)
        latents, outputs, states, input_scales = _probe_random(scheduler, options, seed=0)
        states_again = _probe_random(scheduler, options, seed=1)[2]
    except ModelError:
        raise
    except Exception as error:
        raise _refusal(name, f"its step failed on probe tensors ({type(error).__name__}: {error})") from error
    if not torch.isfinite(states).all():
        raise _refusal(name, "its steps give values that are not finite", fix="Check its options and number of steps.")
    if not torch.equal(states, states_again):
        raise _refusal(name, f"its steps draw random noise{_suspects(scheduler, options)}", "a deterministic sampler")

    latent_coefs, output_coefs = _eliminate(name, raw_latents, raw_outputs)
    _check(name, _suspects(scheduler, options), latent_coefs, output_coefs, latents, outputs, states)
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is not None and len(sigmas) != num_steps + 1:
        sigmas = None
    return SolverTable(
        timesteps=float64_from_array(scheduler.timesteps),
        input_scales=input_scales,
        initial_scale=float(getattr(scheduler, "init_noise_sigma", 1.0)),
        latent_coefs=latent_coefs,
        output_coefs=output_coefs,
        sigmas=None if sigmas is None else float64_from_array(sigmas),
        scheduler=name,
        prediction_type="flow_prediction" if is_flow(scheduler) else scheduler.config.get("prediction_type"),
        order=int(getattr(scheduler, "order", 1)),
        step_options=options,
    )


def is_flow(scheduler: Any) -> bool:
    """Whether the scheduler samples a flow matching model, whose output is a velocity and whose timestep is sigma."""
    options = effective_options(scheduler)
    return "FlowMatch" in type(scheduler).__name__ or options.get("prediction_type") == "flow_prediction"


def effective_options(scheduler: Any) -> dict[str, Any]:
    """The scheduler's configuration without the keys that its class does not know.

    `from_config` keeps those of the class that the configuration came from; they have no effect.
    """
    known = inspect.signature(type(scheduler).__init__).parameters
    return {key: value for key, value in scheduler.config.items() if key in known}


def _fresh(scheduler: Any) -> Any:
    """A copy as it was right after `set_timesteps`, on the CPU, that starts at index 0."""
    fresh = copy.deepcopy(scheduler)
    for name in ("timesteps", "sigmas"):
        if isinstance(getattr(fresh, name, None), torch.Tensor):
            setattr(fresh, name, getattr(fresh, name).cpu())
    for name, value in _STATE.items():
        if name in vars(fresh):
            setattr(fresh, name, copy.copy(value))
    for name in ("model_outputs", "timestep_list"):
        if name in vars(fresh):
            setattr(fresh, name, [None] * len(getattr(fresh, name)))
    if hasattr(fresh, "set_begin_index"):
        fresh.set_begin_index(0)
    if getattr(fresh, "solver_p", None) is not None:
        fresh.solver_p = _fresh(fresh.solver_p)
    return fresh


def _scaled(scheduler: Any, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """The latents as the model sees them."""
    return scheduler.scale_model_input(sample, timestep) if hasattr(scheduler, "scale_model_input") else sample


def _probe_basis(scheduler: Any, options: Mapping[str, Any]) -> tuple[FloatArray, FloatArray]:
    """Coefficients of x_{i+1} in x_0 … x_i and v_0 … v_i, two (T, T) arrays.

    Each step is given a basis vector of its own for x_i rather than the x_i that the step before returned. The solver
    is linear, so this loses nothing, and no rounding of one step reaches the next. The basis lies along the width,
    where no scheduler looks (some split channels).
    """
    fresh = _fresh(scheduler)
    num_steps = len(fresh.timesteps)
    basis = torch.eye(2 * num_steps, dtype=torch.float64).reshape(2 * num_steps, 1, 1, 1, 2 * num_steps)
    rows = np.zeros((num_steps, 2 * num_steps))
    for i, timestep in enumerate(fresh.timesteps):
        _scaled(fresh, basis[i], timestep)
        stepped = fresh.step(basis[num_steps + i].clone(), timestep, basis[i].clone(), return_dict=False, **options)[0]
        rows[i] = float64_from_array(stepped).reshape(-1)
    return rows[:, :num_steps], rows[:, num_steps:]


def _probe_random(
    scheduler: Any, options: Mapping[str, Any], seed: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, FloatArray]:
    """One run of the scheduler in float32: x_0, outputs (T, …), latents x_1 … x_T (T, …), input scales (T,).

    The tensors are the same for every seed, which sets the generator that a stochastic scheduler would draw from.
    """
    fresh = _fresh(scheduler)
    generator = torch.Generator().manual_seed(0)
    shape = (2, 4, 8, 8)
    initial = _PROBE_SCALE * torch.randn(shape, generator=generator)
    outputs = _PROBE_SCALE * torch.randn((len(fresh.timesteps), *shape), generator=generator)
    states = torch.empty_like(outputs)
    input_scales = np.ones(len(outputs))
    latents = initial
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for i, timestep in enumerate(fresh.timesteps):
            scaled = _scaled(fresh, latents.clone(), timestep)
            input_scales[i] = float((scaled.double() * latents).sum() / latents.double().square().sum())
            if not torch.allclose(scaled, latents * input_scales[i], rtol=TOLERANCE, atol=TOLERANCE):
                raise _refusal(type(fresh).__name__, f"its scale_model_input at step {i} is not a multiplication")
            latents = fresh.step(outputs[i].clone(), timestep, latents.clone(), return_dict=False, **options)[0]
            states[i] = latents
    return initial, outputs, states, input_scales


def _eliminate(name: str, raw_latents: FloatArray, raw_outputs: FloatArray) -> tuple[FloatArray, FloatArray]:
    """From x_{i+1} in all latents and outputs to x_{i+1} in x_i and outputs: (T,) and (T, T).

    Every x_i is p_i · x_0 + Σ_m P_im · v_m, so the factor of x_i in x_{i+1} can only be p_{i+1} / p_i.
    """
    num_steps = len(raw_latents)
    unrolled = np.zeros((num_steps + 1, num_steps + 1))
    unrolled[0, 0] = 1.0
    latent_coefs = np.zeros(num_steps)
    output_coefs = np.zeros((num_steps, num_steps))
    for i in range(num_steps):
        unrolled[i + 1] = raw_latents[i] @ unrolled[:-1]
        unrolled[i + 1, 1:] += raw_outputs[i]
        if abs(unrolled[i, 0]) > _VANISHED * np.abs(unrolled[i]).max():
            latent_coefs[i] = unrolled[i + 1, 0] / unrolled[i, 0]
        elif abs(unrolled[i + 1, 0]) <= _VANISHED * np.abs(unrolled[i + 1]).max():
            latent_coefs[i] = raw_latents[i, i]  # both are free of x_0: any factor is right, this one is the solver's
        else:
            raise _refusal(name, f"step {i} returns to the initial noise that the latents before it no longer hold")
        output_coefs[i] = drop_vanishing(unrolled[i + 1, 1:] - latent_coefs[i] * unrolled[i, 1:])
    return latent_coefs, output_coefs


def _check(
    name: str,
    suspects: str,
    latent_coefs: FloatArray,
    output_coefs: FloatArray,
    initial: torch.Tensor,
    outputs: torch.Tensor,
    states: torch.Tensor,
) -> None:
    """ModelError unless the table repeats the run of the scheduler at every step."""
    history = float64_from_array(outputs).reshape(len(outputs), -1)
    latents = float64_from_array(initial).reshape(-1)
    for i, expected in enumerate(float64_from_array(states).reshape(len(states), -1)):
        latents = latent_coefs[i] * latents + output_coefs[i] @ history
        error = np.linalg.norm(latents - expected) / max(float(np.linalg.norm(expected)), 1e-30)
        if not error <= TOLERANCE:
            raise _refusal(
                name,
                f"its step {i} differs from the linear table by {error:.1e} of the latents' norm{suspects}",
                f"a linear step (at most {TOLERANCE:.0e})",
            )


def _refuse_options(scheduler: Any, options: Mapping[str, Any]) -> None:
    """ModelError for what an option alone tells; everything else is found by its behaviour."""
    name = type(scheduler).__name__
    config = effective_options(scheduler)
    if str(config.get("algorithm_type", "")).startswith("sde"):
        raise _refusal(
            name,
            f"algorithm_type={config['algorithm_type']!r} draws random noise",
            "a deterministic sampler",
            f"Build it with from_config(…, algorithm_type={config['algorithm_type'].removeprefix('sde-')!r}).",
        )
    if config.get("stochastic_sampling"):
        raise _refusal(
            name,
            "stochastic_sampling=True draws random noise",
            "a deterministic sampler",
            "Build it with from_config(…, stochastic_sampling=False).",
        )
    for option in ("thresholding", "clip_sample"):
        if config.get(option):
            raise _refusal(
                name,
                f"{option}=True is not linear",
                "a linear step",
                f"Build it with from_config(…, {option}=False), if the model's images allow it.",
            )
    if options.get("eta"):
        raise _refusal(name, f"eta={options['eta']} draws random noise", "a deterministic sampler", "Pass eta=0.")


def _suspects(scheduler: Any, options: Mapping[str, Any]) -> str:
    """The options that are likely to be the cause, in words for the end of a clause."""
    causes = ("clip_denoised", "clip_sample", "eta", "s_churn", "stochastic", "tau", "thresholding", "variance_type")
    settings = {**effective_options(scheduler), **options}
    found = [f"{key}={value!r}" for key, value in settings.items() if value and key.startswith(causes)]
    found = [setting for setting in found if not setting.startswith("clip_sample_range")]
    return f" (options: {', '.join(found)})" if found else ""


def _refusal(name: str, received: str, expected: str = "a deterministic, linear sampler", fix: str = "") -> ModelError:
    fix = fix or "Set another scheduler on the pipeline with from_config(pipe.scheduler.config)."
    return ModelError(
        f"scheduler {name} cannot be compiled: {received}; expected {expected}. {fix} These work: "
        f"{', '.join(working_schedulers())}."
    )
