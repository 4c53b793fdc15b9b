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

import bisect
import copy
import inspect
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from otcache.schemas.errors import ModelError, UsageError
from otcache.schemas.program import MAX_STEPS, Payload, Program, Step

FloatArray = NDArray[np.float64]
Coordinate = Literal["sigma", "index"]

DROP = 1e-7
"""Output coefficients below this part of the largest one of their step are zero: the precision of float32."""
TOLERANCE = 1e-4
"""Largest relative distance to the scheduler itself, which computes in float32."""
MAX_MEMORY = 64
"""Longest `Step.output_coefs` that a program may hold (`otcache.schemas.program`)."""

_PROBE_SCALE = 100.0
"""Random probes are this large so that clipping and thresholding show."""
_VANISHED = 1e-10
"""Below this part of the largest coefficient, a latent no longer holds the initial noise."""

_TESTED = (
    "DDIMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "UniPCMultistepScheduler",
)

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


@dataclass(frozen=True, kw_only=True, eq=False)
class SolverTable:
    """A deterministic sampler as linear coefficients; arrays are float64 and read-only."""

    timesteps: FloatArray
    """(T,) times in the scheduler's own units, as the pipeline reads them from `scheduler.timesteps`."""
    input_scales: FloatArray
    """(T,) factors of the latents on their way into the model (`scale_model_input`)."""
    initial_scale: float
    """Standard deviation of the initial latents (`init_noise_sigma`)."""
    latent_coefs: FloatArray
    """(T,) factor of x_i in x_{i+1}."""
    output_coefs: FloatArray
    """(T, T) lower triangular; row i holds the weights of v_0 … v_i in x_{i+1}."""
    sigmas: FloatArray | None = None
    """(T+1,) noise levels, if the scheduler has them."""
    scheduler: str = ""
    """Class name of the scheduler."""
    prediction_type: str | None = None
    """`epsilon`, `v_prediction`, `sample` or `flow_prediction`, if the scheduler says."""
    order: int = 1
    """Evaluations per step of the user's count (`scheduler.order`; 2 for Heun)."""

    def __post_init__(self) -> None:
        num_steps = np.asarray(self.timesteps).size
        shapes = {
            "timesteps": (num_steps,),
            "input_scales": (num_steps,),
            "latent_coefs": (num_steps,),
            "output_coefs": (num_steps, num_steps),
            "sigmas": (num_steps + 1,),
        }
        for name, shape in shapes.items():
            if getattr(self, name) is None:
                continue
            array = np.array(getattr(self, name), dtype=np.float64)
            if array.shape != shape or not np.isfinite(array).all():
                raise ModelError(
                    f"solver table of {self.scheduler or 'a scheduler'}: {name} has shape {array.shape}"
                    f"{'' if np.isfinite(array).all() else ' and values that are not finite'}; expected finite numbers "
                    f"of shape {shape}. Check the scheduler's configuration and its number of steps."
                )
            array.flags.writeable = False
            object.__setattr__(self, name, array)
        if np.triu(self.output_coefs, 1).any():
            raise ModelError(
                f"solver table of {self.scheduler or 'a scheduler'}: output_coefs weigh outputs of later steps, "
                f"expected a lower triangular array. Put the weights of step i's outputs v_0 … v_i into row i."
            )

    @property
    def num_inference_steps(self) -> int:
        """T, the number of model evaluations of the full sampler."""
        return len(self.timesteps)


def scheduler_names() -> tuple[str, ...]:
    """Class names of the diffusers schedulers that are tested; others work if they are linear and deterministic."""
    return _TESTED


def lower(scheduler: Any, *, step_options: Mapping[str, Any] | None = None) -> SolverTable:
    """Read the linear coefficients of a scheduler off its own `step`.

    Args:
        scheduler: a diffusers scheduler after `set_timesteps`, fresh or used; it is left untouched.
        step_options: what the pipeline passes to `scheduler.step` beside the tensors, such as `{"eta": 0.0}`.

    Raises:
        UsageError: `set_timesteps` was not called.
        ModelError: the scheduler is stochastic or not linear; the message names the option to change.
    """
    name = type(scheduler).__name__
    options = dict(step_options or {})
    if getattr(scheduler, "num_inference_steps", None) is None:
        raise UsageError(
            f"scheduler {name}: received one without inference steps, expected one that is ready to sample. "
            f"Call set_timesteps(num_inference_steps) first, as its pipeline does."
        )
    num_steps = len(scheduler.timesteps)
    if not 1 <= num_steps <= MAX_STEPS:
        raise UsageError(
            f"scheduler {name}: received {num_steps} timesteps, expected 1 … {MAX_STEPS}. Lower num_inference_steps."
        )
    _refuse_named(scheduler, options)
    try:
        raw_latents, raw_outputs = _probe_basis(scheduler, options)
        latents, outputs, states, input_scales = _probe_random(scheduler, options, seed=0)
        states_again = _probe_random(scheduler, options, seed=1)[2]
    except ModelError:
        raise
    except Exception as error:
        raise _refusal(name, f"its step failed on probe tensors ({type(error).__name__}: {error})") from error
    if not torch.equal(states, states_again):
        raise _refusal(name, f"its steps draw random noise{_suspects(scheduler, options)}", "a deterministic sampler")

    latent_coefs, output_coefs = _eliminate(name, raw_latents, raw_outputs)
    _check(name, _suspects(scheduler, options), latent_coefs, output_coefs, latents, outputs, states)
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is not None and len(sigmas) != num_steps + 1:
        sigmas = None
    return SolverTable(
        timesteps=_numpy(scheduler.timesteps),
        input_scales=input_scales,
        initial_scale=float(getattr(scheduler, "init_noise_sigma", 1.0)),
        latent_coefs=latent_coefs,
        output_coefs=output_coefs,
        sigmas=None if sigmas is None else _numpy(sigmas),
        scheduler=name,
        prediction_type="flow_prediction" if is_flow(scheduler) else scheduler.config.get("prediction_type"),
        order=int(getattr(scheduler, "order", 1)),
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


def table_memory(table: SolverTable) -> int:
    """How many outputs the longest step weighs, from its newest to its oldest coefficient that is not zero."""
    return max(len(trimmed(table.output_coefs[i, : i + 1])) for i in range(table.num_inference_steps))


def program_from_table(
    table: SolverTable, payload: Payload = "output", *, initial_scale: float | None = None
) -> Program:
    """The full program: every step computed.

    `initial_scale` is that of the latents the program will be given, if it is not the table's own: the first step then
    brings them to the table's scale, so programs of solvers with different conventions run on the same initial latents.
    """
    steps = []
    for i in range(table.num_inference_steps):
        rescale = 1.0 if i or initial_scale is None else table.initial_scale / initial_scale
        steps.append(
            step_from_table(table, i, table.latent_coefs[i] * rescale, table.output_coefs[i, : i + 1], rescale=rescale)
        )
    return Program(payload=payload, steps=tuple(steps))


def step_from_table(
    table: SolverTable, step_index: int, latent_coef: float, output_coefs: ArrayLike, *, rescale: float = 1.0
) -> Step:
    """A computed step at `step_index` of the table with the given update, its old vanishing coefficients cut off."""
    coefs = trimmed(output_coefs)
    if len(coefs) > MAX_MEMORY:
        raise ModelError(
            f"step {step_index} of {table.scheduler or 'a solver table'} weighs {len(coefs)} outputs, expected at most "
            f"{MAX_MEMORY}. Take another scheduler or fewer steps; these are tested: {', '.join(_TESTED)}."
        )
    return Step(
        step_index=step_index,
        timestep=float(table.timesteps[step_index]),
        input_scale=float(table.input_scales[step_index] * rescale),
        latent_coef=float(latent_coef),
        output_coefs=coefs,
    )


def trimmed(output_coefs: ArrayLike) -> tuple[float, ...]:
    """Coefficients (newest last) with what is below `DROP` of the largest zero, without leading zeros, never empty."""
    coefs = _dropped(np.asarray(output_coefs, dtype=np.float64))
    used = np.flatnonzero(coefs)
    return tuple(coefs[used[0] if used.size else -1 :].tolist())


def jump(table: SolverTable, i: int, j: int) -> tuple[float, FloatArray]:
    """x_j from x_i by the table's own steps i … j−1.

    Returns (latent_coef, output_coefs (T,)) with x_j = latent_coef · x_i + Σ_m output_coefs[m] · v_m, m < j.
    """
    num_steps = table.num_inference_steps
    if not 0 <= i <= j <= num_steps:
        raise UsageError(f"jump from step {i} to step {j}: expected 0 ≤ start ≤ end ≤ {num_steps}, the steps there are")
    latent_coef, output_coefs = 1.0, np.zeros(num_steps)
    for step_index in range(i, j):
        latent_coef = latent_coef * float(table.latent_coefs[step_index])
        output_coefs = table.latent_coefs[step_index] * output_coefs + table.output_coefs[step_index]
    return latent_coef, output_coefs


def held_jump(table: SolverTable, i: int, j: int) -> tuple[float, FloatArray]:
    """Like `jump`, with the output held: v_i stands in for v_i … v_{j−1}; outputs before i are history."""
    latent_coef, output_coefs = jump(table, i, j)
    if j > i:
        output_coefs[i] = output_coefs[i:j].sum()
        output_coefs[i + 1 :] = 0.0
    return latent_coef, output_coefs


def extrapolated_jump(
    table: SolverTable, computed: Sequence[int], j: int, order: int, *, coordinate: Coordinate = "sigma"
) -> tuple[float, FloatArray]:
    """x_j from x_i, i = computed[-1], when only the outputs at `computed` were evaluated.

    Every other output, in the jump and in the history that the solver still weighs, is the polynomial through the last
    `order` + 1 outputs that had been computed by then: order 0 holds the last one, order 1 is Adams–Bashforth like.

    Args:
        computed: increasing step indices, 0 the first.
        coordinate: variable of the polynomial; `sigma` falls back to the step index where the table has no sigmas
            or where two of them coincide (Heun).

    Returns (latent_coef, output_coefs (len(computed),)), newest last.
    """
    nodes = checked_schedule(computed, table.num_inference_steps)
    if order < 0:
        raise UsageError(f"extrapolation order is {order}, expected 0 (hold) or more")
    if not nodes[-1] <= j <= table.num_inference_steps:
        raise UsageError(
            f"extrapolated jump from step {nodes[-1]} to step {j}: expected an end in "
            f"{nodes[-1]} … {table.num_inference_steps}"
        )
    latent_coef, output_coefs = jump(table, nodes[-1], j)
    forecast = np.zeros((j, len(nodes)))
    for step_index in np.flatnonzero(output_coefs[:j]).tolist():
        available = bisect.bisect_right(nodes, step_index)
        if nodes[available - 1] == step_index:
            forecast[step_index, available - 1] = 1.0
        else:
            first = max(0, available - 1 - order)
            forecast[step_index, first:available] = _lagrange(table, nodes[first:available], step_index, coordinate)
    return latent_coef, output_coefs[:j] @ forecast


def checked_schedule(schedule: Sequence[int], num_inference_steps: int) -> tuple[int, ...]:
    """The schedule as integers, or UsageError: indices must increase from 0 and stay below T."""
    indices = tuple(int(step_index) for step_index in schedule)
    increasing = all(before < after for before, after in itertools.pairwise(indices))
    if not indices or indices[0] != 0 or not increasing or indices[-1] >= num_inference_steps:
        raise UsageError(
            f"schedule {list(indices)}: expected step indices that start at 0, increase strictly and stay below "
            f"{num_inference_steps}, the number of steps"
        )
    return indices


def _lagrange(table: SolverTable, nodes: Sequence[int], at: int, coordinate: Coordinate) -> FloatArray:
    """Weights of the values at `nodes` in their interpolation polynomial at `at`."""
    position = np.arange(table.num_inference_steps, dtype=np.float64)
    if coordinate == "sigma" and table.sigmas is not None and len(set(table.sigmas[list(nodes)])) == len(nodes):
        position = table.sigmas[:-1]
    weights = np.ones(len(nodes))
    for k, node in enumerate(nodes):
        for other in nodes:
            if other != node:
                weights[k] *= (position[at] - position[other]) / (position[node] - position[other])
    return weights


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
        rows[i] = _numpy(stepped).reshape(-1)
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
        output_coefs[i] = _dropped(unrolled[i + 1, 1:] - latent_coefs[i] * unrolled[i, 1:])
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
    history = _numpy(outputs).reshape(len(outputs), -1)
    latents = _numpy(initial).reshape(-1)
    for i, expected in enumerate(_numpy(states).reshape(len(states), -1)):
        latents = latent_coefs[i] * latents + output_coefs[i] @ history
        error = np.linalg.norm(latents - expected) / max(float(np.linalg.norm(expected)), 1e-30)
        if not error <= TOLERANCE:
            raise _refusal(
                name,
                f"its step {i} differs from the linear table by {error:.1e} of the latents' norm{suspects}",
                f"a linear step (at most {TOLERANCE:.0e})",
            )


def _refuse_named(scheduler: Any, options: Mapping[str, Any]) -> None:
    """ModelError for what a name or option alone tells; everything else is found by its behaviour."""
    name = type(scheduler).__name__
    if "Ancestral" in name or "SDE" in name:
        raise _refusal(name, "it is a stochastic sampler", "a deterministic sampler")
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
        f"scheduler {name} cannot be compiled: {received}; expected {expected}. {fix} "
        f"These are tested: {', '.join(_TESTED)}."
    )


def _dropped(coefs: FloatArray) -> FloatArray:
    return np.where(np.abs(coefs) < DROP * np.abs(coefs).max(initial=0.0), 0.0, coefs)


def _numpy(values: Any) -> FloatArray:
    """float64 copy of a tensor or array of any dtype, on any device."""
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().double().numpy()
    return np.array(values, dtype=np.float64)
